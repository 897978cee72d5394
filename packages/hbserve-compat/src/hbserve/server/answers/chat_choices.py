"""The choices of an answer of /v1/chat/completions."""

from collections.abc import Callable
from typing import Any

from hbserve.results import GenerationDelta
from hbserve.server.answers.logprobs import TokenNames, of_chat, of_prompt
from hbserve.server.chat.message_parts import MessageParts, PlainText, merged
from hbserve.server.chat.reasoning import ReasoningSplit


class ChatChoices:
    """Messages of the assistant. `MessageParts` splits each text into content, reasoning and tool calls."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self,
        names: TokenNames,
        prompt: tuple[int, ...],
        num_choices: int,
        make_parts: Callable[[], MessageParts],
        *,
        with_token_ids: bool,
        num_top_logprobs: int,
    ) -> None:
        self._names = names
        self._num_top_logprobs = num_top_logprobs
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(num_choices)]
        self._prompt = prompt
        self._with_token_ids = with_token_ids
        self._parts = [make_parts() for _ in range(num_choices)]
        self._deltas: list[list[dict[str, Any]]] = [[] for _ in range(num_choices)]
        self._token_ids: list[list[int]] = [[] for _ in range(num_choices)]
        self._reasons: list[str | None] = [None] * num_choices
        self._stop_reasons: list[str | int | None] = [None] * num_choices
        self._num_reasoning = [0] * num_choices

    def opening(self, index: int) -> list[dict[str, Any]]:
        more = {"prompt_token_ids": self._prompt, "token_ids": []} if self._with_token_ids else {}
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, more)]

    def chunk(self, index: int, delta: GenerationDelta) -> list[dict[str, Any]]:
        parts = self._parts[index]
        found = parts.feed(delta["text"], final=delta["finish_reason"] is not None)
        self._deltas[index] += found
        self._reasons[index] = reason = parts.reason(delta["finish_reason"])
        more: dict[str, Any] = {}
        if reason:
            self._stop_reasons[index] = more["stop_reason"] = delta["stop_reason"]
        if self._with_token_ids:
            self._token_ids[index] += delta["token_ids"]
            more["token_ids"] = delta["token_ids"]
        if delta["logprobs"]:
            new = of_chat(self._names, delta["token_ids"], delta["logprobs"], self._num_top_logprobs)
            self._logprobs[index] += new
            more["logprobs"] = {"content": new}
        if isinstance(parts, ReasoningSplit):
            self._num_reasoning[index] += parts.num_reasoning(delta["token_ids"])
        if not found and (reason or more or delta["prompt_logprobs"] is not None):
            found = [{}]
        last = len(found) - 1
        return [
            self._chunk(index, each, reason if place == last else None, more if place == last else {})
            for place, each in enumerate(found)
        ]

    def beside(self, index: int, delta: GenerationDelta) -> dict[str, Any]:
        found = delta["prompt_logprobs"] if index == 0 else None
        return {} if found is None else {"prompt_logprobs": of_prompt(self._names, found)}

    def num_reasoning(self) -> int | None:
        return sum(self._num_reasoning) if isinstance(self._parts[0], ReasoningSplit) else None

    def is_bare(self, index: int, delta: GenerationDelta) -> bool:
        is_plain = isinstance(self._parts[index], PlainText) and not self._with_token_ids
        has_more = delta["finish_reason"] or delta["logprobs"] or delta["prompt_logprobs"] is not None
        return is_plain and not has_more

    def bare(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, None, {})

    def whole(self, index: int) -> dict[str, Any]:
        ids = {"prompt_token_ids": self._prompt, "token_ids": self._token_ids[index]}
        more: dict[str, Any] = {"stop_reason": self._stop_reasons[index]} | (ids if self._with_token_ids else {})
        if self._logprobs[index]:
            more = {**more, "logprobs": {"content": self._logprobs[index]}}
        message = {"role": "assistant", **merged(self._deltas[index])}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": self._reasons[index], **more}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None, more: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **more}
