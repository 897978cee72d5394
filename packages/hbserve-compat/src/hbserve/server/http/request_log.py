"""An id for each request, and a line in the log at its end: who asked what, and how it ended, but no text of theirs."""

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
"""Asked again and again by programs."""
REQUEST_ID = "x-request-id"
TRACE_RESPONSE = "traceresponse"
"""Of W3C's drafts, and of OpenTelemetry: the span that has answered."""
CLIENT_GONE = 499
"""Status in the log of a request whose client has gone before its answer had one, as nginx has it."""


@dataclass
class HttpRequest:
    """The request that is being answered."""

    request_id: str
    is_own: bool
    """Its id is the client's, who may give it to another one too."""
    path: str
    trace_context: dict[str, str]
    """W3C headers: the span of the caller that it belongs to, if there is one."""
    trace_response: str = ""
    """The span that is made of it, as the client hears it; of several prompts the first one's."""

    @property
    def operation(self) -> str:
        """The operation as OpenTelemetry's GenAI conventions name it."""
        return "text_completion" if self.path == "/v1/completions" else "chat"

    def name(self, number: int) -> str:
        """Id of its prompt with this number in the scheduler, its log and its records: no other one has it."""
        unique = f"{self.request_id}-{uuid.uuid4().hex[:8]}" if self.is_own else self.request_id
        return f"{unique}-{number}" if number else unique


HTTP_REQUEST: ContextVar[HttpRequest] = ContextVar("HTTP_REQUEST")
"""Of the task that answers it, and of those that it starts."""


class RequestLog:
    """ASGI middleware. `scope["state"]["request_id"]` is the client's own X-Request-Id, or a new one."""

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
            # A path without its query, as it was sent: quoted, so that it is one line whatever it says.
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:256]
            client = _client(scope.get("client"))
            level = logging.DEBUG if path in PROBED and status == 200 else logging.INFO
            logger.log(
                level, "%s %s %s %d %.0f ms id=%s", client, scope["method"], path, status, 1e3 * took_s, request_id
            )


def _client(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if address else "-"
