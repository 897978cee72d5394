"""/openapi.json: the endpoints and their request bodies, generated from the structs that decode these."""

from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.endpoints.anthropic_fields import CountTokensBody, MessagesBody
from hbserve.server.endpoints.responses_fields import ResponsesBody
from hbserve.server.endpoints.tokenizing import DetokenizeBody, TokenizeBody
from hbserve.server.fields.request_fields import ChatBody, CompletionBody

POSTED = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
ASKED = ["/v1/models", "/tokenizer_info", "/health", "/ping", "/version", "/metrics"]


def description() -> dict[str, Any]:
    bodies, components = msgspec.json.schema_components(POSTED.values(), ref_template="#/components/schemas/{name}")
    for kind in (ChatBody, CompletionBody, ResponsesBody, MessagesBody):
        for name, values in kind.not_served.items():
            if field := components[kind.__name__]["properties"].get(name):
                field["description"] = f"Not served; may be null or one of {list(values)}."
    answered = {"200": {"description": "OK"}}
    paths: dict[str, Any] = {path: {"get": {"responses": answered}} for path in ASKED}
    for path, body in zip(POSTED, bodies, strict=True):
        content = {"application/json": {"schema": body}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": answered}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "HBServe", "version": version("hbserve-compat")},
        "paths": paths,
        "components": {"schemas": components},
    }


async def show_openapi(request: Request) -> Response:
    return Response(msgspec.json.encode(description()), media_type="application/json")
