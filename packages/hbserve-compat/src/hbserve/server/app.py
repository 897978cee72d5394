"""The ASGI application: which handler answers each path, and the middleware that every request passes first."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from hbserve.server.endpoints.anthropic_messages import count_message_tokens, messages
from hbserve.server.endpoints.debugging import show_trace, show_view
from hbserve.server.endpoints.generating import chat_completions, completions
from hbserve.server.endpoints.metrics import show_metrics
from hbserve.server.endpoints.models import list_models, retrieve_model
from hbserve.server.endpoints.openapi import show_openapi
from hbserve.server.endpoints.probes import health, ping, show_version
from hbserve.server.endpoints.responses import count_input_tokens, responses
from hbserve.server.endpoints.tokenizing import detokenize, tokenize, tokenizer_info
from hbserve.server.http.api_error import ApiError, as_api_error, path_of
from hbserve.server.http.api_keys import ApiKeys, RequireApiKey, are_asked_for
from hbserve.server.http.request_body import IGNORED_HEADER
from hbserve.server.http.request_log import REQUEST_ID, RequestLog
from hbserve.server.service import Service
from hbserve_rpc import HBServeRpcError

CHAT_PAGE = Path(__file__).parent / "chat_page.html"
DASHBOARD = Path(__file__).parent / "dashboard.html"
ROUTES = [
    Route("/v1/models", list_models),
    Route("/v1/models/{model:path}", retrieve_model),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/responses/input_tokens", count_input_tokens, methods=["POST"]),
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_message_tokens, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokenizer_info),
    Route("/health", health),
    Route("/ping", ping, methods=["GET", "POST"]),
    Route("/version", show_version),
    Route("/metrics", show_metrics),
    Route("/debug/trace", show_trace),
    Route("/debug/view", show_view),
    Route("/dashboard", lambda _: FileResponse(DASHBOARD)),
    Route("/openapi.json", show_openapi),
    Route("/", lambda _: FileResponse(CHAT_PAGE)),
]


PATHS = {route.path for route in ROUTES}
PAGES = {"/", "/dashboard"}
"""Pages whose relative links depend on their own address, which therefore must not get a slash."""
WITH_SLASH = [
    Route(f"{route.path}/", route.endpoint, methods=list(route.methods or ()))
    for route in ROUTES
    if route.path not in PAGES and "{" not in route.path
]
"""The same paths with a trailing slash. A redirect, as Starlette would answer, misleads clients behind a TLS proxy, and
others do not follow it."""


def make_app(service: Service) -> Starlette:
    """Make the application. Raises ConfigError if the API keys cannot be read."""
    keys = ApiKeys(service.settings)
    service.http.know(ROUTES)
    middleware = [Middleware(RequestLog, figures=service.http)]
    if service.settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=service.settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID, IGNORED_HEADER],
            )
        )
    if are_asked_for(service.settings):
        middleware.append(Middleware(RequireApiKey, keys=keys))
    handlers = {
        ApiError: _refuse,
        HBServeRpcError: _refuse,
        HTTPException: _refuse_route,
        ClientDisconnect: _nobody_is_there,
        Exception: _fail,
    }
    app = Starlette(routes=[*ROUTES, *WITH_SLASH], middleware=middleware, exception_handlers=handlers)
    app.state.service = service
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    assert known is not None
    return known.response(request.scope)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    meant = _meant(path_of(request.scope)) if error.status_code == 404 else None
    cure = "docs/openai-server.md has what there is" if meant is None else f"there is {meant}"
    if error.status_code == 405:
        cure = f"expected {headers.get('Allow', '')}"
    problem = f"{request.method} {request.url.path[:256]}: {error.detail}; {cure}"
    return ApiError(error.status_code, problem, headers=headers).response(request.scope)


def _meant(path: str) -> str | None:
    """Return the path that a client meant whose base URL lacks /v1, has it twice, or ends with a slash; None: none."""
    words = [word for word in path.split("/") if word]
    plain = [word for word in words if word != "v1"]
    candidates = ["/" + "/".join(["v1", *plain]), "/" + "/".join(plain)]
    return next((each for each in candidates if plain and each in PATHS), None)


async def _nobody_is_there(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _fail(request: Request, error: Exception) -> Response:
    """Answer 500 for a bug of ours. The operator finds it in the log, where uvicorn writes it."""
    headers = {REQUEST_ID: request.scope.get("state", {}).get("request_id", "")}
    return ApiError(500, "internal error; the server's log has it", headers=headers).response(request.scope)
