"""The prompt of a chat, its parameters, and the readers of its answers, for all APIs that ask for a chat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hbserve.server.chat.chat_messages import plain_messages
from hbserve.server.chat.chat_tools import chat_tools
from hbserve.server.chat.message_parts import MessageParts
from hbserve.server.chat.reasoning import ReasoningSplit, end_token, tags_of, thinking_has_begun
from hbserve.server.chat.tool_calls import format_of, tag_tokens
from hbserve.server.fields.request_fields import ChatBody
from hbserve.server.fields.sampling import sampling_params
from hbserve.server.fields.structured_outputs import grammar_names, structured_outputs
from hbserve.server.http.api_error import ApiError, renamed
from hbserve.server.service import ServedModel, Service
from hbserve_rpc import SamplingParams
from hbserve_rpc.plain_values import shown


@dataclass(frozen=True)
class ChatPrompt:
    """The model's input, and how its output is read."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    make_parts: Callable[[], MessageParts]
    """Makes a reader for one answer."""
    names: dict[str, str]
    """Names of fields in errors, with the names that a chat's client has for them."""
    shown_ids: frozenset[int]
    """Special tokens that are not skipped, because they are tags of calls or of reasoning, which must be read."""


def _template_settings(service: Service, model: ServedModel, body: ChatBody) -> dict[str, Any]:
    """Return the variables of the chat template. Raises ApiError (400) for what the template cannot show, and would
    silently leave out."""
    settings = service.template_settings(
        body.chat_template_kwargs, begins_message=body.add_generation_prompt, goes_on=body.continue_final_message
    )
    if body.continue_final_message and body.messages[-1:] and body.messages[-1].get("tool_calls"):
        problem = "continue_final_message=True: the last message has calls of tools, after which no text can go on"
        raise ApiError(400, problem, param="continue_final_message")
    if body.documents:
        if "documents" not in (model.encoder.chat_template or ""):
            problem = "documents: the model's chat template knows none; put them into a message"
            raise ApiError(400, problem, param="documents")
        settings["documents"] = body.documents
    if body.reasoning_effort is not None:
        settings["reasoning_effort"] = body.reasoning_effort
        if "enable_thinking" not in (body.chat_template_kwargs or {}):  # the variable of templates of Qwen's kind
            settings["enable_thinking"] = body.reasoning_effort != "none"
    return settings


async def chat_prompt(
    service: Service, model: ServedModel, body: ChatBody, paths: Sequence[str] | None = None
) -> ChatPrompt:
    """Make the prompt of a body's messages. `paths` names these in errors, if the client sent them in another form.

    Raises:
        ApiError, InvalidRequest: a field is wrong; the message names it.
    """
    settings = _template_settings(service, model, body)
    grammar = structured_outputs(body)
    is_structured = grammar is not None
    template, tokenizer = model.encoder.chat_template, model.encoder.tokenizer
    tools = chat_tools(body, format_of(template), tokenizer, is_structured=is_structured)
    if tools.beginning and body.continue_final_message:
        problem = f"tool_choice={shown(body.tool_choice)}: not if the answer goes on with the last message"
        raise ApiError(400, problem, param="tool_choice")
    prompt = await model.encoder.messages(plain_messages(body.messages, paths), tools=tools.offered, **settings)
    thinking = tags_of(template)
    has_begun = thinking is not None and thinking_has_begun(thinking, tokenizer, prompt)
    # An answer that follows a grammar from its first token on can have no reasoning before it.
    beginning = tools.beginning or (f"\n{thinking[1]}\n\n" if thinking and is_structured and has_begun else "")
    if beginning:
        prompt = prompt + await model.encoder.text(beginning, add_special_tokens=False)
    of_tools = {"structured_outputs.grammar": "tools", "structured_outputs": "tools"}
    names = of_tools if tools.grammar else grammar_names(body)
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    with renamed(names):
        params = sampling_params(body, model.room_for(prompt), grammar or tools.grammar, model.defaults)

    def make_parts() -> MessageParts:
        if thinking is None or tools.beginning or is_structured:
            return tools.reader()
        is_shown, end_id = body.include_reasoning is not False, end_token(tokenizer, thinking)
        return ReasoningSplit(tools.reader(), has_begun=has_begun, is_shown=is_shown, end_id=end_id, tags=thinking)

    shown_ids = tools.shown_ids.union(tag_tokens(tokenizer, thinking or ()).values())
    return ChatPrompt(prompt, params, make_parts, names, shown_ids)
