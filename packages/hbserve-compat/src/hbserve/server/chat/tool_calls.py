"""Tool calls in the text that a model writes: found, and streamed with their arguments as these come.

The formats: Hermes' (Qwen's too), `<tool_call>{"name": …, "arguments": {…}}</tool_call>` among other text; that of
Qwen3-Coder, with `<function=name><parameter=a>1</parameter></function>` between the same tags, and Seed-OSS', between
`<seed:tool_call>` and its end; Llama 3's, an answer that is nothing but `{"name": …, "parameters": {…}}`, or several
with `;` between; lists `[{"name": …, "arguments": {…}}, …]` behind Mistral's `[TOOL_CALLS]`, Granite's `<|tool_call|>`
or Phi-4-mini's `functools`; and Mistral's newer `[TOOL_CALLS]name[ARGS]{…}`. Two tags may have several calls between
them. What is no call is text as it was written, but for tags that are no words.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hbserve.server.chat.call_parts import MOST_HEAD, Call, JsonCall, NamedCall, XmlCall
from hbserve.server.chat.message_parts import MessageParts, TagSearch

BEGIN, END = "<tool_call>", "</tool_call>"
SEED_BEGIN, SEED_END = "<seed:tool_call>", "</seed:tool_call>"
MISTRAL_BEGIN, GRANITE_BEGIN, PHI_BEGIN = "[TOOL_CALLS]", "<|tool_call|>", "functools["
_OPENING_BEGUN = re.compile(r"\s*(\[\s*)?")
"""Text behind a tag that may become the opening of a list of calls."""
Format = Literal["hermes", "llama3_json", "qwen3_coder", "seed_oss", "mistral", "mistral_json", "granite", "phi4_mini"]


class _Calls:
    """Base of the readers of all formats: reads calls one after the other, and knows how an answer with calls ends."""

    id_length: ClassVar[int] = 0
    """Number of letters and digits of a call's id, if the model's template refuses others; 0: it takes any id."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        self._tools = tools
        self._most_calls = most_calls
        """Number of calls after which further calls are left out; None: no limit."""
        self._num_calls = 0
        self._call: Call | None = None
        self._is_cut = False
        """Whether the answer has ended within the arguments of its last call."""
        self._border = ""
        """Characters that are left out before the next call; after a call, those that may be between two calls."""

    def _begin(self) -> Call:
        return JsonCall(self._num_calls, self.id_length)

    def _read(self, text: str) -> list[dict[str, Any]]:
        """Read calls, and text that is none."""
        deltas: list[dict[str, Any]] = []
        rest: str | None = text
        while rest:
            if self._call is None:
                rest = rest.lstrip(self._border)
                if not rest:
                    break
                self._call = self._begin()
            found, rest = self._call.feed(rest)
            deltas += self._keep(found)
            if rest is not None:
                deltas += self._end(is_cut=False)
        return deltas

    @property
    def _is_kept(self) -> bool:
        """Whether the next call is not one too many."""
        return self._most_calls is None or self._num_calls < self._most_calls

    def _keep(self, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return deltas if self._is_kept else []

    def _end(self, *, is_cut: bool) -> list[dict[str, Any]]:
        if self._call is None:
            return []
        deltas, text = self._call.end(is_cut=is_cut)
        deltas = self._keep(deltas)
        self._is_cut = is_cut and self._is_kept and self._call.is_known and not self._call.is_complete
        deltas += self._no_call(text) if text else []
        self._border = "} \n\r\t,;" if self._call.is_known else ""
        self._num_calls += self._call.is_known
        self._call = None
        return deltas

    def _no_call(self, text: str) -> list[dict[str, Any]]:
        """Return deltas of text that might have become a call, and has not."""
        return [{"content": text}] if text.strip() or not self._num_calls else []

    def reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._num_calls and not self._is_cut else reason


class _CallsInText(_Calls):
    """Base of readers of calls behind tags, and of the text around them."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._search = TagSearch()
        self._space = ""
        """White space at the end of the text, which is left out if a call follows."""
        self._unread = ""
        """Text behind a tag that is left out if a call follows, and is content if none does."""

    def _text(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        text = self._space + text
        sure = text if is_last and not self._num_calls else text.rstrip()
        self._space = text[len(sure) :]
        return [{"content": sure}] if sure else []

    def _end(self, *, is_cut: bool) -> list[dict[str, Any]]:
        if self._call is not None and self._call.is_known:
            self._unread = ""
        deltas = super()._end(is_cut=is_cut)
        self._space, self._unread = self._space + self._unread, ""
        return deltas

    def _no_call(self, text: str) -> list[dict[str, Any]]:
        text, self._unread = self._unread + text, ""
        return self._text(text, is_last=False)


class HermesCalls(_CallsInText):
    """Reader of calls in Hermes' format, and of the text around them."""

    begin: ClassVar[str] = BEGIN
    end: ClassVar[str] = END

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._is_inside = False

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        rest: str | None = text
        while rest is not None:
            before, rest = self._search.feed(rest, self.end if self._is_inside else self.begin, final=final)
            deltas += self._read(before) if self._is_inside else self._text(before, is_last=False)
            if rest is None:
                break
            if self._is_inside:
                deltas += self._end(is_cut=False)
            else:
                self._unread, self._space, self._border = self._space, "", ""
            self._is_inside = not self._is_inside
        return deltas + (self._end(is_cut=True) + self._text("", is_last=True) if final else [])


class XmlCalls(HermesCalls):
    """Reader of calls in Qwen3-Coder's format, and of the text around them."""

    def _begin(self) -> Call:
        return XmlCall(self._num_calls, self._tools)


class SeedCalls(XmlCalls):
    """Reader of calls in Seed-OSS' format, and of the text around them."""

    begin = SEED_BEGIN
    end = SEED_END


class ListCalls(_CallsInText):
    """Reader of lists of calls behind tags, and of the text around them."""

    tags: ClassVar[tuple[str, ...]] = (GRANITE_BEGIN, BEGIN, "<|/tool_call|>")
    opening: ClassVar[re.Pattern[str]] = re.compile(r"\s*(\[\s*)?(?=\{)")
    """Pattern of what is between a tag and the first call; its group matches if that call is in a list."""
    is_word: ClassVar[bool] = False
    """Whether the tag is content if no call follows."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._place: Literal["text", "tag", "list"] = "text"
        """Place of the reader while it reads no call: in text, behind a tag, or in a list behind a call."""
        self._held = ""
        """Text behind a tag that may become the opening of a list."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        rest: str | None = text
        while rest is not None:
            if self._call is not None:
                found, rest = self._call.feed(rest)
                deltas += self._keep(found)
                if rest is not None:
                    deltas += self._end(is_cut=False)
            elif self._place == "text":
                before, rest = self._search.feed(rest, *self.tags, final=final)
                deltas += self._text(before, is_last=False)
                if rest is not None:
                    self._place, self._space, self._unread = "tag", "", self._space + self.tags[0] * self.is_word
            elif self._place == "tag":
                rest = self._open(self._held + rest)
            else:
                rest = self._go_on(rest.lstrip(", \n\t\r"))
        return deltas + (self._end(is_cut=True) + self._text(self._held, is_last=True) if final else [])

    def _open(self, text: str) -> str | None:
        """Decide from the text behind a tag whether a call or text begins. Return what is left to read, or None if
        neither is certain."""
        self._held = ""
        if opening := self.opening.match(text, 0, MOST_HEAD):
            self._place = "text" if opening[1] is None else "list"
            self._unread += text[: opening.end()]
            self._call = self._begin()
            return text[opening.end() :]
        if len(text) < MOST_HEAD and _OPENING_BEGUN.fullmatch(text):
            self._held = text
            return None
        return self._go_on(text)

    def _go_on(self, text: str) -> str | None:
        """Decide whether the next call of a list begins, or text. Return what is left to read, or None if neither is
        certain."""
        if not text:
            return None
        if self._place == "list" and text[0] == "{":
            self._call = self._begin()
            return text
        self._space, self._unread = self._space + self._unread, ""
        text = text.removeprefix("]") if self._place == "list" else text
        self._place = "text"
        return text

    def _no_call(self, text: str) -> list[dict[str, Any]]:
        self._place = "text"
        return super()._no_call(text)


class PhiCalls(ListCalls):
    """Reader of lists of calls in Phi-4-mini's format, and of the text around them."""

    tags = (PHI_BEGIN.removesuffix("["),)
    opening = re.compile(r"(\[\s*)(?=\{)")
    is_word = True


class MistralCalls(ListCalls):
    """Reader of calls in both of Mistral's formats, and of the text around them."""

    tags = (MISTRAL_BEGIN,)
    id_length = 9

    def _open(self, text: str) -> str | None:
        if text.lstrip()[:1] in ("", "[", "{"):
            return super()._open(text)
        self._held, self._place = "", "text"
        self._call = NamedCall(self._num_calls, self.id_length)
        return text


class LlamaCalls(_Calls):
    """Reader of an answer in Llama 3's format, which is either calls from its first character on, or text."""

    def __init__(self, *, most_calls: int | None = None, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(most_calls=most_calls, tools=tools)
        self._is_text: bool | None = None
        """Whether the answer is text; None: only white space has come."""
        self._space = ""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        if self._is_text is None:
            text, self._space = self._space + text, ""
            begun = text.lstrip()
            if not begun and not final:
                self._space = text
                return []
            self._is_text = not begun.startswith("{")
        if self._is_text:
            return [{"content": text}] if text else []
        return self._read(text) + (self._end(is_cut=True) if final else [])


@dataclass(frozen=True)
class Spelling:
    """A format of calls: its reader, and the fixed parts of what a model writes."""

    reader: Callable[..., MessageParts]
    beginning: str
    """Text before the first call's name."""
    arguments: str
    """Text between a call's name and its arguments."""
    closing: str
    """Text behind a call's arguments."""
    between: str
    """Text between a call and the next one's name; "" if there is no fixed text."""
    end: str
    """Text behind the last call, which a model may leave out."""
    tags: tuple[str, ...] = ()
    """Tags that may be special tokens of a model. They are read; other special tokens are not shown."""

    def terms(self, text: str, token_ids: Mapping[str, int]) -> str:
        """Return a text of this format as terms of a Lark grammar, in which a tag that is one token is that token."""
        parts = re.split("({})".format("|".join(map(re.escape, token_ids))), text) if token_ids else [text]
        return " ".join(
            f"<[{token_ids[each]}]>" if each in token_ids else json.dumps(each, ensure_ascii=False)
            for each in parts
            if each
        )


_LIST = '", "arguments": ', "}", ', {"name": "', "]"
FORMATS: dict[Format, Spelling] = {
    "hermes": Spelling(
        HermesCalls,
        f'{BEGIN}\n{{"name": "',
        '", "arguments": ',
        "}",
        f'\n{END}\n{BEGIN}\n{{"name": "',
        f"\n{END}",
        (BEGIN, END),
    ),
    "llama3_json": Spelling(LlamaCalls, '{"name": "', '", "parameters": ', "}", '; {"name": "', ""),
    "qwen3_coder": Spelling(XmlCalls, f"{BEGIN}\n<function=", ">\n", "", "", "", (BEGIN, END)),
    "seed_oss": Spelling(SeedCalls, f"{SEED_BEGIN}\n<function=", ">\n", "", "", "", (SEED_BEGIN, SEED_END)),
    "mistral": Spelling(
        MistralCalls, MISTRAL_BEGIN, "[ARGS]", "", MISTRAL_BEGIN, "", (MISTRAL_BEGIN, "[CALL_ID]", "[ARGS]")
    ),
    "mistral_json": Spelling(MistralCalls, MISTRAL_BEGIN + ' [{"name": "', *_LIST, (MISTRAL_BEGIN,)),
    "granite": Spelling(ListCalls, GRANITE_BEGIN + '[{"name": "', *_LIST, ListCalls.tags),
    "phi4_mini": Spelling(PhiCalls, PHI_BEGIN + '{"name": "', *_LIST),
}


def tag_tokens(tokenizer: Any, tags: Sequence[str]) -> dict[str, int]:
    """Return the token of each tag that is a single token."""
    found = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in tags}
    return {tag: token_id for tag, token_id in found.items() if token_id not in (None, tokenizer.unk_token_id)}


def format_of(chat_template: str | None) -> Format | None:
    """Return the format that a chat template asks of its model, or None if it knows no tools."""
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
