"""Parts of an assistant's message: from the text that a model writes to the fields that clients read."""

from typing import Any, Protocol


class MessageParts(Protocol):
    """Reader of one answer's text as it comes."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        """Add text, and return what is certain now, each as the `delta` of a chunk."""

    def reason(self, reason: str | None) -> str | None:
        """Return the finish reason that clients see, for the one that the answer has; None as long as it has none. All
        text has been fed before."""


class PlainText:
    """Reader of an answer that is nothing but text."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        return [{"content": text}] if text else []

    def reason(self, reason: str | None) -> str | None:
        return reason


class TagSearch:
    """Search for a tag, or the first of several, in a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str, *tags: str, final: bool) -> tuple[str, str | None]:
        """Add text. Return the text that is certainly before the tag, and the text behind the tag if that has come.

        A possible beginning of a tag is kept until the next call, which may search for another tag.
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
    """Merge all deltas of an answer into one message."""
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
