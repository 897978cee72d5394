"""Text from tokens as they come, and stop strings in it: used wherever text is made."""

from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, proxy

from hbserve.text.stop_strings import StopStrings
from hbserve.text.token_text import NoText, TokenDecoder, TokenText

_decoders: "WeakKeyDictionary[Any, tuple[int, TokenDecoder]]" = WeakKeyDictionary()
"""For each tokenizer, while it lives: with the size that it had, because tokens may be added to it."""


def decoder_of(tokenizer: Any) -> TokenDecoder:
    """The decoder of a tokenizer, made once."""
    size, decoder = _decoders.get(tokenizer, (None, None))
    if decoder is None or size != len(tokenizer):
        # Not the tokenizer itself: what a value holds, its key's weak reference does not let go.
        decoder = TokenDecoder(proxy(tokenizer))
        _decoders[tokenizer] = (len(tokenizer), decoder)
    return decoder


class Detokenizer:
    """One request's text: what `tokenizer.decode` makes of its tokens, up to the first stop string, or including it.

    Text is given out as soon as it is final: no half characters, and no beginning of what may become a stop string.
    Stop strings are searched in the text with its special tokens, even if these are skipped: a stop string may be one
    of them.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        include_stop_str_in_output: bool = False,
    ) -> None:
        """`tokenizer` is None if there is none: then all text is "", and there may be no stop strings.

        shown_ids: special tokens that are not skipped.
        min_tokens: no stop string is searched in the text of the first `min_tokens` tokens.
        """
        decoder = None if tokenizer is None else decoder_of(tokenizer)
        self._tokenizer = tokenizer
        """The decoder does not keep it alive."""
        self._skipped = decoder.special_ids if decoder is not None and skip_special_tokens else frozenset()
        if shown_ids:  # most texts share one set
            self._skipped -= shown_ids
        self._shown: TokenText = NoText() if decoder is None else decoder.text()
        self._searched = decoder.text() if decoder is not None and stop and self._skipped else None
        """The text with special tokens, if it differs from the one that is shown."""
        self._stop = StopStrings(stop) if stop else None
        self._min_tokens = min_tokens
        self._includes_stop = include_stop_str_in_output
        self._held: deque[tuple[int, str]] = deque()
        """For tokens whose text may belong to a stop string: its length in the searched text, and what is to be
        shown."""
        self._num_held = 0
        """Sum of these lengths."""
        self._parts: list[str] = []
        self.token_ids: list[int] = []
        """Up to the one that completed a stop string."""
        self.stop_string: str | None = None
        """The one that was found."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: then no more text comes."""
        return self.stop_string is not None

    @property
    def text(self) -> str:
        """All text that was given out."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def feed(self, token_ids: Sequence[int], *, final: bool = False) -> str:
        """Add tokens; returns the text that is final now. With `final` everything that was held back is given out."""
        if self._stop is not None:
            new = self._feed_searched(self._stop, token_ids, final=final)
        else:
            self.token_ids += token_ids
            if len(token_ids) == 1 and not final:  # the common case
                new = "" if token_ids[0] in self._skipped else self._shown.feed(token_ids[0])
            else:
                shown = [self._shown.feed(token_id) for token_id in token_ids if token_id not in self._skipped]
                new = "".join(shown) + (self._shown.finish() if final else "")
        self._parts.append(new)
        return new

    def _feed_searched(self, stop: StopStrings, token_ids: Sequence[int], *, final: bool) -> str:
        sure: list[str] = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.token_ids.append(token_id)
            shown = "" if token_id in self._skipped else self._shown.feed(token_id)
            sure += self._take(stop, shown if self._searched is None else self._searched.feed(token_id), shown)
        if final and not self.stopped:
            shown = self._shown.finish()
            sure += self._take(stop, shown if self._searched is None else self._searched.finish(), shown)
            if not self.stopped:
                sure += self._release(self._num_held)
        return "".join(sure)

    def _take(self, stop: StopStrings, searched: str, shown: str) -> list[str]:
        if len(self.token_ids) <= self._min_tokens:
            return [shown]
        self._held.append((len(searched), shown))
        self._num_held += len(searched)
        num_behind = stop.feed(searched)
        self.stop_string = stop.found
        if self._includes_stop:  # nothing needs to wait for what it may become
            num_behind -= num_behind if stop.found is None else len(stop.found)
        return self._release(self._num_held - num_behind)

    def _release(self, num_searched: int) -> list[str]:
        """What is to be shown for the first `num_searched` characters that are held; they are not held any more."""
        self._num_held -= num_searched
        released = []
        while self._held and self._held[0][0] <= num_searched:
            length, shown = self._held.popleft()
            num_searched -= length
            released.append(shown)
        if self._held and num_searched:
            # Where both texts are not the same, what is before a token is: its own text ends both.
            length, shown = self._held[0]
            rest = length - num_searched
            first = max(0, len(shown) - rest)
            released.append(shown[:first])
            self._held[0] = rest, shown[first:]
        return released
