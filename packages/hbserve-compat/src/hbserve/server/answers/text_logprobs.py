"""Selection of the log-probabilities that belong to an answer's text, among those of its reasoning and its calls."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any


class TextLogprobs:
    """Matches the log-probabilities of tokens with the pieces that are read from their text, which may come later."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        """Log-probabilities of tokens whose text was not read yet."""

    def feed(
        self, entries: list[dict[str, Any]], pieces: Sequence[tuple[str, str]], *, final: bool
    ) -> list[dict[str, Any]]:
        """Take more entries, as a chat has them, and more pieces, each with its kind and its text. Returns the entries
        that belong to text.

        The position of a piece's spelling among those of the tokens determines which tokens it has. A tag between
        reasoning and text belongs to neither. Tokens after the last text, such as an end token, belong to the text.
        """
        found = self._waiting + entries
        if not found:
            return []
        text = "".join(text for kind, text in pieces if kind == "text").encode()
        ends_as_text = not pieces or pieces[-1][0] == "text"
        first, end = _place(found, text) if text else (0, 0)
        rest = found[end:] if ends_as_text else []
        self._waiting = [] if final else rest
        return found[first:end] + (rest if final else [])


def _place(entries: list[dict[str, Any]], text: bytes) -> tuple[int, int]:
    """Return the index of the first token that has some of a text, and that of the first one after it. If the tokens do
    not spell the text, returns the bounds of all of them."""
    ends = list(accumulate(len(each["bytes"]) for each in entries))
    begin = b"".join(bytes(each["bytes"]) for each in entries).find(text)
    if begin < 0:
        return 0, len(entries)
    first = sum(each <= begin for each in ends)
    return first, 1 + sum(each < begin + len(text) for each in ends)
