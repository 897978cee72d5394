"""A client for HTTP/1.1 that reuses connections, and passes the body of an answer on piece by piece as it comes.

A load generator's own delays are a part of each figure. So bytes go from the socket to a parser in C, and each piece of
a body is passed on in the same iteration of the event loop, without waking a task.
"""

import asyncio
import os
import re
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple

import httptools

from hbserve.client.server_url import parse_url
from hbserve_rpc import PeerLost, RemoteError

CONNECT_TIMEOUT_S = 30.0


class HttpAnswer(NamedTuple):
    """The answer to a request."""

    status: int
    body: bytes
    location: str | None
    """Address that a redirection points to."""


def why_not_connected(address: str, error: Exception) -> str:
    """Describe, in one line, why a connection failed. A certificate that is not trusted does not mean that there is no
    server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        cure = "SSL_CERT_FILE names a file of certificates that are"
        return f"the certificate of {address} is not trusted: {error.verify_message}; {cure}"
    if isinstance(error, ssl.SSLError):
        return f"the server at {address} does not speak TLS as asked for ({error.reason}); is its URL http://?"
    # asyncio repeats each address that it has tried, as a tuple.
    numbers = dict.fromkeys(re.findall(r"\[Errno (\d+)\] Connect call failed", str(error)))
    reason = ", ".join(os.strerror(int(number)) for number in numbers) or str(error) or "no answer"
    return f"no server at {address}: {reason}"


class HttpClient:
    """A pool of connections to one server, which has at most as many as there are requests at a time."""

    def __init__(
        self, base_url: str, headers: dict[str, str], *, option: str = "--base-url", verify: bool = True
    ) -> None:
        """Connect to nothing yet. `option` has set `base_url`. Raises InvalidAddress."""
        url = parse_url(option, base_url)
        self._ssl: ssl.SSLContext | None = None
        if url.is_secure:
            self._ssl = ssl.create_default_context() if verify else ssl._create_unverified_context()
        self._address = url.host, url.port
        self.authority = url.authority
        """Host and port, as errors name the server."""
        self.prefix = url.path
        """Path of the base URL, which is put before the path of every request."""
        lines = {"Host": url.authority, "Content-Type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[_Connection] = []

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        on_data: Callable[[bytes], None] | None = None,
        request_id: str = "",
    ) -> HttpAnswer:
        """Send a request, and wait for the whole answer.

        `on_data` is called with each piece of the body as it comes, if the status is 200. The returned body is then
        empty.

        Raises:
            PeerLost: there is no connection, or it ended before the answer.
            RemoteError: the server does not speak HTTP.
        """
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n"
        head += f"X-Request-Id: {request_id}\r\n\r\n" if request_id else "\r\n"
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                break
        else:
            connection = await self._connect()
        try:
            answer = await connection.ask(head.encode() + body, on_data)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return answer

    async def connect(self) -> None:
        """Open a connection, which the next request uses. Raises PeerLost."""
        self._idle.append(await self._connect())

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(_Connection, *self._address, ssl=self._ssl)
        except OSError as error:
            raise PeerLost(why_not_connected(self.authority, error)) from None
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._answer: asyncio.Future[HttpAnswer] | None = None
        self._on_data: Callable[[bytes], None] | None = None
        self._body: list[bytes] = []
        self._fields: dict[bytes, bytes] = {}
        self._keep_alive, self._has_head = True, False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, on_data: Callable[[bytes], None] | None) -> HttpAnswer:
        assert self._transport is not None
        assert self._answer is None, "one request at a time"
        self._parser, self._has_head = httptools.HttpResponseParser(self), False
        self._on_data, self._body, self._fields = on_data, [], {}
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- called by the event loop ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # there is no request that this could answer
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(error.__context__ or error)

    def connection_lost(self, error: Exception | None) -> None:
        is_framed = not self._fields.keys().isdisjoint((b"content-length", b"transfer-encoding"))
        if error is None and self._has_head and not is_framed:  # then the end of the connection is that of the body
            self._finish()
        self._fail(PeerLost(f"the server has ended its answer too early: {error or 'it closed the connection'}"))

    def _fail(self, error: BaseException) -> None:
        if self._answer is not None and not self._answer.done():
            known = error if isinstance(error, Exception) else RuntimeError(repr(error))
            if isinstance(known, (httptools.HttpParserError, httptools.HttpParserUpgrade)):
                known = RemoteError(f"the server there does not speak HTTP: {known}")
            self._answer.set_exception(known)
        self.close()

    # ---- called by the parser ----------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()
        self._has_head = self._parser.get_status_code() >= 200  # a lower one is interim (100 Continue)

    def on_body(self, body: bytes) -> None:
        if self._on_data is not None and self._parser.get_status_code() == 200:
            self._on_data(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._has_head:
            if not self._keep_alive and self._transport is not None:
                self._transport.close()
            self._finish()

    def _finish(self) -> None:
        if self._answer is not None and not self._answer.done():
            status, place = self._parser.get_status_code(), self._fields.get(b"location")
            location = None if place is None else place.decode("latin-1")
            self._answer.set_result(HttpAnswer(status, b"".join(self._body), location))
