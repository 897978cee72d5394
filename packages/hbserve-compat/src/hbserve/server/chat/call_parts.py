"""One tool call as it comes: its name, then its arguments, in pieces."""

import re
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""Beginning of a call up to its arguments, as nearly all models write it."""
_NAMED = re.compile(r"\s*([^\s\[{]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
"""Beginning of a call up to its arguments, as Mistral's newer models write it."""
_NOT_NAMED = re.compile(r"\A\s*[^\s\[{]+\s+[^\s{]|\{|\[TOOL_CALLS\]")
"""Parts of a text that can no longer become such a call: a second word, or something that cannot follow a name."""
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(?=<)")
"""Beginning of a call as Qwen3-Coder writes it."""
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
"""Beginning of a parameter up to its value."""
_VALUE_END = re.compile(r"</parameter>|(?=<(parameter|function)=([^<>\n]{1,256})>)")
"""End of a value, or a tag that may end it if the model has left the end out. It has no `<` but its first character."""
_VALUE_END_BEGUN = re.compile(r"<(?:/?[a-z]{0,9}|(?:parameter|function)=[^<>\n]{0,256})\Z")
"""Text at the end that may become one of these."""
_FUNCTION_END = re.compile(r"\s*(?:</parameter>\s*)?(?:</function>|(?=<function=))")
"""End of such a call, or the beginning of the next one, if the model has left the end out."""
MOST_HEAD = 1000
"""Number of characters that the beginning of a call may have, up to its arguments; so too that of a parameter, or their
end. What is longer is none: else all text since then would be looked at with each piece that comes."""
_WORDS = {"True": True, "False": False, "None": None}
"""Constants as Python writes them, and so does Qwen3-Coder."""


