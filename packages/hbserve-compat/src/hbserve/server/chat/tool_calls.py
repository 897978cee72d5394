"""Tool calls in the text that a model writes: found, and streamed with their arguments as these come.

The formats: Hermes' (Qwen's too), `<tool_call>{"name": …, "arguments": {…}}</tool_call>` among other text; that of
Qwen3-Coder, with `<function=name><parameter=a>1</parameter></function>` between the same tags, and Seed-OSS', between
`<seed:tool_call>` and its end; Llama 3's, an answer that is nothing but `{"name": …, "parameters": {…}}`, or several
with `;` between; lists `[{"name": …, "arguments": {…}}, …]` behind Mistral's `[TOOL_CALLS]`, Granite's `<|tool_call|>`
or Phi-4-mini's `functools`; and Mistral's newer `[TOOL_CALLS]name[ARGS]{…}`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from hbserve.server.chat.call_parts import Call, JsonCall, NamedCall, Nesting, XmlCall
from hbserve.server.chat.message_parts import MessageParts, TagSearch

BEGIN, END = "<tool_call>", "</tool_call>"
SEED_BEGIN, MISTRAL_BEGIN, GRANITE_BEGIN, PHI_BEGIN = "<seed:tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "functools["
Format = Literal["hermes", "llama3_json", "qwen3_coder", "seed_oss", "mistral", "mistral_json", "granite", "phi4_mini"]


class _Calls:
    """What all formats have in common: the calls so far, and how an answer with some ends."""

    id_length: ClassVar[int] = 0
    """Letters and digits of a call's id, where the model's template refuses others; 0: it takes any."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        self._tools = tools
        self._most_calls = most_calls
        """Calls after that are left out."""
        self._num_calls = 0
        self._call: Call | None = None

    def _begin(self) -> None:
        self._call = JsonCall(self._num_calls, self.id_length)

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


class _CallsInText(_Calls):
    """Calls behind tags, and the text around them."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._search = TagSearch()
        self._space = ""
        """White space of the text, which is left out where a call follows."""

    def _text(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        text = self._space + text
        sure = text if is_last and not self._num_calls else text.rstrip()
        self._space = text[len(sure) :]
        return [{"content": sure}] if sure else []


class HermesCalls(_CallsInText):
    """Reads calls in Hermes' format, and the text around them."""

    begin: ClassVar[str] = BEGIN
    end: ClassVar[str] = END

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        rest: str | None = text
        while rest is not None:
            tag = self.begin if self._call is None else self.end
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


class XmlCalls(HermesCalls):
    """Reads calls in Qwen3-Coder's format, and the text around them."""

    def _begin(self) -> None:
        self._call = XmlCall(self._num_calls, self._tools)


class SeedCalls(XmlCalls):
    """Reads calls in Seed-OSS' format, and the text around them."""

    begin = SEED_BEGIN
    end = "</seed:tool_call>"


class ListCalls(_CallsInText):
    """Reads lists of calls behind tags, and the text around them."""

    tags: ClassVar[tuple[str, ...]] = ("<|tool_call|>", "<tool_call>", "<|/tool_call|>")
    after_tag: ClassVar[Literal["tag", "list"]] = "tag"
    """list: the tag has the bracket with which the list begins."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._place: Literal["text", "tag", "list"] = "text"
        """What was left last, where no call is being read."""
        self._nesting: Nesting | None = None
        """Of the list's member that is being read."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        rest: str | None = text
        while rest is not None:
            if self._call is not None:
                found, rest = self._in_call(self._call, rest)
                deltas += found
            elif self._place == "text":
                before, rest = self._search.feed(rest, *self.tags, final=final)
                deltas += self._text(before, is_last=final and rest is None)
                if rest is not None:
                    self._place, self._space = self.after_tag, ""
            else:
                rest = self._begin_in(rest.lstrip())
        return deltas + (self._end() if final else [])

    def _begin_in(self, text: str) -> str | None:
        """What is left of text that is behind a tag, or between members of a list: a call begins, or text does."""
        if self._place == "list":
            text = text.lstrip(", \n\t\r")
        if not text:
            return None
        if text[0] == "{":
            self._nesting = Nesting()
            self._begin()
        elif self._place == "tag" and text[0] == "[":
            self._place, text = "list", text[1:]
        else:
            text = text.removeprefix("]") if self._place == "list" else text
            self._place = "text"
        return text

    def _in_call(self, call: Call, text: str) -> tuple[list[dict[str, Any]], str | None]:
        if self._nesting is None:  # its name was before it
            deltas, rest = call.feed(text)
        else:  # what is behind its arguments, such as Mistral's id, is left out
            end = self._nesting.end_in(text)
            deltas, rest = call.feed(text[:end])[0], None if end is None else text[end:]
        deltas = self._keep(deltas)
        if rest is not None:
            deltas += self._end()
            self._place = "text" if self._place == "tag" else self._place
        return deltas, rest


