"""Choices of /v1/completions."""

from typing import Any

from hbserve.results import GenerationDelta
from hbserve.server.logprobs import CompletionLogprobs, TokenNames


class CompletionChoices:
    """Text as the model writes it, after the prompt's own if the request wants it back."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, names: TokenNames, prompts: list[list[int]], echoed: list[str], *, with_token_ids: bool) -> None:
        """Of each choice its prompt, and what of that is repeated before the answer."""
        self._logprobs = [CompletionLogprobs(names, len(text)) for text in echoed]
        self._prompts = prompts
        self._echoed = echoed
        self._with_token_ids = with_token_ids
        self._texts = [[text] for text in echoed]
        self._token_ids: list[list[int]] = [[] for _ in prompts]
        self._reasons: list[str | None] = [None] * len(prompts)

    def opening(self, index: int) -> list[dict[str, Any]]:
        if not self._echoed[index] and not self._with_token_ids:
            return []
        ids = {"prompt_token_ids": self._prompts[index], "token_ids": []} if self._with_token_ids else {}
        return [self._choice(index, self._echoed[index], None, ids)]

    def chunk(self, index: int, delta: GenerationDelta) -> list[dict[str, Any]]:
        text, reason = delta["text"], delta["finish_reason"]
        self._texts[index].append(text)
        self._reasons[index] = reason
        more: dict[str, Any] = {}
        if self._with_token_ids:
            self._token_ids[index] += delta["token_ids"]
            more["token_ids"] = delta["token_ids"]
        if delta["logprobs"]:
            more["logprobs"] = self._logprobs[index].add(delta["token_ids"], delta["logprobs"])
        return [self._choice(index, text, reason, more)] if text or reason or more else []

    def whole(self, index: int) -> dict[str, Any]:
        ids = {"prompt_token_ids": self._prompts[index], "token_ids": self._token_ids[index]}
        more: dict[str, Any] = ids if self._with_token_ids else {}
        if self._logprobs[index].whole["tokens"]:
            more = {**more, "logprobs": self._logprobs[index].whole}
        return self._choice(index, "".join(self._texts[index]), self._reasons[index], more)

    def _choice(self, index: int, text: str, reason: str | None, more: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, **more}
