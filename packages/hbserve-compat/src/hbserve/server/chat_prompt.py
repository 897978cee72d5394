"""Prompt of a chat, its parameters, and readers of the answers: all that the ways to ask for a chat have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hbserve.server.api_error import renamed
from hbserve.server.chat_messages import plain_messages
from hbserve.server.chat_tools import chat_tools
from hbserve.server.message_parts import MessageParts
from hbserve.server.reasoning import ReasoningSplit, thinking_has_begun
from hbserve.server.request_fields import ChatBody
from hbserve.server.sampling import sampling_params
from hbserve.server.service import ServedModel, Service
from hbserve.server.tool_calls import format_of
from hbserve_rpc import SamplingParams


@dataclass(frozen=True)
class ChatPrompt:
    """What the model is given, and how what it writes is read."""

    token_ids: list[int]
    params: SamplingParams
    make_parts: Callable[[], MessageParts]
    """A new reader, for one answer."""


async def chat_prompt(
    service: Service, model: ServedModel, body: ChatBody, paths: Sequence[str] | None = None
) -> ChatPrompt:
    """The prompt of a body's messages; `paths` names them in errors, where a client has sent them in another form.

    Raises:
        ApiError, InvalidRequest: names the field that is wrong.
    """
    settings = service.template_settings(body.chat_template_kwargs, body.add_generation_prompt)
    if body.reasoning_effort is not None:
        settings["reasoning_effort"] = body.reasoning_effort
    tools = chat_tools(body, format_of(model.encoder.chat_template))
    prompt = await model.encoder.messages(plain_messages(body.messages, paths), tools=tools.offered, **settings)
    has_begun = thinking_has_begun(model.encoder.chat_template, model.encoder.tokenizer, prompt)
    if tools.beginning:
        prompt = prompt + await model.encoder.text(tools.beginning, add_special_tokens=False)
    with renamed({} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}):
        params = sampling_params(body, model.room_for(prompt))

    def make_parts() -> MessageParts:
        if has_begun is None or tools.beginning:
            return tools.reader()
        return ReasoningSplit(tools.reader(), has_begun=has_begun, is_shown=body.include_reasoning is not False)

    return ChatPrompt(prompt, params, make_parts)
