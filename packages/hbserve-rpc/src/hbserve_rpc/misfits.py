"""Messages about data that does not fit a struct: msgspec's finding, in the words of whoever wrote the data."""

import difflib
import re
from typing import Any

import msgspec

from hbserve_rpc.plain_values import cut, shown


def what_and_where(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return what msgspec found, and where: `$.a[0]` or `key` in `$.a`, with the backticks, or "" for the whole.

    The finding may quote what somebody wrote: text of any length, with any words in it. It is cut.
    """
    found = re.fullmatch(r"(.*?)(?: - at ((?:`key` in )?`\$[^`]*`))?", str(error), re.DOTALL)
    assert found is not None
    quoted = r"(?<=^Invalid enum value ['\"]).*(?=['\"]$)"
    return re.sub(quoted, lambda text: cut(text[0]), found[1], flags=re.DOTALL), found[2] or ""


def describe_misfit(error: msgspec.ValidationError, content: Any, kind: type[msgspec.Struct], whole: str) -> str:
    """Describe the misfit in one line: the path of the key, its value, and what is allowed there. An unknown key is
    shown with a guess at its right spelling.

    content: the data, as plain Python. kind: the struct that it should be. whole: name of the data as a whole.
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
    if not path and not what.startswith("Expected `"):  # from a check of the struct's own, in its words
        return what
    if re.match(r"\w+=", what):
        return f"{path}.{what}"
    value = content
    for name, index in keys:
        value = value[name] if name else value[int(index)]
    return f"{path or whole}={shown(value)}: {_detail(what, place, _type_at(kind, path) if path else None)}"


def describe_value_misfit(error: msgspec.ValidationError, name: str, value: Any, kind: Any) -> str:
    """Describe, in one line, that the value named `name` is not of the type `kind`."""
    what, place = what_and_where(error)
    for index in re.findall(r"\[(\d+)\]", place):
        name, value = f"{name}[{index}]", value[int(index)]
        (kind,) = getattr(kind, "__args__", [None])[:1]
    return f"{name}={shown(value)}: {_detail(what, place, kind)}"


def _detail(what: str, place: str, kind: Any) -> str:
    """Return what is allowed. The words for a mapping's type are about its keys, and used only for them."""
    has_words = getattr(kind, "__origin__", None) is not dict or "`key`" in place
    for of_json, of_yaml in (("`object`", "a mapping"), ("`array`", "a list")):
        what = what.replace(of_json, of_yaml)
    return (expected_words(kind) if has_words else "") or what[:1].lower() + what[1:]


def _type_at(kind: type[msgspec.Struct], path: str) -> Any:
    """Return the annotated type of the key at `path`."""
    found: Any = kind
    for name in re.findall(r"[a-z_0-9]*[a-z_][a-z_0-9]*", path):
        found = next(field.type for field in msgspec.structs.fields(found) if field.name == name)
        found = found.__origin__ if hasattr(found, "__metadata__") else found
        found = getattr(found, "__args__", [found])[0] if getattr(found, "__origin__", None) is list else found
        structs = [each for each in getattr(found, "__args__", ()) if hasattr(each, "__struct_fields__")]
        found = structs[0] if structs else found
    return found


def expected_words(found: Any) -> str:
    """Return the words that a value of this type may be, as a phrase; "" if it may be no words."""
    found = found.__origin__ if hasattr(found, "__metadata__") else found
    choices = getattr(found, "__args__", ())
    # If the value may be a number or a word, the words are one level deeper.
    nested = [word for choice in choices for word in getattr(choice, "__args__", ())]
    words = [str(choice) for choice in (*choices, *nested) if isinstance(choice, str)]
    or_number = "`int`, or " if int in choices else ""
    return f"expected {or_number}one of {', '.join(words)}" if words else ""
