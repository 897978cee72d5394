"""Data that does not fit a struct: msgspec's finding, in words of whoever has written the data."""

import difflib
import re
from typing import Any

import msgspec

from hbserve_rpc.plain_values import cut, shown


def what_and_where(error: msgspec.ValidationError) -> tuple[str, str]:
    """What msgspec has found, and where, such as `$.a[0]` or `key` in `$.a`, each in backticks; "" if it is the whole.

    What somebody wrote may be quoted in the first: text of any length, with any words in it.
    """
    found = re.fullmatch(r"(.*?)(?: - at ((?:`key` in )?`\$[^`]*`))?", str(error), re.DOTALL)
    assert found is not None
    quoted = r"(?<=^Invalid enum value ['\"]).*(?=['\"]$)"
    return re.sub(quoted, lambda text: cut(text[0]), found[1], flags=re.DOTALL), found[2] or ""


def describe_misfit(error: msgspec.ValidationError, content: Any, kind: type[msgspec.Struct], whole: str) -> str:
    """One line: the path of the key, its value, and what may be there; with a guess at a misspelt key.

    content: the data, as plain Python. kind: the struct that it was to be. whole: what all of it is called.
    """
    what, place = what_and_where(error)
    keys = re.findall(r"\.(\w+)|\[(\d+)\]", place)
    path = "".join(f".{name}" if name else f"[{index}]" for name, index in keys).lstrip(".")
    if unknown := re.search(r"unknown field `(.*)`", what, re.DOTALL):
        allowed = [field.name for field in msgspec.structs.fields(_type_at(kind, path))]
        close = difflib.get_close_matches(unknown[1].strip().lower(), allowed, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        key = unknown[1] if re.fullmatch(r"[\w-]+", unknown[1]) else shown(unknown[1])
        return f"{path + '.' if path else ''}{key}: unknown key; {hint}expected one of {', '.join(allowed)}"
    if missing := re.search(r"missing required field `(\w+)`", what):
        return f"{path + '.' if path else ''}{missing[1]}: missing; it has no default"
    if not path and not what.startswith("Expected `"):  # of a check of the struct's own, in its words
        return what
    if re.match(r"\w+=", what):
        return f"{path}.{what}"
    value = content
    for name, index in keys:
        value = value[name] if name else value[int(index)]
    return f"{path or whole}={shown(value)}: {_detail(error, _type_at(kind, path) if path else None)}"


def describe_value_misfit(error: msgspec.ValidationError, name: str, value: Any, kind: Any) -> str:
    """The same of one value, called so, that was to be of this type."""
    for index in re.findall(r"\[(\d+)\]", what_and_where(error)[1]):
        name, value = f"{name}[{index}]", value[int(index)]
        (kind,) = getattr(kind, "__args__", [None])[:1]
    return f"{name}={shown(value)}: {_detail(error, kind)}"


def _detail(error: msgspec.ValidationError, kind: Any) -> str:
    """What may be there: of a mapping, the words are for its keys."""
    what, place = what_and_where(error)
    has_words = getattr(kind, "__origin__", None) is not dict or "`key`" in place
    for of_json, of_yaml in (("`object`", "a mapping"), ("`array`", "a list")):
        what = what.replace(of_json, of_yaml)
    return (expected_words(kind) if has_words else "") or what[:1].lower() + what[1:]


def _type_at(kind: type[msgspec.Struct], path: str) -> Any:
    """The annotated type of a key."""
    found: Any = kind
    for name in re.findall(r"[a-z_0-9]*[a-z_][a-z_0-9]*", path):
        found = next(field.type for field in msgspec.structs.fields(found) if field.name == name)
        found = found.__origin__ if hasattr(found, "__metadata__") else found
        found = getattr(found, "__args__", [found])[0] if getattr(found, "__origin__", None) is list else found
        structs = [each for each in getattr(found, "__args__", ()) if hasattr(each, "__struct_fields__")]
        found = structs[0] if structs else found
    return found


def expected_words(found: Any) -> str:
    """What a key of this type may be, if there are words for it; else nothing."""
    found = found.__origin__ if hasattr(found, "__metadata__") else found
    choices = getattr(found, "__args__", ())
    # Of a number that may be a word instead, the words are one level deeper.
    nested = [word for choice in choices for word in getattr(choice, "__args__", ())]
    words = [str(choice) for choice in (*choices, *nested) if isinstance(choice, str)]
    or_number = "`int`, or " if int in choices else ""
    return f"expected {or_number}one of {', '.join(words)}" if words else ""
