"""Text of tokens as they come. All of it together is what the tokenizer makes of all tokens at once.

That is not the sum of what it makes of each: a character's bytes may be in several tokens, and decoders strip the space
at the beginning. Nor is the text of some tokens always the beginning of that of more, so what is not sure is held back.
"""

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

INCOMPLETE = "�"
"""What decoding yields for bytes that are no character, or the beginning of one."""
_MOST_HELD = 16
"""Tokens of a tokenizer about which nothing is known: a character has no more."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenText(Protocol):
    """The text of one sequence of tokens."""

    def feed(self, token_id: int) -> str:
        """Add a token; returns the text that is sure now."""

    def finish(self) -> str:
        """The text that was held back. Nothing is added afterwards."""


class NoText:
    """The text of tokens whose tokenizer is not there: none."""

    def feed(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class TokenDecoder:
    """What is to be known of a tokenizer to decode its tokens as they come."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        """Tokens that are left out where special tokens are skipped."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = getattr(getattr(backend, "decoder", None), "__getstate__", lambda: None)()
        parts = _decoder_parts(json.loads(state)) if isinstance(state, bytes) else []
        self._is_byte_level = parts == ["ByteLevel"]
        self._falls_back_to_bytes = "ByteFallback" in parts
        self._is_known = backend is not None and "ByteLevel" not in parts
        self._cleans_up = _cleans_up(tokenizer, backend)
        self._bytes: dict[int, bytes] = {}
        self.whole: dict[int, str | None] = {}
        """What `whole_text` has found."""

    def text(self) -> TokenText:
        """The text of a new sequence."""
        made: TokenText = _ByteText(self) if self._is_byte_level else _WindowText(self)
        return _CleanText(made, self._tokenizer.clean_up_tokenization) if self._cleans_up else made

    def whole_text(self, token_id: int) -> str | None:
        """The text of a byte-level token, if its bytes are whole characters; else None."""
        if token_id not in self.whole:
            try:
                self.whole[token_id] = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                self.whole[token_id] = None
        return self.whole[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a byte-level token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = _bytes_of(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        return found

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token alone, of any tokenizer: they need not be whole characters."""
        return self.token_bytes(token_id) if self._is_byte_level else self.decode([token_id]).encode()

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def knows(self, token_id: int) -> bool:
        """Whether it has any text. Models are often padded to more tokens than their tokenizers have."""
        return self._tokenizer.convert_ids_to_tokens(token_id) is not None

    def is_open(self, held: list[int], decode: Callable[[], str]) -> bool:
        """Whether the text of tokens may still change, of which only the last is new. `decode` makes it."""
        if self._falls_back_to_bytes:
            # A run of such tokens is characters only if all of it is: nothing is sure before its end.
            return _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(held[-1])) is not None
        return not self._is_known and len(held) < _MOST_HELD and decode().endswith(INCOMPLETE)


def _decoder_parts(state: dict[str, Any]) -> list[str]:
    if state["type"] == "Sequence":
        return [part for each in state["decoders"] for part in _decoder_parts(each)]
    return [state["type"]]


def _cleans_up(tokenizer: Any, backend: Any) -> bool:
    """Whether decoding ends with transformers' own removal of spaces. With BPE it does so only if it is forced to."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return forced or type(getattr(backend, "model", None)).__name__ != "BPE"


class _ByteText:
    """Text of a byte-level tokenizer, whose tokens are bytes one after the other."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self._of_tokens = decoder
        self._whole = decoder.whole
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_open = False
        """Whether the beginning of a character is held."""

    def feed(self, token_id: int) -> str:
        if not self._is_open:
            whole = self._whole.get(token_id) or self._of_tokens.whole_text(token_id)
            if whole is not None:
                return whole
        text = self._decoder.decode(self._of_tokens.token_bytes(token_id))
        self._is_open = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowText:
    """Text of other tokenizers: decodes the tokens since the last one whose text was sure, after that one."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._context: list[int] = []
        """Tokens whose text was given out. They decide how the next ones are spelt, so they must show something: a
        space is stripped where nothing is before it."""
        self._context_text = ""
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        if not self._decoder.knows(token_id):
            return ""
        self._held.append(token_id)
        return "" if self._decoder.is_open(self._held, self._decode_all) else self.finish()

    def finish(self) -> str:
        if not self._held:
            return ""
        new = self._decode_all()[len(self._context_text) :]
        # Few tokens, so that time is linear, but not so few that they show nothing.
        for context in (self._held, [*self._context[-1:], *self._held], [*self._context, *self._held]):
            if text := self._decoder.decode(context):
                break
        self._context, self._context_text, self._held = context, text, []
        return new

    def _decode_all(self) -> str:
        return self._decoder.decode([*self._context, *self._held])


class _CleanText:
    """Text of tokenizers with `clean_up_tokenization_spaces`, which removes spaces before marks in the whole text."""

    # Before a space between a letter or digit and another: nothing that is removed or changed reaches across.
    _BORDER = re.compile(r"(?<=[^\W_])(?= [^\W_])")

    def __init__(self, text: TokenText, clean: Callable[[str], str]) -> None:
        self._text = text
        self._clean = clean
        self._held = ""

    def feed(self, token_id: int) -> str:
        new = self._text.feed(token_id)
        first = len(self._held)
        self._held += new
        borders = [match.start() for match in self._BORDER.finditer(self._held, max(0, first - 2))]
        sure = self._held[: borders[-1]] if borders else ""
        self._held = self._held[len(sure) :]
        return self._clean(sure)

    def finish(self) -> str:
        held, self._held = self._held + self._text.finish(), ""
        return self._clean(held)


def _byte_symbols() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with: GPT-2's, those that can be printed as they are."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_SYMBOLS = _byte_symbols()


def _bytes_of(token: str) -> bytes:
    """A token that is not written with these symbols alone, such as an added one, is text as it stands."""
    symbols = [_BYTE_SYMBOLS.get(character) for character in token]
    known = [byte for byte in symbols if byte is not None]
    return bytes(known) if len(known) == len(symbols) else token.encode(errors="replace")
