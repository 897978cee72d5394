"""One tool call as it comes: its name, then its arguments, in pieces."""

import re
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, as nearly all models write it."""
_NAMED = re.compile(r"\s*([^\s\[{]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
"""The same, as Mistral's newer models write it."""
_NOT_NAMED = re.compile(r"\A\s*[^\s\[{]+\s+[^\s{]|\{|\[TOOL_CALLS\]")
"""What is in a text that does not become such a call, and in none that still may: two words, or what is behind one."""
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(?=<)")
"""The beginning of a call as Qwen3-Coder writes it."""
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.S)
_FUNCTION_END = re.compile(r"\s*(?:</parameter>\s*)?(?:</function>|(?=<function=))")
"""Its end, or the beginning of the next one, if a model has left that out."""
_WORDS = {"True": True, "False": False, "None": None}
"""What Python calls them, and so Qwen3-Coder."""


class Call:
    """One call as it comes. A subclass reads its format."""

    head: ClassVar[re.Pattern[str]]
    """What a call begins with: its first group has the name."""

    def __init__(self, index: int, id_length: int = 0) -> None:
        """id_length: letters and digits of its id, where the model wants so many."""
        self._index = index
        self._id = uuid.uuid4().hex[:id_length] if id_length else f"call_{uuid.uuid4().hex[:24]}"
        self._text = ""
        self._sent = 0
        """Place in the text up to which its arguments were given out; 0: not even its name was."""
        self.is_known = False
        """Whether its name was given out."""
        self._is_complete = False
        """So were all its arguments."""

    def feed(self, text: str) -> tuple[list[dict[str, Any]], str | None]:
        """What is sure now; and once the arguments are complete, the text after them."""
        if self._is_complete:
            return [], text
        self._text += text
        if self.is_known:
            return self._arguments()
        head = self.head.match(self._text)
        if head is None:
            return [], None
        self._sent = head.end()
        named = self._delta(self._name(head[1]), "")
        deltas, rest = self._arguments()
        return [named, *deltas], rest

    def _name(self, written: str) -> str:
        """The name, of how it is written."""
        raise NotImplementedError

    def _arguments(self) -> tuple[list[dict[str, Any]], str | None]:
        """As `feed`, of what has come behind `_sent`."""
        raise NotImplementedError

    def end(self, *, is_cut: bool) -> tuple[list[dict[str, Any]], str]:
        """No more text comes: what it is if it was written in another way, or the text that it is not.

        is_cut: because that of the answer has ended; else its own end has come.
        """
        return [], "" if self.is_known else self._text

    def _delta(self, name: str | None, arguments: str) -> dict[str, Any]:
        if name is None:
            return {"tool_calls": [{"index": self._index, "function": {"arguments": arguments}}]}
        self.is_known = True
        call = {"index": self._index, "id": self._id, "type": "function"}
        return {"tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}


class XmlCall(Call):
    """One call whose parameters are texts between tags. Its arguments come one by one."""

    head = _FUNCTION

    def __init__(self, index: int, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(index)
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        self._properties: dict[str, Any] = {}
        self._num_arguments = 0

    def _name(self, written: str) -> str:
        schema = self._schemas.get(written)
        found = schema.get("properties") if isinstance(schema, dict) else None
        self._properties = found if isinstance(found, dict) else {}
        return written

    def _arguments(self) -> tuple[list[dict[str, Any]], str | None]:
        deltas = []
        while parameter := _PARAMETER.match(self._text, self._sent):
            value = msgspec.json.encode(_value(parameter[2], self._properties.get(parameter[1]))).decode()
            name = msgspec.json.encode(parameter[1]).decode()
            deltas.append(self._delta(None, f"{', ' if self._num_arguments else '{'}{name}: {value}"))
            self._num_arguments += 1
            self._sent = parameter.end()
        end = _FUNCTION_END.match(self._text, self._sent)
        if end is None:
            return deltas, None
        self._is_complete = True
        return [*deltas, self._delta(None, "}" if self._num_arguments else "{}")], self._text[end.end() :]

    def end(self, *, is_cut: bool) -> tuple[list[dict[str, Any]], str]:
        text = self._text
        if is_cut or self._is_complete:
            return super().end(is_cut=is_cut)
        self._text = text.rstrip().removesuffix("</function>")  # what is open may be a parameter, too
        deltas, _ = self.feed("</parameter></function>")
        return deltas, "" if self.is_known else text


def _value(text: str, schema: Any) -> Any:
    """A parameter's value: a text, unless its schema asks for something else, and it is that."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = {kinds} if isinstance(kinds, str) else {str(each) for each in kinds} if isinstance(kinds, list) else set()
    if "string" in kinds and not (text in ("null", "None") and "null" in kinds):
        return text
    try:
        value = _WORDS[text] if text in _WORDS else msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text
    return value if kinds or isinstance(value, dict | list) else text


class Nesting:
    """Where an object of JSON ends, character by character."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_quoted = self._is_escaped = False

    def end_in(self, text: str, begin: int = 0) -> int | None:
        """The place behind its end; None: it is not in this text, which is the next part of it."""
        return next((place + 1 for place in range(begin, len(text)) if self._closes(text[place])), None)

    def _closes(self, character: str) -> bool:
        if self._is_quoted:
            self._is_quoted = self._is_escaped or character != '"'
            self._is_escaped = character == "\\" and not self._is_escaped
            return False
        self._is_quoted = character == '"'
        change = {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        self._depth += change
        return self._depth == 0 and change < 0


class NamedCall(Call):
    """One call whose name is before the JSON of its arguments."""

    head = _NAMED

    def __init__(self, index: int, id_length: int = 0) -> None:
        super().__init__(index, id_length)
        self._nesting = Nesting()
        """Of its arguments."""

    def feed(self, text: str) -> tuple[list[dict[str, Any]], str | None]:
        deltas, rest = super().feed(text)
        if not self.is_known and _NOT_NAMED.search(self._text):
            self._text, rest = "", self._text
        return deltas, rest

    def _name(self, written: str) -> str:
        return written

    def _arguments(self) -> tuple[list[dict[str, Any]], str | None]:
        end = self._nesting.end_in(self._text, self._sent)
        self._is_complete = end is not None
        arguments = self._text[self._sent : end]
        self._sent = len(self._text)
        deltas = [self._delta(None, arguments)] if arguments else []
        return deltas, None if end is None else self._text[end:]


class JsonCall(NamedCall):
    """One call that is an object of JSON. What that has behind the arguments, such as Mistral's id, is left out."""

    head = _HEAD

    def __init__(self, index: int, id_length: int = 0) -> None:
        super().__init__(index, id_length)
        self._object = Nesting()

    def feed(self, text: str) -> tuple[list[dict[str, Any]], str | None]:
        end = self._object.end_in(text)
        deltas, _ = Call.feed(self, text[:end])
        return deltas, None if end is None else text[end:]

    def _name(self, written: str) -> str:
        try:
            return str(msgspec.json.decode(written))
        except msgspec.DecodeError:  # an escape that there is not
            return written[1:-1]

    def end(self, *, is_cut: bool) -> tuple[list[dict[str, Any]], str]:
        if self.is_known:
            return [], ""
        try:
            found = msgspec.json.decode(self._text)
            name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
        except (msgspec.DecodeError, UnicodeError, RecursionError, LookupError, TypeError, AttributeError):
            return [], self._text
        if not isinstance(name, str):
            return [], self._text
        plain = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        return [self._delta(name, plain)], ""
