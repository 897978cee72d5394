"""Tools of a chat request: which are offered, and whether one must be called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from hbserve.server.chat.message_parts import MessageParts, PlainText
from hbserve.server.chat.tool_calls import FORMATS, Format, Spelling, tag_tokens
from hbserve.server.fields.request_fields import ChatBody
from hbserve.server.http.api_error import ApiError
from hbserve_rpc import StructuredOutputsParams
from hbserve_rpc.plain_values import plain_text, shown

MOST_TOOLS = 256
MOST_CALLS = 32
"""Limit of calls in one answer that must have a call, so that no model makes them for ever."""


@dataclass(frozen=True)
class ChatTools:
    """Tools that the model is told of, and the beginning of its answer, if that is not its own choice."""

    offered: list[dict[str, Any]] | None = None
    format: Format | None = None
    beginning: str = ""
    most_calls: int | None = None
    grammar: StructuredOutputsParams | None = None
    """Grammar of what follows the beginning: calls whose arguments fit the tools' schemas."""
    shown_ids: frozenset[int] = frozenset()
    """Tags of the format that are tokens. They are read, although they may be special tokens."""

    def reader(self) -> MessageParts:
        """Make a reader of one answer, which has read the beginning already."""
        if self.format is None:
            return PlainText()
        reader = FORMATS[self.format].reader(most_calls=self.most_calls, tools=self.offered or ())
        if self.beginning:
            reader.feed(self.beginning, final=False)
        return reader


def chat_tools(body: ChatBody, known: Format | None, tokenizer: Any, *, is_structured: bool) -> ChatTools:
    """Return what a request says of tools; `known` is the format of the model's calls, None if it knows none.

    is_structured: whether the answer has a format of its own.

    Raises:
        ApiError: 400, names what is wrong.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, f"tool_choice={shown(choice)}: there are no tools", param="tool_choice")
        return ChatTools()
    names = _names(body.tools)
    if choice == "none":
        return ChatTools()
    if known is None:
        problem = (
            "tools: the model's chat template knows none in a format that is read here; give one with --chat-template"
        )
        raise ApiError(400, problem, param="tools")
    spelling = FORMATS[known]
    tags = tag_tokens(tokenizer, spelling.tags)
    most_calls = 1 if body.parallel_tool_calls is False else None
    offered = ChatTools(body.tools, known, most_calls=most_calls, shown_ids=frozenset(tags.values()))
    if choice in (None, "auto"):
        return offered
    if is_structured:
        raise ApiError(400, f"tool_choice={shown(choice)}: not with a format of the answer", param="tool_choice")
    if choice == "required":
        calls = replace(offered, beginning=spelling.beginning)
        return replace(calls, grammar=_grammar(body, calls, names, tags))
    name = _chosen(choice)
    if name not in names:
        raise ApiError(400, f"tool_choice={shown(choice)}: expected one of {shown(names)}", param="tool_choice")
    call = replace(offered, beginning=spelling.beginning + name + spelling.arguments, most_calls=1)
    return replace(call, grammar=_grammar(body, call, [name], tags))


def _grammar(
    body: ChatBody, tools: ChatTools, names: list[str], tags: Mapping[str, int]
) -> StructuredOutputsParams | None:
    """Return a grammar of the rest of a call of one of these tools, and of more calls; for a single tool, of one call
    from its arguments on. None if the request ends its answer otherwise, by stop strings or tokens."""
    if body.stop or body.stop_token_ids:
        return None
    assert tools.format is not None
    spelling, is_named = FORMATS[tools.format], isinstance(body.tool_choice, dict)
    if not spelling.between:  # what is between its tags no schema describes
        heads = " | ".join(json.dumps(name + spelling.arguments, ensure_ascii=False) for name in names)
        return None if is_named else StructuredOutputsParams(grammar=_any_call(heads, tags))
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in body.tools or []}
    calls, rules = [], []
    for place, name in enumerate(names):
        schema = schemas[name] if isinstance(schemas[name], dict) else {"type": "object"}
        # As far as the schema can be followed: what is not served of it is the tool's to check.
        lenient = {**schema, "x-guidance": {"lenient": True, "whitespace_pattern": r"[ \n\r\t]{0,32}"}}
        rules.append(f"arguments_{place}: %json {msgspec.json.encode(lenient).decode()}")
        begun = "" if is_named else json.dumps(name, ensure_ascii=False)[1:-1] + spelling.arguments
        terms = [spelling.terms(begun, tags), f"arguments_{place}", spelling.terms(spelling.closing, tags)]
        calls.append(" ".join(filter(None, terms)))
    rules.append(f"call: {' | '.join(calls)}")
    return StructuredOutputsParams(grammar="\n".join([_start(spelling, tags, is_one=tools.most_calls == 1), *rules]))


def _start(spelling: Spelling, tags: Mapping[str, int], *, is_one: bool) -> str:
    """Return the rule for all calls of an answer, from the first one's name on. The answer may end behind each call."""
    if is_one:
        return "start: call"
    more = f"({spelling.terms(spelling.between, tags)} call){{0,{MOST_CALLS - 1}}}"
    end = f" ({spelling.terms(spelling.end, tags)})?" if spelling.end else ""
    return f"start: call {more}{end}"


def _any_call(heads: str, tags: Mapping[str, int]) -> str:
    """Return a grammar of a name and whatever may follow it. Tags that are special tokens are not part of text."""
    more = f" (({' | '.join(f'<[{each}]>' for each in tags.values())}) TEXT?)*" if tags else ""
    return f"start: ({heads}) TEXT?{more}\nTEXT: /(.|\\n)+/"


def _names(tools: list[dict[str, Any]]) -> list[str]:
    if len(tools) > MOST_TOOLS:
        raise ApiError(400, f"tools: {len(tools)} of them; expected at most {MOST_TOOLS}", param="tools")
    names = []
    for place, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
            problem = f"tools[{place}]={shown(tool)}: expected a function with a name"
            raise ApiError(400, problem, param=f"tools[{place}]")
        names.append(plain_text(f"tools[{place}].function.name", function["name"]))
    return names


def _chosen(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        expected = "auto, none, required, or a function with a name"
        raise ApiError(400, f"tool_choice={shown(choice)}: expected {expected}", param="tool_choice")
    return name
