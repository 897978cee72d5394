"""Decoding of tokens as they come. The pieces of text together are what the tokenizer makes of all tokens at once.

That is not the concatenation of what it makes of each token: a character's bytes may be in several tokens, and decoders
strip the space at the beginning. Nor is the text of some tokens always a prefix of the text of more tokens, so text
that may still change is held back.
"""

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

INCOMPLETE = "�"
"""The character that decoding yields for bytes that are not a character, or only the beginning of one."""
_MOST_HELD = 16
"""Most tokens that are held back for a tokenizer about which nothing is known. No character has more."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenText(Protocol):
    """The text of one sequence of tokens."""

    def feed(self, token_id: int) -> str:
        """Add a token, and return the text that cannot change any more."""

    def finish(self) -> str:
        """Return the text that was held back. Nothing may be added afterwards."""


class NoText:
    """The text of tokens without a tokenizer, which is empty."""

    def feed(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class TokenDecoder:
    """The properties of a tokenizer that are needed to decode its tokens as they come."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        """Tokens that are left out when special tokens are skipped."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = getattr(getattr(backend, "decoder", None), "__getstate__", lambda: None)()
        parts = _decoder_parts(json.loads(state)) if isinstance(state, bytes) else []
        self._is_byte_level = parts == ["ByteLevel"]
        self._falls_back_to_bytes = "ByteFallback" in parts
        self._is_known = backend is not None and "ByteLevel" not in parts
        self._cleans_up = _cleans_up(tokenizer, backend)
        self._bytes: dict[int, bytes] = {}
        self.whole: dict[int, str | None] = {}
        """Cache of `whole_text`."""

    def text(self) -> TokenText:
        """Begin the text of a new sequence."""
        made: TokenText = _ByteText(self) if self._is_byte_level else _WindowText(self)
        return _CleanText(made, self._tokenizer.clean_up_tokenization) if self._cleans_up else made

    def whole_text(self, token_id: int) -> str | None:
        """Return the text of a byte-level token if its bytes are whole characters; else None."""
        if token_id not in self.whole:
            try:
                self.whole[token_id] = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                self.whole[token_id] = None
        return self.whole[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a byte-level token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = _bytes_of(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        return found

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a single token of any tokenizer. They need not be whole characters."""
        return self.token_bytes(token_id) if self._is_byte_level else self.decode([token_id]).encode()

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def knows(self, token_id: int) -> bool:
        """Whether the tokenizer has this token. Models are often padded to more tokens than their tokenizers have."""
        return self._tokenizer.convert_ids_to_tokens(token_id) is not None

    def is_open(self, held: list[int], decode: Callable[[], str]) -> bool:
        """Whether the text of held tokens, of which only the last is new, may still change. `decode` returns it."""
        if self._falls_back_to_bytes:
            # A run of byte tokens is characters only if the whole run is, so nothing is final before its end.
            return _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(held[-1])) is not None
        return not self._is_known and len(held) < _MOST_HELD and decode().endswith(INCOMPLETE)


def _decoder_parts(state: dict[str, Any]) -> list[str]:
    if state["type"] == "Sequence":
        return [part for each in state["decoders"] for part in _decoder_parts(each)]
    return [state["type"]]


def _cleans_up(tokenizer: Any, backend: Any) -> bool:
    """Whether decoding ends with transformers' own removal of spaces, which for BPE happens only if it is forced."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return forced or type(getattr(backend, "model", None)).__name__ != "BPE"


class _ByteText:
    """Text of a byte-level tokenizer, whose tokens are sequences of bytes."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self._of_tokens = decoder
        self._whole = decoder.whole
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_open = False
        """Whether the beginning of a character is held back."""

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
    """Text of other tokenizers. Decodes the tokens since the last one whose text was final, after that one."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._context: list[int] = []
        """Last tokens whose text was returned. They determine how the next ones are spelt, so their text must not be
        empty: the tokenizer strips a space if there is no text before it."""
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
        # Keep few tokens, so that time is linear, but not so few that their text is empty.
        for context in (self._held, [*self._context[-1:], *self._held], [*self._context, *self._held]):
            if text := self._decoder.decode(context):
                break
        self._context, self._context_text, self._held = context, text, []
        return new

    def _decode_all(self) -> str:
        return self._decoder.decode([*self._context, *self._held])


class _CleanText:
    """Text of tokenizers with `clean_up_tokenization_spaces`, which removes spaces before marks in the whole text."""

    # The place before a space between two letters or digits. Nothing that is removed or changed reaches across it.
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
    """Return the characters with which byte-level tokenizers write bytes: GPT-2's, which keep printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_SYMBOLS = _byte_symbols()


def _bytes_of(token: str) -> bytes:
    """Return the bytes of a token. One that has other characters than these symbols, such as an added one, is text."""
    symbols = [_BYTE_SYMBOLS.get(character) for character in token]
    known = [byte for byte in symbols if byte is not None]
    return bytes(known) if len(known) == len(symbols) else token.encode(errors="replace")
