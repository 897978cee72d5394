"""Conversion of callers' values to plain Python, or their refusal with a message. Every entry point uses these
functions: there is no other check.

Values may be numpy's or torch's, which this package does not import: their scalars have `item()`, their arrays
`tolist()`. Whatever is returned is a new object, so that nothing that the caller changes later changes a request.

An exception of a caller's own iterator or mapping is passed on: it is the caller's error, not one about a value.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any

import msgspec

from hbserve_rpc.errors import InvalidRequest

LARGEST_INT = 2**63 - 1
"""Largest integer that every reader of the wire format can hold."""
LARGEST_TOKEN_ID = 2**31 - 1
MAX_ID_LENGTH = 256
MOST_ITEMS = 2**24
"""Largest number of items taken from an iterator: one that never ends must not fill the memory."""
LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
"""Pattern of a text in one line, without what a terminal would obey."""
Id = Annotated[str, msgspec.Meta(max_length=MAX_ID_LENGTH, pattern=LINE)]
"""Id from a peer, which logs and messages show unchanged."""
_SHOWN, _MOST_SAID = 120, 4000


def shown(value: object) -> str:
    """Return a short `repr` for any value. A message must neither fail nor fill a log."""
    try:
        text = repr(value)
    except Exception:  # an integer with more digits than Python converts, or somebody's own __repr__
        return f"<{type(value).__name__}>"
    return cut(text).encode(errors="backslashreplace").decode()  # it goes to other processes, as UTF-8


def cut(text: str) -> str:
    """Return the beginning of a text of any length, for a message."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def one_line(text: str, most: int = _MOST_SAID) -> str:
    """Return somebody else's text as one line for a log, with escapes for what a terminal would obey, and without its
    middle if it is longer than `most`."""
    if len(text) <= most and text.isprintable():
        return text
    joined = " ".join(text.split())
    if len(joined) > most:
        joined = f"{joined[: most // 2]} … {joined[-most // 2 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in joined)


def num_dimensions(value: object) -> Any:
    """Return the number of dimensions of an array of numpy or torch, or None for another value."""
    try:
        return getattr(value, "ndim", None)
    except Exception:  # somebody's own __getattr__
        return None


def plain_scalar(value: object) -> Any:
    """Return a scalar of numpy or torch as a Python one, and any other value unchanged."""
    if num_dimensions(value) != 0:
        return value
    try:
        return value.item()  # type: ignore[attr-defined]
    except Exception:  # for example a tensor without data: it is no scalar, so the caller refuses it
        return value


def plain_int(name: str, value: object, low: int, high: int = LARGEST_INT) -> int:
    """Return a plain int from `low` to `high`. Raises InvalidRequest, naming the field, the value and the range."""
    if type(value) is int and low <= value <= high:  # nearly always, and several times for each request
        return value
    value = plain_scalar(value)
    if isinstance(value, int) and not isinstance(value, bool):
        number = int.__int__(value)  # a subclass may compare differently
        if low <= number <= high:
            return number
    raise InvalidRequest(f"{name}={shown(value)}: expected an integer from {low} to {high}")


def plain_bool(name: str, value: object) -> bool:
    """Return a plain bool. Raises InvalidRequest if the value is neither True nor False, of Python, numpy or torch."""
    if type(value) is not bool:
        value = plain_scalar(value)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}={shown(value)}: expected True or False")
    return value


def plain_items(name: str, value: object, expected: str, most: int = MOST_ITEMS) -> list[Any]:
    """Return a new list of the items of a list, tuple, array or any other ordered iterable. What an iterator raises is
    passed on.

    Raises:
        InvalidRequest: the value is none of these (text, bytes, mappings and sets are not), or an iterator that does
            not end after `most` items.
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
    """Return a plain str. Raises InvalidRequest if it is no string or not Unicode text, and says at which place."""
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


def plain_id(name: str, value: object, most: int = MAX_ID_LENGTH) -> str:
    """Return a plain id. Raises InvalidRequest if it is not one line of 1 to `most` Unicode characters."""
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise InvalidRequest(f"{name}={shown(value)}: expected a string of 1 to {most} characters")
    if re.match(LINE, value) is None:
        raise InvalidRequest(f"{name}={shown(value)}: expected one line, without control characters")
    return plain_text(name, value)


def plain_token_ids(name: str, value: object, vocab_size: int = LARGEST_TOKEN_ID + 1) -> list[int]:
    """Return a new list of Python integers from a list, array or iterator of any kind of integers.

    Raises:
        InvalidRequest: an item is no token id, or not below `vocab_size`; says which, and at which place.
    """
    if isinstance(value, (list, tuple)):
        if not value:  # such as the output of a new request
            return []
        # Mostly all ids are right, and one pass outside Python's interpreter is enough.
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
    """Return the type of lists of token ids below `vocab_size`."""
    return list[Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]]


def _token_id(name: str, place: int, value: object) -> int:
    value = plain_scalar(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name}[{place}]={shown(value)}: expected a token id, an integer")
    return int.__int__(value)


def require_in_vocabulary(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest, with the first token that the model does not have and its place, if there is one."""
    if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
        place, worst = next((i, each) for i, each in enumerate(token_ids) if not 0 <= each < vocab_size)
        raise InvalidRequest(f"{name}[{place}]: token {worst} is outside the vocabulary [0, {vocab_size})")
