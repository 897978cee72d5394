"""Prompt of a chat, its parameters, and readers of the answers: all that the ways to ask for a chat have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hbserve.server.api_error import renamed
from hbserve.server.chat_messages import plain_messages
from hbserve.server.chat_tools import chat_tools
from hbserve.server.message_parts import MessageParts
from hbserve.server.reasoning import END, ReasoningSplit, thinking_has_begun
from hbserve.server.request_fields import ChatBody
from hbserve.server.sampling import sampling_params
from hbserve.server.service import ServedModel, Service
from hbserve.server.structured_outputs import structured_outputs
from hbserve.server.tool_calls import format_of
from hbserve_rpc import SamplingParams


@dataclass(frozen=True)
class ChatPrompt:
    """What the model is given, and how what it writes is read."""

    token_ids: tuple[int, ...]
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
    grammar = structured_outputs(body)
    is_structured = grammar is not None
    tools = chat_tools(body, format_of(model.encoder.chat_template), is_structured=is_structured)
    prompt = await model.encoder.messages(plain_messages(body.messages, paths), tools=tools.offered, **settings)
    has_begun = thinking_has_begun(model.encoder.chat_template, model.encoder.tokenizer, prompt)
    # What follows a grammar from its first token on has no reasoning before it.
    beginning = tools.beginning or (f"\n{END}\n\n" if is_structured and has_begun else "")
    if beginning:
        prompt = prompt + await model.encoder.text(beginning, add_special_tokens=False)
    with renamed({} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}):
        params = sampling_params(body, model.room_for(prompt), grammar or tools.grammar, model.defaults)

    def make_parts() -> MessageParts:
        if has_begun is None or tools.beginning or is_structured:
            return tools.reader()
        return ReasoningSplit(tools.reader(), has_begun=has_begun, is_shown=body.include_reasoning is not False)

    return ChatPrompt(prompt, params, make_parts)