class PhiCalls(ListCalls):
    """Reads lists of calls in Phi-4-mini's format, and the text around them."""

    tags = (PHI_BEGIN,)
    after_tag = "list"


class MistralCalls(ListCalls):
    """Reads calls in both of Mistral's formats, and the text around them."""

    tags = (MISTRAL_BEGIN,)
    id_length = 9

    def _begin_in(self, text: str) -> str | None:
        if self._place == "tag" and text and text[0] not in "[{":
            self._nesting, self._call = None, NamedCall(self._num_calls, self.id_length)
            return text
        return super()._begin_in(text)


class LlamaCalls(_Calls):
    """Reads an answer in Llama 3's format, which is calls from its first character on, or text."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._is_text = False
        self._space = ""
        """White space that has come before anything else: it belongs to a text."""
        self._is_over = False
        """Whether it went on with something else after its calls: all that follows is left out."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        rest: str | None = self._space + text
        self._space = ""
        while rest and not (self._is_text or self._is_over):
            if self._call is None:
                # After a call, what is before the next one is its own last brace and the border between.
                begun = rest.lstrip("} \n\t;" if self._num_calls else None)
                if not begun:
                    self._space = "" if self._num_calls else rest
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
    "seed_oss": SeedCalls,
    "mistral": MistralCalls,
    "mistral_json": MistralCalls,
    "granite": ListCalls,
    "phi4_mini": PhiCalls,
}
BEGINNINGS: dict[Format, str] = {
    "hermes": BEGIN + '\n{"name": "',
    "llama3_json": '{"name": "',
    "qwen3_coder": BEGIN + "\n<function=",
    "seed_oss": SEED_BEGIN + "\n<function=",
    "mistral": MISTRAL_BEGIN,
    "mistral_json": MISTRAL_BEGIN + ' [{"name": "',
    "granite": GRANITE_BEGIN + '[{"name": "',
    "phi4_mini": PHI_BEGIN + '{"name": "',
}
"""How a model begins a call."""
ARGUMENTS: dict[Format, str] = {
    "hermes": '", "arguments": ',
    "llama3_json": '", "parameters": ',
    "qwen3_coder": ">\n",
    "seed_oss": ">\n",
    "mistral": "[ARGS]",
    "mistral_json": '", "arguments": ',
    "granite": '", "arguments": ',
    "phi4_mini": '", "arguments": ',
}
"""What is between a call's name and its arguments."""
SPECIAL = frozenset({BEGIN, END, SEED_BEGIN, SeedCalls.end, *ListCalls.tags, MISTRAL_BEGIN, "[CALL_ID]", "[ARGS]"})
"""Tags that may be special tokens of a model: these are read, and others are not shown."""


def tag_tokens(tokenizer: Any) -> frozenset[int]:
    """Those tags that are one token each."""
    found = {tokenizer.convert_tokens_to_ids(tag) for tag in SPECIAL}
    return frozenset(found - {None, tokenizer.unk_token_id})


def format_of(chat_template: str | None) -> Format | None:
    """The format that a chat template asks of its model; None: it knows no tools."""
    if chat_template is None or "tools" not in chat_template:
        return None
    if MISTRAL_BEGIN in chat_template:
        return "mistral" if "[ARGS]" in chat_template else "mistral_json"
    if GRANITE_BEGIN in chat_template:
        return "granite"
    if PHI_BEGIN in chat_template:
        return "phi4_mini"
    if SEED_BEGIN in chat_template:
        return "seed_oss"
    if BEGIN in chat_template:
        return "qwen3_coder" if "<function=" in chat_template else "hermes"
    return "llama3_json" if '"parameters"' in chat_template else None
