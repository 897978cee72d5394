"""An id and a log line for each request. The line says who asked for which path and how that ended, but has no text of
the prompt or the answer."""

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hbserve.server.http.direct_body import direct_body
from hbserve.server.http.http_figures import HttpFigures

logger = logging.getLogger(__name__)

PROBED = {"/health", "/ping", "/metrics", "/debug/view"}
"""Paths that programs poll; their successful requests are logged at level DEBUG."""
REQUEST_ID = "x-request-id"
TRACE_RESPONSE = "traceresponse"
"""Header of W3C's drafts, and of OpenTelemetry, that names the span that has answered."""
CLIENT_GONE = 499
"""Status in the log of a request whose client disconnected before its answer had a status; nginx uses the same."""


@dataclass
class HttpRequest:
    """An HTTP request that is being answered."""

    request_id: str
    is_own: bool
    """Whether the id came from the client, which may use it for several requests."""
    path: str
    trace_context: dict[str, str]
    """W3C headers that name the caller's span to which the request belongs; empty if there is none."""
    trace_response: str = ""
    """The span that is made of the request, for the client; of several prompts, that of the first one."""

    @property
    def operation(self) -> str:
        """Name of the operation in OpenTelemetry's GenAI conventions."""
        return "text_completion" if self.path == "/v1/completions" else "chat"

    def name(self, number: int) -> str:
        """Return the unique id of the request's prompt with this index, for the scheduler, its log and its records."""
        unique = f"{self.request_id}-{uuid.uuid4().hex[:8]}" if self.is_own else self.request_id
        return f"{unique}-{number}" if number else unique


HTTP_REQUEST: ContextVar[HttpRequest] = ContextVar("HTTP_REQUEST")
"""The HTTP request of the current task: of the one that answers it, and of those that this one starts."""


class RequestLog:
    """ASGI middleware that gives each request an id, and logs and counts it at its end. The id, in
    `scope["state"]["request_id"]`, is the client's own X-Request-Id, or a new one."""

    def __init__(self, app: ASGIApp, figures: HttpFigures) -> None:
        self._app = app
        self._figures = figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = HTTPConnection(scope).headers
        given, length = headers.get(REQUEST_ID, ""), headers.get("content-length", "")
        is_own = re.fullmatch(r"[!-~]{1,128}", given) is not None
        request_id = given if is_own else uuid.uuid4().hex
        trace_context = {name: headers.get(name, "") for name in ("traceparent", "tracestate")}
        http = HttpRequest(request_id, is_own, scope["path"], trace_context)
        HTTP_REQUEST.set(http)
        scope.setdefault("state", {})["request_id"] = request_id
        status, num_sent, began_s = CLIENT_GONE, 0, time.monotonic()

        async def noting(message: Message) -> None:
            nonlocal status, num_sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers_sent = MutableHeaders(scope=message)
                headers_sent[REQUEST_ID] = request_id
                if http.trace_response:
                    headers_sent[TRACE_RESPONSE] = http.trace_response
            else:
                num_sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            took_s = time.monotonic() - began_s
            received = int(length) if length.isdecimal() else 0
            if (direct := direct_body(scope)) is not None:
                num_sent += direct.num_bytes
            self._figures.add(scope["method"], scope.get("endpoint"), status, took_s, received, num_sent)
            # The path as it was sent, without its query. It is percent-encoded, and so stays on one line.
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:256]
            client = _client(scope.get("client"))
            level = logging.DEBUG if path in PROBED and status == 200 else logging.INFO
            logger.log(
                level, "%s %s %s %d %.0f ms id=%s", client, scope["method"], path, status, 1e3 * took_s, request_id
            )


def _client(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if address else "-"