class Call:
    """Reader of one call as its text comes. A subclass reads one format."""

    head: ClassVar[re.Pattern[str]]
    """Pattern of a call's beginning; its first group is the name."""

    def __init__(self, index: int, id_length: int = 0) -> None:
        """id_length: number of letters and digits of the call's id, if the model's template wants so many."""
        self._index = index
        self._id = uuid.uuid4().hex[:id_length] if id_length else f"call_{uuid.uuid4().hex[:24]}"
        self._text = ""
        self._sent = 0
        """Place in the text up to which arguments were returned; 0: not even the name was."""
        self.is_known = False
        """Whether the call's name was returned."""
        self.is_complete = False
        """Whether all of the call's arguments were returned."""

    def feed(self, text: str) -> tuple[list[dict[str, Any]], str | None]:
        """Add text. Return deltas of what is certain now, and the text after the arguments once these are complete."""
        if self.is_complete:
            return [], text
        self._text += text
        if self.is_known:
            return self._arguments()
        head = self.head.match(self._text, 0, MOST_HEAD)
        if head is None:
            return [], None
        self._sent = head.end()
        named = self._delta(self._name(head[1]), "")
        deltas, rest = self._arguments()
        return [named, *deltas], rest

    def _name(self, written: str) -> str:
        """Return the name from how the model has written it."""
        raise NotImplementedError

    def _arguments(self) -> tuple[list[dict[str, Any]], str | None]:
        """Return what `feed` does, for the text from `_sent` on."""
        raise NotImplementedError

    def end(self, *, is_cut: bool) -> tuple[list[dict[str, Any]], str]:
        """Handle the end of the text. Return deltas of a call that is written in another way, and text that is no call.

        is_cut: whether the text ends because the answer does; else the call's own end has come.
        """
        return [], "" if self.is_known else self._text

    def _delta(self, name: str | None, arguments: str) -> dict[str, Any]:
        if name is None:
            return {"tool_calls": [{"index": self._index, "function": {"arguments": arguments}}]}
        self.is_known = True
        call = {"index": self._index, "id": self._id, "type": "function"}
        return {"tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}


class XmlCall(Call):
    """Reader of a call whose parameters are texts between tags. It returns the arguments one by one.

    A value whose end is left out ends where the next parameter or call begins: one that the tools have, and, of
    parameters, one that this call has not had. Other tags are part of the value, as those of a file about such calls.
    """

    head = _FUNCTION

    def __init__(self, index: int, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(index)
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        self._properties: dict[str, Any] = {}
        self._given: set[str] = set()
        """Names of the parameters whose values were returned."""
        self._searched = 0
        """Place in the text before which no value ends that has not ended yet."""

    def _name(self, written: str) -> str:
        schema = self._schemas.get(written)
        found = schema.get("properties") if isinstance(schema, dict) else None
        self._properties = found if isinstance(found, dict) else {}
        return written

    def _arguments(self) -> tuple[list[dict[str, Any]], str | None]:
        deltas: list[dict[str, Any]] = []
        while parameter := _PARAMETER.match(self._text, self._sent, self._sent + MOST_HEAD):
            value = self._value(parameter[1], parameter.end())
            if value is None:
                return deltas, None
            name = msgspec.json.encode(parameter[1]).decode()
            plain = msgspec.json.encode(_typed(value, self._properties.get(parameter[1]))).decode()
            deltas.append(self._delta(None, f"{', ' if self._given else '{'}{name}: {plain}"))
            self._given.add(parameter[1])
        end = _FUNCTION_END.match(self._text, self._sent, self._sent + MOST_HEAD)
        if end is None:
            return deltas, None
        self.is_complete = True
        return [*deltas, self._delta(None, "}" if self._given else "{}")], self._text[end.end() :]

    def _value(self, name: str, begin: int) -> str | None:
        """Return the value of a parameter, and move `_sent` behind it; None if its end has not come yet."""
        searched = max(begin, self._searched)
        for end in _VALUE_END.finditer(self._text, searched):
            if end[1] is None or self._may_follow(name, *end.groups()):
                value = self._text[begin : end.start()]
                if end[1] == "function":
                    value = value.rstrip().removesuffix("</function>")
                self._sent = end.end() if end[1] is None else begin + len(value)
                return value.removesuffix("\n")
        last = self._text.rfind("<", searched)
        is_begun = last >= 0 and _VALUE_END_BEGUN.match(self._text, last)
        self._searched = last if is_begun else len(self._text)
        return None

    def _may_follow(self, name: str, kind: str, other: str) -> bool:
        """Whether a tag of this kind and with this other name may come behind the parameter `name`."""
        if kind == "function":
            return other in self._schemas
        return other not in {*self._given, name} and (other in self._properties or not self._properties)

    def end(self, *, is_cut: bool) -> tuple[list[dict[str, Any]], str]:
        text = self._text
        if is_cut or self.is_complete:
            return super().end(is_cut=is_cut)
        self._text = text.rstrip().removesuffix("</function>")  # what is open may be a parameter, too
        self._searched = min(self._searched, len(self._text))
        deltas, _ = self.feed("</parameter></function>")
        return deltas, "" if self.is_known else text


def _typed(text: str, schema: Any) -> Any:
    """Return a parameter's value: the text, unless its schema asks for something else and the text is that."""
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
    """Search for the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_quoted = self._is_escaped = False

    def end_in(self, text: str, begin: int = 0) -> int | None:
        """Read the next piece of text, from `begin` on. Return the place behind the object's end, or None if it is not
        in this piece."""
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
    """Reader of a call whose name comes before the JSON of its arguments."""

    head = _NAMED

    def __init__(self, index: int, id_length: int = 0) -> None:
        super().__init__(index, id_length)
        self._nesting = Nesting()
        """Search for the end of the arguments."""

    def feed(self, text: str) -> tuple[list[dict[str, Any]], str | None]:
        deltas, rest = super().feed(text)
        if not self.is_known and (len(self._text) > MOST_HEAD or _NOT_NAMED.search(self._text)):
            self._text, rest = "", self._text
        return deltas, rest

    def _name(self, written: str) -> str:
        return written

    def _arguments(self) -> tuple[list[dict[str, Any]], str | None]:
        end = self._nesting.end_in(self._text, self._sent)
        self.is_complete = end is not None
        arguments = self._text[self._sent : end]
        self._sent = len(self._text)
        deltas = [self._delta(None, arguments)] if arguments else []
        return deltas, None if end is None else self._text[end:]


class JsonCall(NamedCall):
    """Reader of a call that is a JSON object. What follows the arguments in it, such as Mistral's id, is left out."""

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
        except msgspec.DecodeError:  # an escape that does not exist
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
        self.is_complete = True
        return [self._delta(name, plain)], ""
