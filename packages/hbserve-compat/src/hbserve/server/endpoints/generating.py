"""The endpoints that generate: /v1/completions and /v1/chat/completions."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Send

from hbserve.server.answers.answering import CancellableResponse, Reply
from hbserve.server.answers.answers import Answers
from hbserve.server.answers.chat_choices import ChatChoices
from hbserve.server.answers.completion_choices import CompletionChoices
from hbserve.server.answers.logprobs import TokenNames
from hbserve.server.answers.rendering import Choices, Rendering
from hbserve.server.endpoints.chat_prompt import chat_prompt
from hbserve.server.fields.request_fields import (
    ChatBody,
    CompletionBody,
    RequestBody,
    SamplingFields,
    require_own_names,
    require_served,
)
from hbserve.server.fields.sampling import COMPLETION_MAX_TOKENS, is_only_prompt, num_choices, sampling_params
from hbserve.server.fields.structured_outputs import grammar_names, structured_outputs
from hbserve.server.http.api_error import ApiError, renamed
from hbserve.server.http.direct_body import direct_body
from hbserve.server.http.request_body import converted, ignored_fields, ignored_header, read_object
from hbserve.server.service import ServedModel, Service
from hbserve.text.prompts import PlainPrompt, read_prompts
from hbserve_rpc import SamplingParams

B = TypeVar("B", bound=RequestBody)
Answer = Callable[[Reply, Service, ServedModel, B, dict[str, Any]], Awaitable[None]]
"""Sends the answer to a body. The last argument has the answer's id, time and model."""
OF_EACH_PROMPT = 100
"""Number of characters whose encoding takes as long as what is done for each prompt besides, even for a short one."""


async def completions(request: Request) -> CancellableResponse:
    return await endpoint(request, CompletionBody, _complete)


async def chat_completions(request: Request) -> CancellableResponse:
    return await endpoint(request, ChatBody, _chat)


async def endpoint(request: Request, kind: type[B], answer: Answer[B]) -> CancellableResponse:
    """Check the request itself, and leave the rest to a response that can be cancelled. Raises ApiError."""
    service: Service = request.app.state.service
    model, content, body = await read_body(request, kind)
    # Before any other work: when there are too many requests, a refusal must not have to wait for the work of others.
    model.scheduler.require_room(getattr(body, "priority", None) or 0)
    headers = ignored_header(ignored_fields(content, kind))
    request_id, name = request.scope["state"]["request_id"], model.name_for(body.model)
    head = {"id": kind.id_prefix + request_id, "created": int(time.time()), "model": name}

    async def job(send: Send) -> None:
        reply = Reply(send, headers, service.settings.first_byte_timeout_s, direct_body(request.scope))
        await answer(reply, service, model, body, head)

    return CancellableResponse(job)


async def read_body(request: Request, kind: type[B]) -> tuple[ServedModel, dict[str, Any], B]:
    """Return the served model, and a request's body, as it was sent and as one of this kind. Raises ApiError."""
    service: Service = request.app.state.service
    content = await read_object(request, service.max_body_bytes)
    model = service.require_model()
    require_own_names(content, kind)
    body = converted(content, kind)
    require_served(body)
    return model, content, body


async def _complete(
    reply: Reply, service: Service, model: ServedModel, body: CompletionBody, head: dict[str, Any]
) -> None:
    prompts, echoed, n = await _read_prompts(model, body)
    names = grammar_names(body)
    with renamed(names):
        params = [sampling_params(body, COMPLETION_MAX_TOKENS, structured_outputs(body), model.defaults)] * len(prompts)
    choices = CompletionChoices(
        _names(model, body),
        body,
        [each for each in prompts for _ in range(n)],
        [each for each in echoed for _ in range(n)],
    )
    await _answer(reply, model, body, head, choices, prompts, params, names)


async def _read_prompts(model: ServedModel, body: CompletionBody) -> tuple[list[tuple[int, ...]], list[str], int]:
    """Return the token ids of each prompt, the text of it that is repeated before its answer ("" is none), and the
    number of answers to each."""
    given = read_prompts(body.prompt)
    n = num_choices(body, len(given))
    with_special = body.add_special_tokens is not False
    length = sum(len(each) + OF_EACH_PROMPT for each in given)
    prompts = [
        await model.encoder.text(each, add_special_tokens=with_special, length=length)
        if isinstance(each, str)
        else tuple(each)
        for each in given
    ]
    return prompts, [_text_of(model, each) if body.echo else "" for each in given], n


def _text_of(model: ServedModel, given: PlainPrompt) -> str:
    if isinstance(given, str):
        return given
    return "" if model.encoder.tokenizer is None else str(model.encoder.tokenizer.decode(given))


def _names(model: ServedModel, body: SamplingFields) -> TokenNames:
    return TokenNames(model.encoder.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))


async def _chat(reply: Reply, service: Service, model: ServedModel, body: ChatBody, head: dict[str, Any]) -> None:
    n = num_choices(body, 1)
    prompt = await chat_prompt(service, model, body)
    choices = ChatChoices(
        _names(model, body),
        prompt.token_ids,
        n,
        prompt.make_parts,
        with_token_ids=bool(body.return_token_ids),
        num_top_logprobs=body.top_logprobs or 0,
    )
    await _answer(
        reply, model, body, head, choices, [prompt.token_ids], [prompt.params], prompt.names, prompt.shown_ids
    )


async def _answer(
    reply: Reply,
    model: ServedModel,
    body: SamplingFields,
    head: dict[str, Any],
    choices: Choices,
    prompts: list[tuple[int, ...]],
    params: list[SamplingParams],
    names: dict[str, str],
    shown_ids: frozenset[int] = frozenset(),
) -> None:
    """Answer each prompt as often as its `params` say, in chunks or whole. `names` are the client's names for fields in
    errors."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream=true", param="stream_options")
    rendering = Rendering(
        choices, body, head, [prompt for prompt, each in zip(prompts, params, strict=True) for _ in range(each.n)]
    )
    skip = body.skip_special_tokens is not False
    only_prompt = isinstance(body, CompletionBody) and is_only_prompt(body)
    async with Answers(
        model,
        prompts,
        params,
        skip_special_tokens=skip,
        shown_ids=shown_ids,
        only_prompt=only_prompt,
        names=names,
    ) as answers:
        await reply.answer(answers, rendering, streamed=bool(body.stream))
