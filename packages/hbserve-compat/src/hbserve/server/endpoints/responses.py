"""/v1/responses: OpenAI's Responses API, translated to a chat. Nothing is stored, so each request must be complete."""

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.answers.answering import CancellableResponse, Reply
from hbserve.server.answers.logprobs import TokenNames
from hbserve.server.endpoints.generating import endpoint
from hbserve.server.endpoints.response_events import ResponseFormat
from hbserve.server.endpoints.responses_fields import AS_IN_A_CHAT, INCLUDED, LOGPROBS, ResponsesBody, TextConfig
from hbserve.server.endpoints.translated_chat import (
    ChatHistory,
    TranslatedChat,
    content_of,
    count_tokens,
    named_function,
    new_tool_call,
    offered_function,
    plain_role,
    text_of,
)
from hbserve.server.fields.request_fields import ChatBody
from hbserve.server.http.api_error import ApiError
from hbserve.server.service import ServedModel, Service
from hbserve_rpc.plain_values import shown

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
}
TEXT = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
ROLES = ("user", "assistant", "system", "developer")


async def responses(request: Request) -> CancellableResponse:
    return await endpoint(request, ResponsesBody, _respond)


async def count_input_tokens(request: Request) -> Response:
    return await count_tokens(request, ResponsesBody, _as_chat, {"object": "response.input_tokens"})


async def _respond(
    reply: Reply, service: Service, model: ServedModel, body: ResponsesBody, head: dict[str, Any]
) -> None:
    names = TokenNames(model.encoder.tokenizer)
    await _as_chat(body).answer(reply, service, model, partial(ResponseFormat, body, names, head))


def _as_chat(body: ResponsesBody) -> TranslatedChat:
    """Translate to a chat. Raises ApiError (400), which names what is wrong."""
    for each in body.include or []:
        if each not in INCLUDED:
            raise ApiError(400, f"include={shown(each)}: is not served; expected one of {INCLUDED}", param="include")
    history = _History()
    if body.instructions is not None:
        history.add("instructions", "system", body.instructions)
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for place, item in enumerate(items):
        history.add_item(f"input[{place}]", item)
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = named_function(choice.get("name"))
    tools = [
        offered_function(f"tools[{place}]", tool, ("function",), "parameters")
        for place, tool in enumerate(body.tools or [])
    ]
    chat = ChatBody(
        messages=history.messages,
        max_tokens=body.max_output_tokens,
        logprobs=LOGPROBS in (body.include or []) or bool(body.top_logprobs),
        tools=tools or None,
        tool_choice=choice,
        response_format=_response_format(body.text),
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        **{name: getattr(body, name) for name in AS_IN_A_CHAT},
    )
    return TranslatedChat(chat, history.paths, NAMES)


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    """Translate `text.format` to a chat's `response_format`, in which JSON schemas are one object deeper. Raises
    ApiError."""
    given = text.format if text is not None else None
    if given is None or given.get("type") != "json_schema":
        return given
    if not isinstance(given.get("schema"), dict):
        expected = '{"type": "json_schema", "name": ..., "schema": {...}}'
        raise ApiError(400, f"text.format={shown(given)}: expected {expected}", param="text.format")
    return {"type": "json_schema", "json_schema": {name: given[name] for name in given if name != "type"}}


class _History(ChatHistory):
    """A chat's messages, made of items. Several items may be one message of the assistant."""

    def add_item(self, path: str, item: dict[str, Any]) -> None:
        kind = item.get("type") or "message"
        if kind == "message":
            self._add_message(path, item)
        elif kind == "reasoning":
            text = text_of(f"{path}.content", item.get("content"), {"reasoning_text": "text"})
            text = text or text_of(f"{path}.summary", item.get("summary"), {"summary_text": "text"})
            answer = self._answer(path)
            answer["reasoning"] = answer.get("reasoning", "") + text
        elif kind == "function_call":
            call = new_tool_call(path, item.get("call_id"), item.get("name"), item.get("arguments"))
            self._answer(path, is_call=True).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = text_of(f"{path}.output", item.get("output"), TEXT)
            self.add(path, "tool", output, tool_call_id=item.get("call_id"))
        else:
            expected = "message, reasoning, function_call or function_call_output"
            raise ApiError(400, f"{path}.type={shown(kind)}: is not served; expected {expected}", param=f"{path}.type")

    def _add_message(self, path: str, item: dict[str, Any]) -> None:
        role = plain_role(path, item, ROLES)
        content = item.get("content") if role == "assistant" else content_of(path, item)
        text = text_of(f"{path}.content", content, TEXT)
        if role == "assistant":
            self._answer(path)["content"] = text
        else:
            self.add(path, role, text)

    def _answer(self, path: str, *, is_call: bool = False) -> dict[str, Any]:
        """Return the assistant's message of which an item is part. Reasoning, then text, then calls are one message."""
        last = self.messages[-1] if self.messages else {}
        has_later = bool(last.get("content") or "tool_calls" in last) and not is_call
        return self.add(path, "assistant", "") if last.get("role") != "assistant" or has_later else last
