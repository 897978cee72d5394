"""Tokens that end a sequence according to the files of a model folder.

config.json, generation_config.json and the tokenizer may each name one or several tokens, and often different ones: a
chat fine-tune may have its end-of-turn token in any of the three. All of them count.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hbserve_core.errors import BrokenTokenizer, UnsupportedModel

T = TypeVar("T", bound=msgspec.Struct)


def end_token_ids(
    folder: Path, raw: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """Return the ids of all tokens that end a sequence.

    `raw` is the content of config.json, `generation` that of generation_config.json, or {} if there is none.

    Ids for which the model has no logit are left out: older files have -1, and tokenizers may have more tokens.

    Raises:
        UnsupportedModel: an eos_token_id is not an integer.
        BrokenTokenizer: a tokenizer file cannot be read, or is not JSON.
    """
    found: list[int] = []
    for source in (generation, raw):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise UnsupportedModel(f"{folder}: eos_token_id={value!r}, expected an integer or a list of them")
        found += ids
    token_id = _tokenizer_end(folder)
    if token_id is not None:
        found.append(token_id)
    return tuple(token_id for token_id in dict.fromkeys(found) if 0 <= token_id < vocab_size)


# Parts of the tokenizer's files that are needed. The files are large: what has no field here is skipped, not kept.


class _Token(msgspec.Struct):
    content: str
    id: int = -1


class _TokenizerConfig(msgspec.Struct):
    """Part of tokenizer_config.json, and of special_tokens_map.json, that is read."""

    eos_token: str | _Token | msgspec.UnsetType | None = msgspec.UNSET
    added_tokens_decoder: dict[int, _Token] | None = None


class _Model(msgspec.Struct):
    vocab: msgspec.Raw = msgspec.Raw(b"{}")
    """Ids by token; in a Unigram model, pairs of token and score in the order of their ids."""


class _Tokenizer(msgspec.Struct):
    """Part of tokenizer.json that is read."""

    added_tokens: list[_Token] = []
    model: _Model = msgspec.field(default_factory=_Model)


def _tokenizer_end(folder: Path) -> int | None:
    """Return the id of the tokenizer's own end-of-sequence token, or None if it has none or its files do not say the
    id."""
    config = _read(folder / "tokenizer_config.json", _TokenizerConfig)
    end = config.eos_token
    if config.added_tokens_decoder is None:
        # These are files of older versions of transformers, in which special_tokens_map.json counts where it has the
        # key.
        older = _read(folder / "special_tokens_map.json", _TokenizerConfig).eos_token
        end = end if older is msgspec.UNSET else older
    if end is None or isinstance(end, msgspec.UnsetType):
        return None
    text = end if isinstance(end, str) else end.content
    tokenizer = _read(folder / "tokenizer.json", _Tokenizer)
    for token in tokenizer.added_tokens:
        if token.content == text:
            return token.id
    for token_id, token in (config.added_tokens_decoder or {}).items():
        if token.content == text:
            return token_id
    return _id_in(folder, tokenizer.model.vocab, text)


def _id_in(folder: Path, vocab: msgspec.Raw, text: str) -> int | None:
    try:
        tokens = msgspec.json.decode(vocab, type=dict[str, int] | list[tuple[str, float]])
    except ValueError as error:
        raise BrokenTokenizer(f"{folder}: its tokenizer cannot be read: tokenizer.json: vocab: {error}") from error
    if isinstance(tokens, dict):
        return tokens.get(text)
    return next((token_id for token_id, (token, _) in enumerate(tokens) if token == text), None)


def _read(path: Path, kind: type[T]) -> T:
    try:
        content = path.read_bytes()
        if kind is _TokenizerConfig:  # Python writes it, and Python's JSON may contain Infinity
            return msgspec.convert(json.loads(content), kind, str_keys=True)
        return msgspec.json.decode(content, type=kind)
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenTokenizer(f"{path.parent}: its tokenizer cannot be read: {path.name}: {error}") from error
