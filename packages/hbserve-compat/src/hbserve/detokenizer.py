"""Text from tokens as they come, and stop strings in it."""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


INCOMPLETE = "�"
"""What decoding yields for a character of which some bytes are still to come."""


class Detokenizer:
    """One request's text. Never emits half a character, nor the beginning of what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._skip_special_tokens = skip_special_tokens
        self.token_ids: list[int] = []
        self.text = ""
        """All that was emitted."""
        self.stopped = False
        """A stop string has come; nothing is emitted any more."""
        self._held = ""
        # tokens [0, start) are emitted; [start, read) are emitted too, but decide how the next ones are spelt
        self._start = self._read = 0

    def feed(self, token_ids: Sequence[int], *, final: bool = False) -> str:
        """Add tokens; returns the text that is sure now. `final` brings out everything that was held back."""
        for token_id in token_ids:
            if not self.stopped:
                self.token_ids.append(token_id)
                self._held += self._decode_next(final=False)
                self._find_stop()
        if final and not self.stopped:
            self._held += self._decode_next(final=True)
            self._find_stop()
        sure = self._held if final or self.stopped else self._held[: len(self._held) - self._num_doubtful()]
        self._held = self._held[len(sure) :]
        self.text += sure
        return sure

    def _decode_next(self, *, final: bool) -> str:
        before = self._decode(self.token_ids[self._start : self._read])
        after = self._decode(self.token_ids[self._start :])
        if after.endswith(INCOMPLETE) and not final:
            return ""
        self._start, self._read = self._read, len(self.token_ids)
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens) if token_ids else ""

    def _find_stop(self) -> None:
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self._held = self._held[: min(places)]
            self.stopped = True

    def _num_doubtful(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
