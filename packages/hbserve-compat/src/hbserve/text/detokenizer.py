"""Detokenizer: makes text of tokens as they come, and finds stop strings in it. Used wherever text is made."""

from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, proxy

from hbserve.text.stop_strings import StopStrings
from hbserve.text.token_text import NoText, TokenDecoder, TokenText

_decoders: "WeakKeyDictionary[Any, tuple[int, TokenDecoder]]" = WeakKeyDictionary()
"""Decoder of each living tokenizer, with the size that the tokenizer had, because tokens may be added to it."""


def decoder_of(tokenizer: Any) -> TokenDecoder:
    """Return the decoder of a tokenizer, which is made only once."""
    size, decoder = _decoders.get(tokenizer, (None, None))
    if decoder is None or size != len(tokenizer):
        # A proxy, because a value that held its own key would keep the tokenizer alive for ever.
        decoder = TokenDecoder(proxy(tokenizer))
        _decoders[tokenizer] = (len(tokenizer), decoder)
    return decoder


class Detokenizer:
    """Makes one request's text: what `tokenizer.decode` makes of its tokens, up to or including the first stop string.

    Text is returned as soon as it is final: no half characters, and no beginning of what may become a stop string. Stop
    strings are searched in the text with its special tokens, even if these are skipped, because a stop string may be
    one of them.
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
        """Begin the text of a request. If `tokenizer` is None, all text is "", and there must be no stop strings.

        shown_ids: special tokens that are not skipped.
        min_tokens: stop strings are not searched in the text of the first `min_tokens` tokens.
        """
        decoder = None if tokenizer is None else decoder_of(tokenizer)
        self._tokenizer = tokenizer
        """Reference that keeps the tokenizer alive, which the decoder does not do."""
        self._skipped = decoder.special_ids if decoder is not None and skip_special_tokens else frozenset()
        if shown_ids:  # most texts share one set
            self._skipped -= shown_ids
        self._shown: TokenText = NoText() if decoder is None else decoder.text()
        self._searched = decoder.text() if decoder is not None and stop and self._skipped else None
        """The text with special tokens, in which stop strings are searched; None if it is the same as `_shown`."""
        self._stop = StopStrings(stop) if stop else None
        self._min_tokens = min_tokens
        self._includes_stop = include_stop_str_in_output
        self._held: deque[tuple[int, str]] = deque()
        """Tokens whose text may belong to a stop string: for each, the length of its searched text, and the text that
        is to be shown."""
        self._num_held = 0
        """Sum of the lengths in `_held`."""
        self._parts: list[str] = []
        self.token_ids: list[int] = []
        """Token ids up to the one that completed a stop string."""
        self.stop_string: str | None = None
        """The stop string that was found; None: none so far."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, after which no more text comes."""
        return self.stop_string is not None

    @property
    def text(self) -> str:
        """All text that was returned so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def feed(self, token_ids: Sequence[int], *, final: bool = False) -> str:
        """Add tokens, and return the text that is final now. `final`: also return everything that was held back."""
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
        if self._includes_stop:  # a stop string is shown too, so nothing needs to wait for whether it becomes one
            num_behind -= num_behind if stop.found is None else len(stop.found)
        return self._release(self._num_held - num_behind)

    def _release(self, num_searched: int) -> list[str]:
        """Release the first `num_searched` characters that are held. Returns what is to be shown for them."""
        self._num_held -= num_searched
        released = []
        while self._held and self._held[0][0] <= num_searched:
            length, shown = self._held.popleft()
            num_searched -= length
            released.append(shown)
        if self._held and num_searched:
            # The two texts of one token may differ in what is before it. Its own text is at the end of both.
            length, shown = self._held[0]
            rest = length - num_searched
            first = max(0, len(shown) - rest)
            released.append(shown[:first])
            self._held[0] = rest, shown[first:]
        return released
