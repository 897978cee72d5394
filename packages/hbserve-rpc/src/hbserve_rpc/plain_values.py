"""Values as callers have them, made plain Python or refused in words. Every entry uses these: there is no other check.

What is given may be of numpy or torch, which this package does not import: a scalar of theirs has `item()`, an array
`tolist()`. Whatever is returned is a new object, so that nothing that the caller changes later changes a request.

What a caller's own iterator or mapping raises passes: it is the caller's error, not one about a value.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any

import msgspec

from hbserve_rpc.errors import InvalidRequest

LARGEST_INT = 2**63 - 1
"""What every reader of the wire format can hold."""
LARGEST_TOKEN_ID = 2**31 - 1
MAX_ID_LENGTH = 256
MOST_ITEMS = 2**24
"""Of an iterator: one that never ends must not fill the memory."""
_SHOWN = 120


def shown(value: object) -> str:
    """`repr`, but short, and for every value: a message must not fail, nor fill a log."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python spells; a __repr__ of somebody else
        return f"<{type(value).__name__}>"
    return cut(text).encode(errors="backslashreplace").decode()  # it goes to other processes, as UTF-8


def cut(text: str) -> str:
    """The beginning of a text that may have any length, for a message."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def num_dimensions(value: object) -> Any:
    """Of an array of numpy or torch; None: it is none."""
    try:
        return getattr(value, "ndim", None)
    except Exception:  # a __getattr__ of somebody else
        return None


def plain_scalar(value: object) -> Any:
    """A scalar of numpy or torch as Python's; everything else as it is."""
    if num_dimensions(value) != 0:
        return value
    try:
        return value.item()  # type: ignore[attr-defined]
    except Exception:  # for example a tensor without data: no scalar then, which whoever asked refuses
        return value


def plain_int(name: str, value: object, low: int, high: int = LARGEST_INT) -> int:
    """Raises InvalidRequest: names the field, the value and the range."""
    if type(value) is int and low <= value <= high:  # nearly always, and several times for each request
        return value
    value = plain_scalar(value)
    if isinstance(value, int) and not isinstance(value, bool):
        number = int.__int__(value)  # of a subclass, whose comparisons may be others
        if low <= number <= high:
            return number
    raise InvalidRequest(f"{name}={shown(value)}: expected an integer from {low} to {high}")


def plain_bool(name: str, value: object) -> bool:
    """Raises InvalidRequest: neither True nor False, of numpy or torch either."""
    if type(value) is not bool:
        value = plain_scalar(value)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}={shown(value)}: expected True or False")
    return value


def plain_items(name: str, value: object, expected: str, most: int = MOST_ITEMS) -> list[Any]:
    """A new list of what is in a list, tuple, array or any other ordered iterable. What an iterator raises passes.

    Raises:
        InvalidRequest: it is none of these, or an iterator that does not end after `most` items. Text, bytes, mappings
            and sets are none.
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    refused = InvalidRequest(f"{name}={shown(value)}: expected {expected}")
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set)):
        raise refused
    if num_dimensions(value) is not None:
        try:
            items = value.tolist()  # type: ignore[attr-defined]
        except Exception as error:
            raise refused from error
        if not isinstance(items, list):
            raise refused
        return items
    if not isinstance(value, Iterable):
        raise refused
    items = list(islice(value, most + 1))
    if len(items) > most:
        raise InvalidRequest(f"{name}={shown(value)}: expected {expected}; it has more than {most} items")
    return items


def plain_text(name: str, text: object) -> str:
    """Raises InvalidRequest: not a string, or not Unicode text; says at which place."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{name}={shown(text)}: expected a string")
    text = str.__str__(text)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name}: character {error.start} is {text[error.start]!r}, half of a surrogate pair and not Unicode text; "
            "decode it again, or replace it"
        ) from None
    return text


def plain_id(name: str, value: object) -> str:
    """Raises InvalidRequest: not a string of 1 to MAX_ID_LENGTH characters of Unicode."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID_LENGTH:
        raise InvalidRequest(f"{name}={shown(value)}: expected a string of 1 to {MAX_ID_LENGTH} characters")
    return plain_text(name, value)


def plain_token_ids(name: str, value: object, vocab_size: int = LARGEST_TOKEN_ID + 1) -> list[int]:
    """A new list of Python integers, out of a list, array or iterator of whatever integers.

    Raises:
        InvalidRequest: something in it is no token id, or none of such a vocabulary; says what, and at which place.
    """
    if isinstance(value, (list, tuple)):
        if not value:  # as the output of a request that is new
            return []
        # One pass that is not Python's over what is right, as it mostly is.
        with suppress(msgspec.ValidationError):
            ids: list[int] = msgspec.convert(value, _ids_below(vocab_size))
            return ids
    ids = plain_items(name, value, "token ids")
    if set(map(type, ids)) - {int}:
        ids = [_token_id(name, place, each) for place, each in enumerate(ids)]
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        for place, each in enumerate(ids):
            if not 0 <= each <= LARGEST_TOKEN_ID:
                raise InvalidRequest(
                    f"{name}[{place}]={shown(each)}: expected a token id, from 0 to {LARGEST_TOKEN_ID}"
                )
        require_in_vocabulary(name, ids, vocab_size)
    return ids


@lru_cache(maxsize=8)
def _ids_below(vocab_size: int) -> Any:
    """The type of token ids of such a vocabulary."""
    return list[Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]]


def _token_id(name: str, place: int, value: object) -> int:
    value = plain_scalar(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name}[{place}]={shown(value)}: expected a token id, an integer")
    return int.__int__(value)


def require_in_vocabulary(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest: names the first token that the model does not have, and its place."""
    if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
        place, worst = next((i, each) for i, each in enumerate(token_ids) if not 0 <= each < vocab_size)
        raise InvalidRequest(f"{name}[{place}]: token {worst} is outside the vocabulary [0, {vocab_size})")
