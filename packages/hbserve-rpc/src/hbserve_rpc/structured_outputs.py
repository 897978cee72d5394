"""A grammar that a request's answer is to follow: a JSON schema, a regular expression, choices, or a grammar itself."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from hbserve_rpc.errors import InvalidRequest
from hbserve_rpc.plain_values import plain_bool, plain_items, plain_text, shown

MAX_GRAMMAR_BYTES = 65536
"""UTF-8 bytes of a schema or whatever it is. How deep a compiler's recursion goes is bounded by it too."""
MAX_SCHEMA_DEPTH = 256
"""Of objects and lists within each other. Else Python's own limit decides, which differs between its versions."""
MAX_CHOICES = 1024


class StructuredOutputsParams(msgspec.Struct, frozen=True):
    """What an answer must be: exactly one of the fields is given. Names are vLLM's. Never changes once it is made.

    Raises:
        InvalidRequest: (a ValueError) none is given, or several, or one that cannot be; names it.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema, as a dict or as its JSON; kept as JSON. The answer is JSON that validates against it."""
    regex: str | None = None
    """The whole answer matches it. Without look-around and back-references."""
    choice: Sequence[str] | None = None
    """The answer is one of these texts."""
    grammar: str | None = None
    """Lark, as llguidance extends it, or GBNF, as llama.cpp has it: the answer is a `start`, or a `root`."""
    json_object: bool | None = None
    """True: the answer is any JSON object. False is as if it were not there."""

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
        """The field that is given."""
        return next(name for name in self.__struct_fields__ if getattr(self, name) is not None)


def plain_structured_outputs(value: object) -> StructuredOutputsParams | None:
    """What may be given for it: StructuredOutputsParams, a mapping of its fields, or None. Raises InvalidRequest."""
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
    """JSON of a schema, in the order in which it was given: the answer's properties come in that order."""
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
