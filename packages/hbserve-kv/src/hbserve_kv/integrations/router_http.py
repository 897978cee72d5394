"""HTTP/1.1 between a router and a server. A part of an answer is passed on in the turn of the loop in which it comes.

An event of a stream costs a router one system call to read and one to write it, and little else: no task wakes up.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from urllib.parse import urlsplit

from hbserve_rpc.own_process import NO_FILE_LEFT, with_file_limit

CONNECT_TIMEOUT_S = 5.0
IDLE_S = 3.0
"""How long an idle connection is kept for another request; vLLM's server closes it after 5 s."""
MOST_WAITING = 16
"""How many pieces of an answer, each what a socket gives at a time, may wait before reading from the server pauses."""
MOST_HEAD_BYTES = 1 << 16
FIRST_LINE = re.compile(rb"(HTTP/1\.[0-9]) ([1-5][0-9]{2})( .*)?")
HEADER_LINE = re.compile(rb"([!#-'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")

Header = tuple[bytes, bytes]


class CannotConnect(ConnectionError):
    """Raised when nobody listens at a server's address."""


class Connections:
    """Connections to one server, which are kept for further requests. There are at most as many as there were requests
    at a time."""

    def __init__(self, url: str) -> None:
        """Raises ValueError if `url` is no http or https URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// or https:// URL")
        self.host: str = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._prefix = parts.path.rstrip("/")
        self._netloc = parts.netloc.rpartition("@")[2]
        self._idle: list[tuple[float, Answer]] = []

    async def ask(self, method: str, target: str, headers: Iterable[Header] = (), body: bytes = b"") -> "Answer":
        """Send a request, and return when the head of the answer is there. The caller must `release` the answer in the
        end. `headers` are without Host and Content-Length.

        Raises:
            CannotConnect: there is no connection.
            ConnectionError: the connection has ended before that, or what is answered is not HTTP.
        """
        answer = await self._connection()
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        head = f"{method} {self._prefix}{target} HTTP/1.1\r\nHost: {self._netloc}\r\nContent-Length: {len(body)}\r\n"
        try:
            await answer.begin(head.encode() + lines + b"\r\n" + body, has_body=method != "HEAD")
        except BaseException:
            answer.close()
            raise
        return answer

    async def _connection(self) -> "Answer":
        loop = asyncio.get_running_loop()
        while self._idle:
            since_s, answer = self._idle.pop()
            if answer.is_open and loop.time() - since_s < IDLE_S:
                return answer
            answer.close()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, answer = await loop.create_connection(
                    lambda: Answer(self._keep), self.host, self._port, ssl=self._ssl
                )
        except (OSError, TimeoutError) as error:
            if error.errno in NO_FILE_LEFT:  # no fault of the server, which goes on with the connections that it has
                raise ConnectionError(with_file_limit(f"cannot be connected: {error}")) from None
            raise CannotConnect(f"cannot be connected: {error or 'it does not answer'}") from None
        return answer

    def _keep(self, answer: "Answer") -> None:
        self._idle.append((asyncio.get_running_loop().time(), answer))

    def close(self) -> None:
        """Close the connections that are idle."""
        for _, answer in self._idle:
            answer.close()
        self._idle.clear()


class Answer(asyncio.Protocol):
    """A connection, and the answer to the request that is under way over it."""

    def __init__(self, keep: Callable[["Answer"], None]) -> None:
        self._keep = keep
        self._transport: asyncio.Transport
        self.is_open = True
        self.status = 0
        self.headers: list[Header] = []
        self._read: Callable[[bytes], bytes] | None = None
        """Function that takes in what has come, and returns what cannot be read yet; None when the answer is whole."""
        self._rest = b""
        self._waiting: list[bytes] = []
        self._direct: Callable[[bytes], bool] | None = None
        self._changed: asyncio.Future[None] | None = None
        self._error: ConnectionError | None = None
        self._is_whole = False

    async def begin(self, request: bytes, *, has_body: bool) -> None:
        """Send a request, and return when the head of the answer is there. For what it raises see
        `Connections.ask`."""
        self.status, self.headers, self._rest = 0, [], b""
        self._has_body, self._is_whole, self._read = has_body, False, self._read_head
        self._transport.write(request)
        while not self.status:
            await self._change()

    def header(self, name: bytes) -> bytes:
        """Return the value of the first header with this name, which is in lower case; b"" if there is none."""
        return next((value for each, value in self.headers if each.lower() == name), b"")

    async def pieces(self, direct: Callable[[bytes], bool] | None = None) -> AsyncIterator[bytes]:
        """Yield the body as it comes. What comes while this waits is given to `direct`; only what that does not take,
        by returning false, is yielded.

        Raises:
            ConnectionError: the connection has ended in the middle of the answer.
        """
        while True:
            while self._waiting:
                piece = b"".join(self._waiting)
                self._waiting.clear()
                yield piece
            self._transport.resume_reading()
            if self._is_whole:
                return
            self._direct = direct
            await self._change()

    async def read(self) -> bytes:
        """Return all of the body. For what it raises see `pieces`."""
        return b"".join([piece async for piece in self.pieces()])

    def release(self) -> None:
        """Keep the connection for other requests if all of the answer has come and was read. Otherwise close it, by
        which the server hears that nobody reads."""
        self._direct = None
        if self.is_open and self._is_whole and not self._waiting:
            self._keep(self)
        else:
            self.close()

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    async def _change(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed = asyncio.get_running_loop().create_future()
        try:
            await self._changed
        finally:
            self._changed = None

    def _tell(self) -> None:
        self._direct = None
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # ---- the event loop's ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        try:
            while data and self._read is not None:
                read = self._read
                data = read(data)
                if self._read is read:
                    break
        except ValueError as error:
            self._lose(f"what it answers is no HTTP: {error}")
            return
        self._rest = data
        if self._read is None and data:
            self.close()  # the server has sent more than it was asked for

    def connection_lost(self, error: Exception | None) -> None:
        if self._read == self._read_to_the_end and error is None:
            self._end()
        self._lose(str(error or "the connection has ended before the answer"))

    def _lose(self, why: str) -> None:
        self.is_open = False
        self._transport.abort()
        if not self._is_whole:
            self._error = self._error or ConnectionError(why)
        self._tell()

    # ---- what is answered ----------------------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> bytes:
        status = 100
        while status < 200:  # after an interim answer another one follows
            head, end, rest = data.partition(b"\r\n\r\n")
            if not end:
                if len(data) > MOST_HEAD_BYTES:
                    raise ValueError("its header does not end")
                return data
            first, *lines = head.split(b"\r\n")
            begins = FIRST_LINE.fullmatch(first)
            if begins is None:
                raise ValueError(repr(first[:100]))
            version, status, data = begins[1], int(begins[2]), rest
        self.headers = [_header(line) for line in lines]
        self.status = status
        self._keeps = version == b"HTTP/1.1" and self.header(b"connection").lower() != b"close"
        self._read = self._reader()
        if self._read is None:
            self._end()
        self._tell()
        return data

    def _reader(self) -> Callable[[bytes], bytes] | None:
        """Return the function that reads the body; None if there is no body."""
        length = self.header(b"content-length")
        if not self._has_body or self.status in (204, 304) or length == b"0":
            return None
        if coding := self.header(b"transfer-encoding"):
            if coding.lower() != b"chunked":
                raise ValueError(f"the transfer coding {coding[:20]!r} is not known")
            self._left, self._is_in_trailer = 0, False
            return self._read_chunks
        if length:
            self._left = _number(length, 10)
            return self._read_length
        self._keeps = False
        return self._read_to_the_end

    def _read_chunks(self, data: bytes) -> bytes:
        parts, at = [], 0
        while at < len(data):
            if self._left > 2:  # bytes of the chunk and of the line end behind it
                parts.append(data[at : at + self._left - 2])
                at += len(parts[-1])
                self._left -= len(parts[-1])
            elif self._left:
                taken = min(self._left, len(data) - at)
                at += taken
                self._left -= taken
            else:
                end = data.find(b"\r\n", at)
                if end < 0:
                    if len(data) - at > MOST_HEAD_BYTES:
                        raise ValueError("a line between its chunks does not end")
                    break
                line, at = data[at:end], end + 2
                if self._is_in_trailer:
                    if not line:
                        self._end(b"".join(parts))
                        return data[at:]
                elif size := _number(line.partition(b";")[0].strip(), 16):
                    self._left = size + 2
                else:
                    self._is_in_trailer = True
        self._give(b"".join(parts))
        return data[at:]

    def _read_length(self, data: bytes) -> bytes:
        piece = data[: self._left]
        self._left -= len(piece)
        if self._left:
            self._give(piece)
        else:
            self._end(piece)
        return data[len(piece) :]

    def _read_to_the_end(self, data: bytes) -> bytes:
        self._give(data)
        return b""

    def _give(self, piece: bytes) -> None:
        if not piece or (self._direct is not None and self._direct(piece)):
            return
        self._waiting.append(piece)
        if len(self._waiting) > MOST_WAITING:
            self._transport.pause_reading()
        self._tell()

    def _end(self, piece: bytes = b"") -> None:
        self._give(piece)
        self._is_whole, self._read = True, None
        self.is_open = self.is_open and self._keeps
        if not self._keeps:
            self._transport.close()
        self._tell()


def _header(line: bytes) -> Header:
    found = HEADER_LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"{line[:100]!r} is not a header")
    return found[1], found[2].strip()


def _number(digits: bytes, base: int) -> int:
    if len(digits) > 15 or not digits.isalnum():
        raise ValueError(f"{digits[:20]!r} is not a number")
    return int(digits, base)
