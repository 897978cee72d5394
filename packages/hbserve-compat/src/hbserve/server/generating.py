"""The endpoints that generate: /v1/completions and /v1/chat/completions."""

import time
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Send

from hbserve.prompts import read_prompts
from hbserve.server.answering import Reply, Watched
from hbserve.server.answers import Answers
from hbserve.server.api_error import ApiError
from hbserve.server.chat_choices import ChatChoices
from hbserve.server.chat_messages import plain_messages
from hbserve.server.chat_tools import chat_tools
from hbserve.server.completion_choices import CompletionChoices
from hbserve.server.logprobs import TokenNames
from hbserve.server.message_parts import MessageParts
from hbserve.server.reasoning import ReasoningSplit, thinking_has_begun
from hbserve.server.rendering import Choices, Rendering
from hbserve.server.request_body import converted, ignored_fields, ignored_header, read_object
from hbserve.server.request_fields import ChatBody, CompletionBody, SamplingFields, require_served
from hbserve.server.sampling import COMPLETION_MAX_TOKENS, is_only_prompt, num_choices, sampling_params
from hbserve.server.service import ServedModel, Service
from hbserve.server.tool_calls import format_of
from hbserve_rpc import SamplingParams

B = TypeVar("B", bound=SamplingFields)


async def completions(request: Request) -> Watched:
    return await _endpoint(request, CompletionBody, _complete)


async def chat_completions(request: Request) -> Watched:
    return await _endpoint(request, ChatBody, _chat)


async def _endpoint(request: Request, kind: type[B], answer: Any) -> Watched:
    """Refuses what is wrong in itself, and leaves the rest to a response that can be cancelled."""
    service: Service = request.app.state.service
    content = await read_object(request, service.max_body_bytes)
    model = service.require_model()
    body = converted(content, kind)
    require_served(body, request.scope["path"].removeprefix(request.scope.get("root_path", "")))
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream=true", param="stream_options")
    headers = ignored_header(ignored_fields(content, kind))
    request_id, name = request.scope["state"]["request_id"], model.name_for(body.model)
    head = {"id": f"{kind.id_prefix}-{request_id}", "created": int(time.time()), "model": name}

    async def job(send: Send) -> None:
        await answer(Reply(send, headers), service, model, body, head)

    return Watched(job)


async def _complete(
    reply: Reply, service: Service, model: ServedModel, body: CompletionBody, head: dict[str, Any]
) -> None:
    given = read_prompts(body.prompt)
    n = num_choices(body, len(given))
    prompts = [await model.encoder.text(each) if isinstance(each, str) else each for each in given]
    params = [sampling_params(body, COMPLETION_MAX_TOKENS)] * len(prompts)
    echoed = [_text_of(model, each, ids) if body.echo else "" for each, ids in zip(given, prompts, strict=True)]
    choices = CompletionChoices(
        TokenNames(model.encoder.tokenizer),
        body,
        [each for each in prompts for _ in range(n)],
        [each for each in echoed for _ in range(n)],
    )
    await _answer(reply, service, model, body, head, choices, prompts, params, n)


def _text_of(model: ServedModel, given: str | list[int], token_ids: list[int]) -> str:
    if isinstance(given, str):
        return given
    return "" if model.encoder.tokenizer is None else str(model.encoder.tokenizer.decode(token_ids))


async def _chat(reply: Reply, service: Service, model: ServedModel, body: ChatBody, head: dict[str, Any]) -> None:
    n = num_choices(body, 1)
    settings = service.template_settings(body.chat_template_kwargs, body.add_generation_prompt)
    if body.reasoning_effort is not None:
        settings["reasoning_effort"] = body.reasoning_effort
    tools = chat_tools(body, format_of(model.encoder.chat_template))
    prompt = await model.encoder.messages(plain_messages(body.messages), tools=tools.offered, **settings)
    has_begun = thinking_has_begun(model.encoder.chat_template, model.encoder.tokenizer, prompt)
    if tools.beginning:
        prompt = prompt + await model.encoder.text(tools.beginning, add_special_tokens=False)
    params = sampling_params(body, model.room_for(prompt))

    def make_parts() -> MessageParts:
        if has_begun is None or tools.beginning:
            return tools.reader()
        return ReasoningSplit(tools.reader(), has_begun=has_begun, is_shown=body.include_reasoning is not False)

    choices = ChatChoices(
        TokenNames(model.encoder.tokenizer),
        prompt,
        n,
        make_parts,
        with_token_ids=bool(body.return_token_ids),
        num_top_logprobs=body.top_logprobs or 0,
    )
    await _answer(reply, service, model, body, head, choices, [prompt], [params], n)


async def _answer(
    reply: Reply,
    service: Service,
    model: ServedModel,
    body: SamplingFields,
    head: dict[str, Any],
    choices: Choices,
    prompts: list[list[int]],
    params: list[SamplingParams],
    n: int,
) -> None:
    """Answer each prompt `n` times, in chunks or whole."""
    several = [prompt for prompt in prompts for _ in range(n)]
    of_each = [each.of_choice(choice) for each in params for choice in range(n)]
    rendering = Rendering(choices, body, head, several)
    skip = body.skip_special_tokens is not False
    only_prompt = isinstance(body, CompletionBody) and is_only_prompt(body)
    async with Answers(model, several, of_each, skip_special_tokens=skip, only_prompt=only_prompt) as answers:
        if body.stream:
            await reply.stream(answers, rendering, service.settings.first_byte_timeout_s)
        else:
            await reply.whole(answers, rendering)
