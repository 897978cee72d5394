"""Log-probabilities of an answer's tokens, as OpenAI's two endpoints show them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hbserve.text.detokenizer import decoder_of
from hbserve.text.token_text import NoText, TokenText
from hbserve_rpc.messages import TokenLogprobs

LEAST = -9999.0
"""Log-probability in place of minus infinity, which JSON cannot express. OpenAI uses the same number."""


class TokenNames:
    """Spells single tokens, as text and as bytes. One token need not be a whole character."""

    def __init__(self, tokenizer: Any, *, as_ids: bool = False) -> None:
        """as_ids: whether tokens are named `token_id:5` and so on, by which each differs from all others."""
        self._decoder = None if tokenizer is None else decoder_of(tokenizer)
        self._as_ids = as_ids
        self.special_ids: frozenset[int] = frozenset() if self._decoder is None else self._decoder.special_ids

    def text(self) -> TokenText:
        """Begin the text of a sequence of tokens; without a tokenizer, it is empty."""
        return NoText() if self._decoder is None else self._decoder.text()

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token; without a tokenizer, those of its number."""
        return str(token_id).encode() if self._decoder is None else self._decoder.bytes_of(token_id)

    def text_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    def name_of(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self.text_of(token_id)


def of_chat(names: TokenNames, token_ids: list[int], found: list[TokenLogprobs], num_top: int) -> list[dict[str, Any]]:
    """Make `logprobs.content` of a chat, which has an entry for each token."""
    return [
        _entry(names, token_id, each[token_id])
        | {"top_logprobs": [_entry(names, *pair) for pair in islice(each.items(), num_top)]}
        for token_id, each in zip(token_ids, found, strict=True)
    ]


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    spelt = list(names.bytes_of(token_id))
    return {"token": names.name_of(token_id), "logprob": max(logprob, LEAST), "bytes": spelt}


class CompletionLogprobs:
    """`logprobs` of a completion: four lists with an element for each token.

    A token's offset is where its text begins in the text that is returned; if several tokens are one character, where
    that begins, and of a token that is not shown, where the next one's text begins.
    """

    def __init__(self, names: TokenNames, echoed: str, hidden_ids: frozenset[int] = frozenset()) -> None:
        """echoed: text before the answer; hidden_ids: tokens of the answer that are not shown."""
        self._names = names
        self._echoed = echoed
        self._hidden_ids = hidden_ids
        self._text = names.text()
        self._offset = len(echoed)
        self.whole: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _places_in_prompt(self, token_ids: Sequence[int]) -> Iterator[int]:
        text, offset = self._names.text(), 0
        for token_id in token_ids:
            yield offset
            # A special token may have been added to the prompt, which is repeated as it was sent.
            spelt = self._names.text_of(token_id) if token_id in self._names.special_ids else ""
            if self._echoed.startswith(spelt, offset):
                offset += len(text.feed(token_id))

    def _places_in_answer(self, token_ids: Sequence[int]) -> Iterator[int]:
        for token_id in token_ids:
            yield self._offset
            if token_id not in self._hidden_ids:
                self._offset += len(self._text.feed(token_id))

    def add(
        self, token_ids: list[int], found: Sequence[TokenLogprobs | None], num_prompt: int = 0
    ) -> dict[str, list[Any]]:
        """Add more tokens to `whole`, and return the lists for them alone. The first `num_prompt` are those of the
        prompt. `found` is None for the first of these, which has no log-probability."""
        offsets = [*self._places_in_prompt(token_ids[:num_prompt]), *self._places_in_answer(token_ids[num_prompt:])]
        new: dict[str, list[Any]] = {
            "tokens": [self._names.name_of(token_id) for token_id in token_ids],
            "token_logprobs": [
                None if each is None else max(each[token], LEAST) for token, each in zip(token_ids, found, strict=True)
            ],
            "top_logprobs": [None if each is None else self._by_name(each) for each in found],
            "text_offset": offsets,
        }
        for name, values in new.items():
            self.whole[name] += values
        return new

    def _by_name(self, logprobs: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for token_id, logprob in logprobs.items():  # the most likely first: of tokens with the same text, it is kept
            found.setdefault(self._names.name_of(token_id), max(logprob, LEAST))
        return found


def of_prompt(names: TokenNames, found: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """Make `prompt_logprobs` as in vLLM, but without ranks, which are not known for all of the tokens."""
    return [
        None
        if each is None
        else {
            str(token_id): {"logprob": max(logprob, LEAST), "decoded_token": names.text_of(token_id)}
            for token_id, logprob in each.items()
        }
        for each in found
    ]
