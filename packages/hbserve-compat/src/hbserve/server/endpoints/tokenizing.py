"""/tokenize, /detokenize and /tokenizer_info: the model's tokenizer for clients without one."""

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.chat.chat_messages import plain_messages
from hbserve.server.http.api_error import ApiError
from hbserve.server.http.request_body import converted, ignored_fields, ignored_header, read_object
from hbserve.server.service import ServedModel, Service
from hbserve.text.tokenizer import require_tokenizer
from hbserve_rpc.plain_values import plain_text, plain_token_ids

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    """Whether a prompt gets special tokens. Messages get those of the chat template."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template: None = None
    """Refused unless null, as in chats: ignoring it would give other tokens than those that were asked for."""


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]


B = TypeVar("B", TokenizeBody, DetokenizeBody)


async def _read(request: Request, kind: type[B]) -> tuple[ServedModel, B, dict[str, str]]:
    """Return the model, the request's body, and headers for the answer."""
    service: Service = request.app.state.service
    content = await read_object(request, service.max_body_bytes)
    model, body = service.require_model(), converted(content, kind)
    model.name_for(body.model)
    return model, body, ignored_header(ignored_fields(content, kind))


async def tokenize(request: Request) -> Response:
    model, body, headers = await _read(request, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt, messages: expected one of the two", param="prompt")
    if body.messages is not None:
        service: Service = request.app.state.service
        settings = service.template_settings(
            body.chat_template_kwargs, begins_message=body.add_generation_prompt, goes_on=body.continue_final_message
        )
        ids = await model.encoder.messages(plain_messages(body.messages), tools=body.tools, **settings)
    else:
        prompt = plain_text("prompt", body.prompt)
        ids = await model.encoder.text(prompt, add_special_tokens=body.add_special_tokens is not False)
    answer = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": None}
    if body.return_token_strs:
        answer["token_strs"] = model.encoder.tokenizer.convert_ids_to_tokens(ids)
    return _json(answer, headers)


async def detokenize(request: Request) -> Response:
    model, body, headers = await _read(request, DetokenizeBody)
    require_tokenizer(model.encoder.tokenizer, "tokens")
    tokens = plain_token_ids("tokens", body.tokens)
    vocab_size = max((each.vocab_size for each in model.scheduler.info().instances), default=0)
    for place, token in enumerate(tokens):
        if token >= vocab_size > 0:
            problem = f"tokens[{place}]={token}: is outside the vocabulary [0, {vocab_size})"
            raise ApiError(400, problem, param=f"tokens[{place}]")
    text = model.encoder.tokenizer.decode(tokens)
    # The names of vLLM and of SGLang.
    return _json({"prompt": text, "text": text}, headers)


async def tokenizer_info(request: Request) -> Response:
    """Answer with the tokenizer's settings, under the names of tokenizer_config.json."""
    model = request.app.state.service.require_model()
    encoder = model.encoder
    require_tokenizer(encoder.tokenizer, "tokenizer")
    tokens = {name: getattr(encoder.tokenizer, name, None) for name in SPECIAL_TOKENS}
    info = {
        "tokenizer_class": type(encoder.tokenizer).__name__,
        "model_max_length": min(encoder.tokenizer.model_max_length, model.max_model_len),
        "chat_template": encoder.chat_template,
        **{name: None if token is None else str(token) for name, token in tokens.items()},
    }
    return _json(info, {})


def _json(value: Any, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")
