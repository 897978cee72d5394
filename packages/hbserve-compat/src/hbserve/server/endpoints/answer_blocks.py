"""An answer as a sequence of blocks (reasoning, text, and calls), as APIs newer than chat completions have it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from hbserve.results import GenerationDelta
from hbserve.server.answers.answers import News
from hbserve.server.answers.text_logprobs import TextLogprobs
from hbserve.server.chat.message_parts import MessageParts
from hbserve.server.chat.reasoning import ReasoningSplit


@dataclass
class Block:
    """One block of an answer."""

    kind: Literal["reasoning", "text", "call"]
    index: int
    call_id: str = ""
    name: str = ""
    """Name of the tool that a call's block calls; its text is the arguments."""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Log-probabilities of a text's tokens, if they are wanted, in the format of chats."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


Change = tuple[Literal["begins", "grows", "ends"], Block, str]
"""An event of a block, and the text by which it grows."""


class BlockFormat:
    """Reads one answer into blocks, and counts its tokens. A subclass makes events of that."""

    def __init__(self, head: dict[str, Any], prompt: tuple[int, ...], parts: MessageParts) -> None:
        self._head = head
        self._parts = parts
        self._num_prompt = len(prompt)
        self._num_output = self._num_cached = self._num_reasoning = 0
        self._blocks: list[Block] = []
        self._reason: str | None = None
        """Why the answer ended, in the words of chat completions; None until then."""
        self._stop_reason: str | int | None = None
        self._text_logprobs = TextLogprobs()

    def _entries(self, delta: GenerationDelta) -> list[dict[str, Any]]:
        """Return the log-probabilities of each token, if they are wanted. A subclass may override this."""
        return []

    def _events(self, change: Change) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _sent(self, events: list[dict[str, Any]]) -> bytes:
        named = [(each["type"].encode(), msgspec.json.encode(each)) for each in events]
        return b"".join([b"event: " + name + b"\ndata: " + content + b"\n\n" for name, content in named])

    def chunks(self, news: News) -> bytes:
        """Return the events for new pieces of the answer."""
        changes = [change for _, delta in news for change in self._changes(delta)]
        return self._sent([event for change in changes for event in self._events(change)])

    def take(self, news: News) -> None:
        """Keep new pieces for `whole`. Replaces `chunks` for a client that wants the answer in one piece."""
        for _, delta in news:
            for _ in self._changes(delta):
                pass

    def _changes(self, delta: GenerationDelta) -> Iterator[Change]:
        reason = delta["finish_reason"]
        found = self._parts.feed(delta["text"], final=reason is not None)
        pieces = [piece for each in found for piece in _pieces(each)]
        told = [(kind, text) for kind, text, _ in pieces]
        logprobs = self._text_logprobs.feed(self._entries(delta), told, final=reason is not None)
        for kind, text, call in pieces:
            if not self._blocks or self._blocks[-1].kind != kind or "id" in call:
                if self._blocks:
                    yield "ends", self._blocks[-1], ""
                name = call["function"]["name"] if call else ""
                self._blocks.append(Block(kind, len(self._blocks), call.get("id", ""), name))
                yield "begins", self._blocks[-1], ""
            if kind == "text":
                self._blocks[-1].logprobs += logprobs
                logprobs = []
            if text:
                self._blocks[-1].pieces.append(text)
                yield "grows", self._blocks[-1], text
        if logprobs and self._blocks and self._blocks[-1].kind == "text":
            self._blocks[-1].logprobs += logprobs
            yield "grows", self._blocks[-1], ""
        self._count(delta)
        if reason is not None:
            self._reason, self._stop_reason = self._parts.reason(reason), delta["stop_reason"]
            if self._blocks:
                yield "ends", self._blocks[-1], ""

    def _count(self, delta: GenerationDelta) -> None:
        self._num_output += len(delta["token_ids"])
        if isinstance(self._parts, ReasoningSplit):
            self._num_reasoning += self._parts.num_reasoning(delta["token_ids"])
        if delta["timings"] is not None:
            self._num_cached = delta["timings"]["num_cached_tokens"]


def _pieces(delta: dict[str, Any]) -> Iterator[tuple[Literal["reasoning", "text", "call"], str, dict[str, Any]]]:
    """Yield the pieces of a chat's delta: kind, text, and, for a call, the call itself, which has an id where it
    begins."""
    if "reasoning" in delta:
        yield "reasoning", delta["reasoning"], {}
    if "content" in delta:
        yield "text", delta["content"], {}
    for call in delta.get("tool_calls", []):
        yield "call", call["function"]["arguments"], call
