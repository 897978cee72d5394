"""A connection to the HTTP server: uvicorn's protocol, with what it lacks against clients that misbehave."""

import asyncio
import time
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hbserve.server.http.api_error import ApiError
from hbserve.server.http.direct_body import EXTENSION, DirectBody

MOST_HEAD_BYTES = 1 << 20
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
LINGER_S = 10.0
"""How long a client may go on sending a request that was answered already, before its connection ends."""
HALF_CLOSED = ApiError(
    400, "the connection was shut down for writing before the answer (nc -N does so): taken for a client that has gone"
)


class Connection(HttpToolsProtocol):
    """One connection. It bounds what httptools does not: the head of a request, and what may follow its body. It knows
    whether it waits for a request, and since when. It lets answers be written directly. It ends all requests of a
    client that disconnects, and answers one that only stops sending."""

    num_unbounded = 0
    """Bytes since the last complete part of a request, or piece of a body. Bodies have a bound of their own."""

    is_whole = False
    """Whether the last request has been received completely."""
    has_begun = False
    """Whether any request has begun."""
    heard_s: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of uvicorn's own
        self.heard_s = time.monotonic()
        self._cycles: list[RequestResponseCycle] = []
        """Requests whose answers have not ended: several, if the client pipelines."""
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", _LeavingTransport(transport, self))

    def connection_lost(self, exc: Exception | None) -> None:
        for each in self._cycles:  # uvicorn itself tells only the last one
            if not each.response_complete:
                each.disconnected = True
                each.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]  # whether the transport is kept
        """Handle a client that sends no more. It cannot be told from one that has gone, so what is computed for it
        ends. GET and HEAD, which cost nothing, are answered: programs that probe a port may end their side first."""
        waiting = [each for each in self._cycles if not each.response_complete]
        if not waiting or not self.is_whole or not self.transport.can_write_eof():
            return False
        if all(each.scope["method"] in ("GET", "HEAD") for each in waiting):
            waiting[-1].keep_alive = False
            return True
        if not waiting[0].response_started:
            body = msgspec.json.encode(HALF_CLOSED.body())
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
        return False

    def on_message_begin(self) -> None:
        self.is_whole, self.has_begun = False, True
        super().on_message_begin()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self.heard_s = time.monotonic()
        self.num_unbounded += len(data)
        super().data_received(data)
        if self.num_unbounded > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.has_begun = False  # so that `close` does not read on: the request may have no end
            self.transport.close()

    def on_headers_complete(self) -> None:
        self.num_unbounded = 0
        super().on_headers_complete()
        self._cycles = [each for each in self._cycles if not each.response_complete]
        if self.cycle is not None and self.cycle.scope is self.scope:  # its task has not begun
            self._cycles.append(self.cycle)
            if self.scope["http_version"] == "1.0":
                _send_without_chunks(self.cycle)
            else:
                self.scope["extensions"] = {EXTENSION: {"body": DirectBody(self.cycle)}}

    def on_body(self, body: bytes) -> None:
        self.num_unbounded = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.is_whole = True
        self.num_unbounded = 0
        super().on_message_complete()


def _send_without_chunks(cycle: RequestResponseCycle) -> None:
    """Send without chunks, for a client of HTTP/1.0: a body of unknown length ends with the connection."""
    send, has_length = cycle.send, True

    async def send_as_it_is(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = None if has_length else False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_as_it_is  # type: ignore[method-assign]


class _LeavingTransport:
    """A connection's transport whose `close` gives the client time to read its answer.

    Data that arrives at a closed socket resets the connection, and many clients then do not read their answer. So while
    a request is still arriving, only the sending side is closed, and what arrives is thrown away.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection
        self._is_leaving = False
        self.write = transport.write  # called for each token, so it should not take the way through __getattr__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_leaving or self._transport.is_closing()

    def close(self) -> None:
        is_read = self._connection.is_whole or not self._connection.has_begun
        if is_read or self.is_closing() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._is_leaving = True
        self._transport.write_eof()
        self._connection.flow.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.close)
