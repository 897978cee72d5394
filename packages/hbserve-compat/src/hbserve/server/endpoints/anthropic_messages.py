"""/v1/messages: Anthropic's Messages API, translated to a chat."""

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.answers.answering import CancellableResponse, Reply
from hbserve.server.endpoints.anthropic_events import MessageFormat
from hbserve.server.endpoints.anthropic_fields import CountTokensBody, MessagesBody, ToolChoice
from hbserve.server.endpoints.generating import endpoint
from hbserve.server.endpoints.translated_chat import (
    ChatHistory,
    TranslatedChat,
    content_of,
    count_tokens,
    named_function,
    new_tool_call,
    offered_function,
    part_text,
    parts_of,
    plain_role,
    text_of,
)
from hbserve.server.fields.request_fields import ChatBody
from hbserve.server.http.api_error import ApiError
from hbserve.server.service import ServedModel, Service
from hbserve_rpc.plain_values import plain_text, shown

NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
TEXT = {"text": "text"}
ROLES = ("user", "assistant", "system")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""Kinds of `tool_choice`, with their names in a chat."""


async def messages(request: Request) -> CancellableResponse:
    return await endpoint(request, MessagesBody, _answer)


async def count_message_tokens(request: Request) -> Response:
    return await count_tokens(request, CountTokensBody, _as_chat, {}, known=MessagesBody)


async def _answer(reply: Reply, service: Service, model: ServedModel, body: MessagesBody, head: dict[str, Any]) -> None:
    chat = _as_chat(
        body,
        stream=body.stream,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        priority=body.priority,
        timeout_s=body.timeout_s,
    )
    await chat.answer(reply, service, model, partial(MessageFormat, head))


def _as_chat(body: CountTokensBody, **more: Any) -> TranslatedChat:
    """Translate to a chat with the same prompt, and `more` fields of a chat. Raises ApiError (400), which names what is
    wrong."""
    history = _History()
    if body.system is not None:
        history.add("system", "system", content=text_of("system", body.system, TEXT))
    for place, message in enumerate(body.messages):
        history.add_message(f"messages[{place}]", message)
    goes_on = bool(history.messages) and history.messages[-1]["role"] == "assistant"
    if goes_on and history.messages[-1].get("tool_calls"):
        path = f"{history.paths[-1]}.content"
        raise ApiError(400, f"{path}: an answer cannot begin with calls of tools; expected their results", param=path)
    thinking, output = body.thinking, body.output_config
    tools = [
        offered_function(f"tools[{place}]", tool, (None, "custom"), "input_schema")
        for place, tool in enumerate(body.tools or [])
    ]
    chat = ChatBody(
        messages=history.messages,
        continue_final_message=goes_on,
        tools=tools or None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        response_format=_response_format(output.format) if output and output.format else None,
        reasoning_effort=output.effort if output else None,
        include_reasoning=not (thinking and thinking.display == "omitted"),
        chat_template_kwargs=_template_settings(body),
        **more,
    )
    return TranslatedChat(chat, history.paths, NAMES)


def _template_settings(body: CountTokensBody) -> dict[str, Any]:
    settings = dict(body.chat_template_kwargs or {})
    if body.thinking is not None and body.thinking.type != "adaptive":
        settings["enable_thinking"] = body.thinking.type == "enabled"
    return settings


def _choice(given: ToolChoice | None) -> str | dict[str, Any] | None:
    if given is None:
        return None
    return named_function(given.name) if given.type == "tool" else CHOICES[given.type]


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    """Translate `output_config.format` to a chat's `response_format`, in which schemas have names. Raises ApiError."""
    if given.get("type") != "json_schema":
        return given
    if not isinstance(given.get("schema"), dict):
        problem = f'output_config.format={shown(given)}: expected {{"type": "json_schema", "schema": {{...}}}}'
        raise ApiError(400, problem, param="output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": given["schema"]}}


class _History(ChatHistory):
    """A chat's messages, made of those of /v1/messages. One message of a user may become several, one for each result
    of a tool."""

    def add_message(self, path: str, message: dict[str, Any]) -> None:
        role = plain_role(path, message, ROLES)
        content = message.get("content") if role == "assistant" else content_of(path, message)
        if not isinstance(content, list):
            self.add(path, role, content=text_of(f"{path}.content", content, TEXT))
        elif role == "assistant":
            self._add_answer(path, content)
        else:
            self._add_question(path, role, content)

    def _add_question(self, path: str, role: str, content: list[Any]) -> None:
        texts: list[str] = []
        for of_part, part, kind in parts_of(f"{path}.content", content):
            if kind == "tool_result":
                result = text_of(f"{of_part}.content", part.get("content"), TEXT)
                self.add(path, "tool", content=result, tool_call_id=part.get("tool_use_id"))
            else:
                texts.append(part_text(of_part, part, kind, TEXT))
        if texts:  # text beside results is about them, so it follows them
            self.add(path, role, content="".join(texts))

    def _add_answer(self, path: str, content: list[Any]) -> None:
        texts: list[str] = []
        more: dict[str, Any] = {}
        for of_part, part, kind in parts_of(f"{path}.content", content):
            if kind == "thinking":
                more["reasoning"] = more.get("reasoning", "") + plain_text(f"{of_part}.thinking", part.get("thinking"))
            elif kind == "tool_use":
                call = new_tool_call(of_part, part.get("id"), part.get("name"), part.get("input"))
                more.setdefault("tool_calls", []).append(call)
            else:
                texts.append(part_text(of_part, part, kind, TEXT))
        self.add(path, "assistant", content="".join(texts), **more)
