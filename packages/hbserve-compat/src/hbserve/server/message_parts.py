"""Parts of an assistant's message: from the text that a model writes to the fields that clients read."""

from typing import Any, Protocol


class MessageParts(Protocol):
    """A reader of one answer's text as it comes."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        """Add text; returns what is sure now, as `delta` of a chunk has it."""

    def reason(self, reason: str | None) -> str | None:
        """How the answer ended, in a client's words; None as long as it has not."""


class PlainText:
    """An answer that is text and nothing else."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        return [{"content": text}] if text else []

    def reason(self, reason: str | None) -> str | None:
        return reason


def merged(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """All deltas of an answer, as a whole message has them."""
    texts: dict[str, list[str]] = {"content": []}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for name, value in delta.items():
            if name == "tool_calls":
                _add_calls(calls, value)
            else:
                texts.setdefault(name, []).append(value)
    message: dict[str, Any] = {name: "".join(parts) for name, parts in texts.items()}
    if calls:
        message |= {"tool_calls": calls, "content": message["content"] or None}
    return message


def _add_calls(calls: list[dict[str, Any]], deltas: list[dict[str, Any]]) -> None:
    for delta in deltas:
        if delta["index"] == len(calls):
            function = dict(delta["function"])
            calls.append({"id": delta["id"], "type": "function", "function": function})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
