"""Tool calls in the text that a model writes: found, and streamed with their arguments as these come.

Three formats: Hermes' (Qwen's too), `<tool_call>{"name": …, "arguments": {…}}</tool_call>` among other text; that of
Qwen3-Coder, with `<function=name><parameter=a>1</parameter></function>` between the same tags; and Llama 3's, an
answer that is nothing but `{"name": …, "parameters": {…}}`, or several with `;` between.
"""

import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from hbserve.server.chat.message_parts import MessageParts, TagSearch

BEGIN, END = "<tool_call>", "</tool_call>"
Format = Literal["hermes", "llama3_json", "qwen3_coder"]
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, as nearly all models write it."""
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(?=<)")
"""The beginning of a call as Qwen3-Coder writes it."""
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.S)
_WORDS = {"True": True, "False": False, "None": None}
"""What Python calls them, and so Qwen3-Coder."""


class _Call:
    """One call as it comes. A subclass reads its format."""

    head: ClassVar[re.Pattern[str]]
    """What a call begins with: its first group has the name."""

    def __init__(self, index: int) -> None:
        self._index = index
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

    def end(self) -> tuple[list[dict[str, Any]], str]:
        """No more text comes: what it is if it was written in another way, or the text that it is not."""
        return [], "" if self.is_known else self._text

    def _delta(self, name: str | None, arguments: str) -> dict[str, Any]:
        if name is None:
            return {"tool_calls": [{"index": self._index, "function": {"arguments": arguments}}]}
        self.is_known = True
        call = {"index": self._index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        return {"tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}


class _XmlCall(_Call):
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
        rest = self._text[self._sent :].lstrip()
        self._is_complete = rest.startswith("</function>")
        if not self._is_complete:
            return deltas, None
        return [*deltas, self._delta(None, "}" if self._num_arguments else "{}")], rest.removeprefix("</function>")


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


class _JsonCall(_Call):
    """One call as its JSON comes."""

    head = _HEAD

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._depth = 0
        self._is_quoted = self._is_escaped = False

    def _name(self, written: str) -> str:
        try:
            return str(msgspec.json.decode(written))
        except msgspec.DecodeError:  # an escape that there is not
            return written[1:-1]

    def _arguments(self) -> tuple[list[dict[str, Any]], str | None]:
        end = next((place + 1 for place in range(self._sent, len(self._text)) if self._closes(self._text[place])), None)
        self._is_complete = end is not None
        arguments = self._text[self._sent : end]
        self._sent = len(self._text)
        deltas = [self._delta(None, arguments)] if arguments else []
        return deltas, None if end is None else self._text[end:]

    def _closes(self, character: str) -> bool:
        """Whether the arguments end with this character, the next one of them."""
        if self._is_quoted:
            self._is_quoted = self._is_escaped or character != '"'
            self._is_escaped = character == "\\" and not self._is_escaped
            return False
        self._is_quoted = character == '"'
        self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        return self._depth == 0

    def end(self) -> tuple[list[dict[str, Any]], str]:
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


class _Calls:
    """What all formats have in common: the calls so far, and how an answer with some ends."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        self._tools = tools
        self._most_calls = most_calls
        """Calls after that are left out."""
        self._num_calls = 0
        self._call: _Call | None = None

    def _begin(self) -> None:
        self._call = _JsonCall(self._num_calls)

    def _keep(self, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return deltas if self._most_calls is None or self._num_calls < self._most_calls else []

    def _end(self) -> list[dict[str, Any]]:
        if self._call is None:
            return []
        deltas, text = self._call.end()
        deltas = self._keep(deltas) or ([{"content": text}] if text.strip() else [])
        self._num_calls += self._call.is_known
        self._call = None
        return deltas

    def reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._num_calls else reason


class HermesCalls(_Calls):
    """Reads calls in Hermes' format, and the text around them."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._search = TagSearch()
        self._space = ""
        """White space of the text, which is left out where a call follows."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        rest: str | None = text
        while rest is not None:
            tag = BEGIN if self._call is None else END
            before, rest = self._search.feed(rest, tag, final=final)
            if self._call is None:
                deltas += self._text(before, is_last=final and rest is None)
                if rest is not None:
                    self._begin()
                    self._space = ""
            else:
                deltas += self._keep(self._call.feed(before)[0])
                if rest is not None:
                    deltas += self._end()
        return deltas + (self._end() if final else [])

    def _text(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        text = self._space + text
        sure = text if is_last and not self._num_calls else text.rstrip()
        self._space = text[len(sure) :]
        return [{"content": sure}] if sure else []


class XmlCalls(HermesCalls):
    """Reads calls in Qwen3-Coder's format, and the text around them."""

    def _begin(self) -> None:
        self._call = _XmlCall(self._num_calls, self._tools)


class LlamaCalls(_Calls):
    """Reads an answer in Llama 3's format, which is calls from its first character on, or text."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._is_text = False
        self._is_over = False
        """Whether it went on with something else after its calls: all that follows is left out."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        rest: str | None = text
        while rest and not (self._is_text or self._is_over):
            if self._call is None:
                # After a call, what is before the next one is its own last brace and the border between.
                begun = rest.lstrip("} \n\t;" if self._num_calls else None)
                if not begun:
                    return deltas
                if begun[0] != "{":
                    self._is_text, self._is_over = not self._num_calls, self._num_calls > 0
                    break
                self._begin()
                rest = begun
            assert self._call is not None
            found, rest = self._call.feed(rest)
            deltas += self._keep(found)
            if rest is not None:
                deltas += self._end()
        if self._is_text and rest:
            deltas.append({"content": rest})
        return deltas + (self._end() if final else [])


READERS: dict[Format, Callable[..., MessageParts]] = {
    "hermes": HermesCalls,
    "llama3_json": LlamaCalls,
    "qwen3_coder": XmlCalls,
}
BEGINNINGS: dict[Format, str] = {
    "hermes": BEGIN + '\n{"name": "',
    "llama3_json": '{"name": "',
    "qwen3_coder": BEGIN + "\n<function=",
}
"""How a model begins a call."""
ARGUMENTS: dict[Format, str] = {
    "hermes": '", "arguments": ',
    "llama3_json": '", "parameters": ',
    "qwen3_coder": ">\n",
}
"""What is between a call's name and its arguments."""


def format_of(chat_template: str | None) -> Format | None:
    """The format that a chat template asks of its model; None: it knows no tools."""
    if chat_template is None or "tools" not in chat_template:
        return None
    if BEGIN in chat_template:
        return "qwen3_coder" if "<function=" in chat_template else "hermes"
    return "llama3_json" if '"parameters"' in chat_template else None
