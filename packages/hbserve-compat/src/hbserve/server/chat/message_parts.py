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


class TagSearch:
    """Looks for a tag, or the first of several, in a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str, *tags: str, final: bool) -> tuple[str, str | None]:
        """Text before the tag that is sure, and what follows the tag, if that has come.

        What may be a tag's beginning is held until the next call, which may look for another one.
        """
        text, self._held = self._held + text, ""
        tag = min((tag for tag in tags if tag in text), key=text.index, default=None)
        if tag is not None:
            before, _, after = text.partition(tag)
            return before, after
        if final:
            return text, None
        longest = min(max(map(len, tags)) - 1, len(text))
        beginnings = (size for size in range(longest, 0, -1) if any(tag.startswith(text[-size:]) for tag in tags))
        kept = next(beginnings, 0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], None


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
            calls.append({"id": delta["id"], "type": "function", "function": dict(delta["function"])})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
