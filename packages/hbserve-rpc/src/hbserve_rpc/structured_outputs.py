"""Grammar that a request's answer must follow: a JSON schema, a regular expression, choices, or a grammar itself."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from hbserve_rpc.errors import InvalidRequest
from hbserve_rpc.plain_values import plain_bool, plain_items, plain_text, shown

MAX_GRAMMAR_BYTES = 65536
"""Largest size in UTF-8 bytes of a schema, regular expression, grammar or all choices. It also bounds how deep a
compiler's recursion goes."""
MAX_SCHEMA_DEPTH = 256
"""Largest nesting of objects and lists. Otherwise Python's own limit would decide, which differs between versions."""
MAX_CHOICES = 1024


class StructuredOutputsParams(msgspec.Struct, frozen=True):
    """Form that an answer must have, given by exactly one of the fields. Names are vLLM's. It never changes.

    Raises:
        InvalidRequest: (a ValueError) no field is given, or several, or one with a wrong value; names it.
    """

    json: str | dict[str, Any] | None = None
    """JSON schema against which the answer validates, given as a dict or as JSON text; it is kept as JSON text."""
    regex: str | None = None
    """Regular expression that the whole answer matches. It has no look-around and no back-references."""
    choice: Sequence[str] | None = None
    """Texts of which the answer is one."""
    grammar: str | None = None
    """Grammar of the answer: Lark with llguidance's extensions, where the answer is a `start`, or llama.cpp's GBNF,
    where it is a `root`."""
    json_object: bool | None = None
    """Whether the answer is any JSON object. False counts as not given."""

    def __post_init__(self) -> None:
        given = {"json_object": plain_bool("structured_outputs.json_object", self.json_object or False)}
        given |= {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        named = [name for name, value in given.items() if value is not False]
        if len(named) != 1:
            expected = f"exactly one of {', '.join(self.__struct_fields__)}"
            raise InvalidRequest(f"structured_outputs: has {', '.join(sorted(named)) or 'none'}; expected {expected}")
        for name, plain in _PLAIN.items():
            value = plain(f"structured_outputs.{name}", given[name]) if name in given else None
            msgspec.structs.force_setattr(self, name, value)
        msgspec.structs.force_setattr(self, "json_object", given["json_object"] or None)

    @property
    def kind(self) -> str:
        """Name of the field that is given."""
        return next(name for name in self.__struct_fields__ if getattr(self, name) is not None)


def plain_structured_outputs(value: object) -> StructuredOutputsParams | None:
    """Convert a value that callers may give: StructuredOutputsParams, a mapping of its fields, or None.

    Raises InvalidRequest for any other value.
    """
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"structured_outputs={shown(value)}: expected StructuredOutputsParams, or a dict")
    fields = StructuredOutputsParams.__struct_fields__
    # A mapping may be large, or never end.
    given = {name: each for name, each in islice(value.items(), 64) if each is not None}
    if unknown := [name for name in given if name not in fields]:
        raise InvalidRequest(f"structured_outputs: {shown(unknown[0])} is not served; expected {', '.join(fields)}")
    return StructuredOutputsParams(**given)


def _plain_schema(name: str, value: object) -> str:
    """Return a schema as JSON, in its own order, because the answer's properties come in that order."""
    if isinstance(value, Mapping):
        try:
            value = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name}: is not a JSON schema: {error}") from None
    text = _plain_bounded(name, value)
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{name}: is not a JSON schema: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{name}={shown(text)}: expected a JSON schema, which is an object")
    _require_shallow(name, schema)
    return text


def _require_shallow(name: str, schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in inner for value in values]
        if not level:
            return
    raise InvalidRequest(f"{name}: is not a JSON schema: nested more than {MAX_SCHEMA_DEPTH} deep")


def _plain_bounded(name: str, value: object) -> str:
    text = plain_text(name, value)
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{name}: is longer than {MAX_GRAMMAR_BYTES} bytes")
    return text


def _plain_choices(name: str, value: object) -> tuple[str, ...]:
    expected = f"a list of 1 to {MAX_CHOICES} strings"
    choices = plain_items(name, value, expected, MAX_CHOICES)
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"{name}={shown(choices)}: expected {expected}")
    plain = tuple(plain_text(f"{name}[{place}]", each) for place, each in enumerate(choices))
    _plain_bounded(name, "".join(plain))
    return plain


_PLAIN = {"json": _plain_schema, "regex": _plain_bounded, "choice": _plain_choices, "grammar": _plain_bounded}
