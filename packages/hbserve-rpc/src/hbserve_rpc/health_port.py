"""A small HTTP port beside the RPC of a process, for probes and for Prometheus: /health, /ready and /metrics."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable

from hbserve_rpc.address import format_address
from hbserve_rpc.errors import AddressInUse
from hbserve_rpc.listening_socket import ListeningSocket
from hbserve_rpc.metrics_text import CONTENT_TYPE, Family, text_of

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""Longest time for one connection: to read its request, to answer it, and for the client to take the answer."""
MOST_HEAD_BYTES = 8192
PLAIN = "text/plain; charset=utf-8"


class HealthPort:
    """HTTP server in the event loop that ran `start`. It answers GET and HEAD, one request on each connection."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        why_dead: Callable[[], str],
        why_not_ready: Callable[[], str],
        metrics: Callable[[], Awaitable[Iterable[Family]]],
    ) -> None:
        """Make a port that does not listen yet.

        port: 0 lets the system choose. why_dead: returns why the process should be ended, or "" while it should not.
        why_not_ready: returns why it serves nobody at the moment, or "".
        """
        self._host = host
        self._port = port
        self._why_dead = why_dead
        self._why_not_ready = why_not_ready
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Address `host:port`; it is known from `start` on."""
        assert self._server is not None, "start() comes first"
        return format_address(self._host, self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Begin to listen. Raises AddressInUse."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listening = ListeningSocket(socket.create_server((self._host, self._port), family=family))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                where = format_address(self._host, self._port)
                raise AddressInUse(f"{where} (health_port) is in use by another process; choose another one") from error
            raise
        self._server = await asyncio.start_server(self._accept, sock=listening, limit=MOST_HEAD_BYTES)
        logger.info("/health, /ready and /metrics at http://%s", self.address)

    async def stop(self) -> None:
        """Stop listening, and cancel answers under way. May be called twice, and without `start`."""
        if self._server is not None:
            self._server.close()
        for task in list(self._answering):
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            async with asyncio.timeout(PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(head))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever sends no request gets no answer
        except asyncio.CancelledError:  # `stop` cancels it; asyncio would log a task that ends as cancelled
            pass
        finally:
            self._answering.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, head: bytes) -> bytes:
        method, path = [*head.split(b"\r\n", 1)[0].decode("latin-1").split(" "), "", ""][:2]
        kind = PLAIN
        if method not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"GET or HEAD\n"
        elif path.partition("?")[0] == "/metrics":
            status, body, kind = "200 OK", text_of(await self._metrics()), CONTENT_TYPE
        elif path.partition("?")[0] in ("/health", "/ready"):
            why = self._why_dead() or (self._why_not_ready() if path.startswith("/ready") else "")
            status = "503 Service Unavailable" if why else "200 OK"
            body = f"{why}\n".encode("utf-8", "replace") if why else b""
        else:
            status, body = "404 Not Found", b"/health, /ready or /metrics\n"
        lines = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return lines.encode("ascii") + (b"" if method == "HEAD" else body)
