"""The choices of an answer of /v1/completions."""

from typing import Any

from hbserve.results import GenerationDelta
from hbserve.server.answers.logprobs import CompletionLogprobs, TokenNames, of_prompt
from hbserve.server.fields.request_fields import CompletionBody
from hbserve_rpc.messages import TokenLogprobs


class CompletionChoices:
    """Texts as the model writes them, each after the text of its prompt if the request wants that back."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(
        self, names: TokenNames, body: CompletionBody, prompts: list[tuple[int, ...]], echoed: list[str]
    ) -> None:
        """Take, for each choice, its prompt, and the text of it that is repeated before the answer ("" is none)."""
        self._names = names
        self._is_scored = bool(body.echo) and body.logprobs is not None and body.logprobs is not False
        """Whether the prompt is repeated with its log-probabilities, which come with the first token."""
        self._shows_prompt_logprobs = body.prompt_logprobs is not None
        with_token_ids = bool(body.return_token_ids)
        hidden_ids = frozenset[int]() if body.skip_special_tokens is False else names.special_ids
        self._logprobs = [CompletionLogprobs(names, text, hidden_ids) for text in echoed]
        self._prompts = prompts
        self._echoed = echoed
        self._with_token_ids = with_token_ids
        self._texts = [[text] for text in echoed]
        self._token_ids: list[list[int]] = [[] for _ in prompts]
        self._reasons: list[str | None] = [None] * len(prompts)
        self._stop_reasons: list[str | int | None] = [None] * len(prompts)
        self._prompt_logprobs: list[list[dict[str, Any] | None] | None] = [None] * len(prompts)

    def opening(self, index: int) -> list[dict[str, Any]]:
        echoed = "" if self._is_scored else self._echoed[index]
        if not echoed and not self._with_token_ids:
            return []
        ids = {"prompt_token_ids": self._prompts[index], "token_ids": []} if self._with_token_ids else {}
        return [self._choice(index, echoed, None, ids)]

    def chunk(self, index: int, delta: GenerationDelta) -> list[dict[str, Any]]:
        text, reason = delta["text"], delta["finish_reason"]
        self._texts[index].append(text)
        self._reasons[index] = reason
        more: dict[str, Any] = {}
        if reason:
            self._stop_reasons[index] = more["stop_reason"] = delta["stop_reason"]
        if self._with_token_ids:
            self._token_ids[index] += delta["token_ids"]
            more["token_ids"] = delta["token_ids"]
        scored: list[tuple[int, TokenLogprobs | None]] = []
        if (of_its_prompt := delta["prompt_logprobs"]) is not None:
            if self._shows_prompt_logprobs:
                more["prompt_logprobs"] = self._prompt_logprobs[index] = of_prompt(self._names, of_its_prompt)
            if self._is_scored:
                scored += zip(self._prompts[index], of_its_prompt, strict=True)
                text = self._echoed[index] + text
        num_prompt = len(scored)
        scored += zip(delta["token_ids"], delta["logprobs"] or [], strict=False)
        if scored:
            tokens, found = [token for token, _ in scored], [each for _, each in scored]
            more["logprobs"] = self._logprobs[index].add(tokens, found, num_prompt)
        return [self._choice(index, text, reason, more)] if text or reason or more else []

    def beside(self, index: int, delta: GenerationDelta) -> dict[str, Any]:
        return {}  # as in vLLM, each choice has its prompt's log-probabilities itself

    def num_reasoning(self) -> int | None:
        return None

    def is_bare(self, index: int, delta: GenerationDelta) -> bool:
        has_more = delta["finish_reason"] or delta["logprobs"] or delta["prompt_logprobs"] is not None
        return not has_more and not self._with_token_ids

    def bare(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, text, None, {})

    def whole(self, index: int) -> dict[str, Any]:
        ids = {"prompt_token_ids": self._prompts[index], "token_ids": self._token_ids[index]}
        more: dict[str, Any] = {"stop_reason": self._stop_reasons[index]} | (ids if self._with_token_ids else {})
        if self._logprobs[index].whole["tokens"]:
            more = {**more, "logprobs": self._logprobs[index].whole}
        if self._shows_prompt_logprobs:
            more = {**more, "prompt_logprobs": self._prompt_logprobs[index]}
        return self._choice(index, "".join(self._texts[index]), self._reasons[index], more)

    def _choice(self, index: int, text: str, reason: str | None, more: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, **more}
