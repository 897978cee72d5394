"""Tools of a chat request: which are offered, and whether one must be called."""

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from hbserve.server.chat.message_parts import MessageParts, PlainText
from hbserve.server.chat.tool_calls import ARGUMENTS, BEGINNINGS, READERS, Format
from hbserve.server.fields.request_fields import ChatBody
from hbserve.server.http.api_error import ApiError
from hbserve_rpc import StructuredOutputsParams
from hbserve_rpc.plain_values import plain_text, shown

MOST_TOOLS = 256
_ANY_CALL = r"""start: (%s) /(.|\n)*/"""


@dataclass(frozen=True)
class ChatTools:
    """Tools that the model is told of, and the beginning of its answer, if that is not its own choice."""

    offered: list[dict[str, Any]] | None = None
    format: Format | None = None
    beginning: str = ""
    most_calls: int | None = None
    grammar: StructuredOutputsParams | None = None
    """What follows the beginning: one call, whose arguments are as the tool's schema says."""

    def reader(self) -> MessageParts:
        """A reader of one answer, which has read its beginning."""
        if self.format is None:
            return PlainText()
        reader = READERS[self.format](most_calls=self.most_calls, tools=self.offered or ())
        if self.beginning:
            reader.feed(self.beginning, final=False)
        return reader


def chat_tools(body: ChatBody, known: Format | None, *, is_structured: bool) -> ChatTools:
    """What a request says of tools; `known` is the format of the model's calls, None if it knows none.

    is_structured: the answer has a format of its own.

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
    most_calls = 1 if body.parallel_tool_calls is False else None
    if choice in (None, "auto"):
        return ChatTools(body.tools, known, most_calls=most_calls)
    if is_structured:
        raise ApiError(400, f"tool_choice={shown(choice)}: not with a format of the answer", param="tool_choice")
    if choice == "required":
        return ChatTools(body.tools, known, BEGINNINGS[known], most_calls, _grammar(body, known, names))
    name = _chosen(choice)
    if name not in names:
        raise ApiError(400, f"tool_choice={shown(choice)}: expected one of {shown(names)}", param="tool_choice")
    return ChatTools(body.tools, known, BEGINNINGS[known] + name + ARGUMENTS[known], 1, _grammar(body, known, [name]))


def _grammar(body: ChatBody, known: Format, names: list[str]) -> StructuredOutputsParams | None:
    """The rest of a call of one of these tools; of a single one, from its arguments on. None: it has another end."""
    if body.stop or body.stop_token_ids:
        return None
    if known in ("qwen3_coder", "seed_oss"):  # what is between its tags no schema describes
        heads = " | ".join(json.dumps(name + ARGUMENTS[known], ensure_ascii=False) for name in names)
        return None if isinstance(body.tool_choice, dict) else StructuredOutputsParams(grammar=_ANY_CALL % heads)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in body.tools or []}
    calls, rules = [], []
    for place, name in enumerate(names):
        schema = schemas[name] if isinstance(schemas[name], dict) else {"type": "object"}
        # As far as the schema can be followed: what is not served of it is the tool's to check.
        lenient = {**schema, "x-guidance": {"lenient": True, "whitespace_pattern": r"[ \n\r\t]{0,32}"}}
        rules.append(f"arguments_{place}: %json {msgspec.json.encode(lenient).decode()}")
        begun = f"{json.dumps(name, ensure_ascii=False)[1:-1]}{ARGUMENTS[known]}"
        head = "" if isinstance(body.tool_choice, dict) else f"{json.dumps(begun, ensure_ascii=False)} "
        calls.append(f"{head}arguments_{place}" + ("" if known == "mistral" else ' "}"'))
    return StructuredOutputsParams(grammar="\n".join([f"start: {' | '.join(calls)}", *rules]))


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
