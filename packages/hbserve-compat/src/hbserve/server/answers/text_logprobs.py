"""Log-probabilities of those tokens that an answer's text is made of, among its reasoning and its calls."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any


class TextLogprobs:
    """Takes what is known of each token, and the pieces that are read of them, which may come later than they."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        """Log-probabilities of tokens of which nothing has been read yet."""

    def feed(
        self, entries: list[dict[str, Any]], pieces: Sequence[tuple[str, str]], *, final: bool
    ) -> list[dict[str, Any]]:
        """Entries, as a chat has them, of the text among some more pieces, each of which is its kind and its text.

        Where a token's spelling is, and that of what was read, says which it is: a tag between reasoning and text is
        neither. Tokens after the last text, such as one that ends the sequence, are the text's too.
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
    """The first token that has some of a text, and the first one behind it. All of them, if it is spelt otherwise."""
    ends = list(accumulate(len(each["bytes"]) for each in entries))
    begin = b"".join(bytes(each["bytes"]) for each in entries).find(text)
    if begin < 0:
        return 0, len(entries)
    first = sum(each <= begin for each in ends)
    return first, 1 + sum(each < begin + len(text) for each in ends)
