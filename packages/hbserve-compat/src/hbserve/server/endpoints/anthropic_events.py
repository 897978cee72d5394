"""Answers of /v1/messages: a whole message, or its events in their order."""

from typing import Any

import msgspec

from hbserve.server.endpoints.answer_blocks import Block, BlockFormat, Change
from hbserve.server.http.api_error import ApiError

GROWTH = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
"""Type of the delta by which each kind of block grows, and the delta's field with the text."""
REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessageFormat(BlockFormat):
    """The format of one message."""

    def opening(self) -> bytes:
        """Return the event that is sent with the status line."""
        return self._sent([{"type": "message_start", "message": self._message([], None)}])

    def closing(self) -> bytes:
        """Return the events that say how the message has ended."""
        delta = {"stop_reason": self._stopped_by(), "stop_sequence": self._stop_sequence()}
        return self._sent([{"type": "message_delta", "delta": delta, "usage": self._usage()}, {"type": "message_stop"}])

    def failed(self, error: ApiError) -> bytes:
        """Return the event that says why the message has failed."""
        return self._sent([error.anthropic_body(self._head["id"].removeprefix("msg_"))])

    def whole(self) -> dict[str, Any]:
        """Return the whole message, which has ended."""
        return self._message([_whole(block) for block in self._blocks], self._stopped_by())

    def _message(self, content: list[dict[str, Any]], stop_reason: str | None) -> dict[str, Any]:
        return {
            "id": self._head["id"],
            "type": "message",
            "role": "assistant",
            "model": self._head["model"],
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": self._stop_sequence(),
            "usage": self._usage(),
        }

    def _stopped_by(self) -> str:
        return "stop_sequence" if self._stop_sequence() else REASONS.get(self._reason or "", "end_turn")

    def _stop_sequence(self) -> str | None:
        return self._stop_reason if isinstance(self._stop_reason, str) else None

    def _usage(self) -> dict[str, Any]:
        """Return the number of tokens so far. Cached ones are counted apart, and known only at the end."""
        return {
            "input_tokens": self._num_prompt - self._num_cached,
            "cache_read_input_tokens": self._num_cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self._num_output,
            "output_tokens_details": {"thinking_tokens": self._num_reasoning},
        }

    def _events(self, change: Change) -> list[dict[str, Any]]:
        happens, block, new = change
        if happens == "begins":
            return [{"type": "content_block_start", "index": block.index, "content_block": _begun(block)}]
        if happens == "ends":
            return [{"type": "content_block_stop", "index": block.index}]
        kind, name = GROWTH[block.kind]
        return [{"type": "content_block_delta", "index": block.index, "delta": {"type": kind, name: new}}]


def _begun(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": "", "citations": None}


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return _begun(block) | {"input": _input(block.text)}
    return _begun(block) | {"thinking" if block.kind == "reasoning" else "text": block.text}


def _input(arguments: str) -> dict[str, Any]:
    """Decode the arguments of a call. If the model did not write the JSON object that clients expect, put its text into
    one."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}
