"""A client of any server's /v1/chat/completions, which `hbserve chat --url` uses."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from hbserve.client.event_data import EventData
from hbserve.client.server_url import parse_url, require_header
from hbserve_rpc import PeerLost, RemoteError
from hbserve_rpc.plain_values import shown

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
"""How long a server may take to answer the first check. The answer to a chat has no such limit: it may be queued."""
SHOWN = 200
"""Number of bytes of an unexpected answer that are shown."""


def why_not_connected(address: str, error: Exception) -> str:
    """Describe, in one line, why a connection failed. A certificate that is not trusted does not mean that there is no
    server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        cure = "SSL_CERT_FILE names a file of certificates that are"
        return f"the certificate of {address} is not trusted: {error.verify_message}; {cure}"
    if isinstance(error, ssl.SSLError):
        return f"the server at {address} does not speak TLS as asked for ({error.reason}); is its URL http://?"
    return f"no server at {address}: {error or 'no answer'}"


@dataclass(frozen=True)
class _Head:
    """The head of an answer."""

    status: int
    fields: dict[str, str]
    """Values of the header, by names in lower case."""


class ChatClient:
    """Sends requests over asyncio's plain streams, so that the command needs no HTTP library."""

    def __init__(self, url: str, api_key: str | None, **parameters: Any) -> None:
        """Take a server's `url`, with or without /v1. Raises InvalidAddress, InvalidRequest."""
        self._url = parse_url("--url", url)
        if api_key:
            require_header("--api-key", "Authorization", api_key)
        self._api_key = api_key
        self._parameters = parameters

    async def require_server(self) -> None:
        """Ask for the list of models, so that a wrong address or key is reported before the first question.

        Raises:
            PeerLost: there is no server at the address, or it does not answer.
            RemoteError: the server does not accept the key, or does not speak HTTP.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S), self._asked("GET", "/v1/models") as (head, parts):
                # Any other status is left to the first question: the server may be loading, or have no such list.
                if head.status in (401, 403):
                    raise RemoteError(_message(head, b"".join([part async for part in parts])))
        except TimeoutError:
            raise PeerLost(
                f"--url: {self._url.authority} accepts connections, but did not answer within {ANSWER_TIMEOUT_S:g} s"
            ) from None

    async def answer(self, messages: list[dict[str, str]]) -> AsyncIterator[tuple[str, str | None]]:
        """Yield the text of an answer as it comes, and with its last piece the reason why it ended.

        Raises:
            PeerLost: there is no server at the address, or the connection or the answer has ended too early.
            RemoteError: the server refused or failed, with its message; or it does not answer as OpenAI's API does.
        """
        body = json.dumps({"messages": messages, "stream": True, **self._parameters}).encode()
        async with self._asked("POST", "/v1/chat/completions", body) as (head, parts):
            if head.status != 200:
                raise RemoteError(_message(head, b"".join([part async for part in parts])))
            async for text, reason in self._texts(parts):
                yield text, reason

    async def _texts(self, parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, str | None]]:
        """Yield the content of the events of a stream."""
        events, beginning, has_ended = EventData(), b"", False
        async for part in parts:
            beginning = (beginning + part)[:SHOWN]
            for event in events.feed(part):
                chunk = json.loads(event)
                if chunk.get("error"):
                    raise RemoteError(_error_of(chunk) or f"--url: the server failed: {shown(chunk)}")
                for choice in chunk["choices"]:
                    reason = choice.get("finish_reason")
                    has_ended = has_ended or reason is not None
                    yield choice["delta"].get("content") or "", reason
        if not has_ended and not events.are_done:
            if not events.any:
                begins = f"its answer begins with {shown(beginning.decode(errors='replace'))}"
                raise RemoteError(f"--url: the server there answers without server-sent events: {begins}")
            raise asyncio.IncompleteReadError(b"", None)

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: bytes = b""
    ) -> AsyncIterator[tuple["_Head", AsyncIterator[bytes]]]:
        """Yield the head and the body of an answer. Errors of the connection, here and in the block, become ours."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                context = ssl.create_default_context() if self._url.is_secure else None
                reader, writer = await asyncio.open_connection(
                    self._url.host, self._url.port, ssl=context, limit=1 << 24
                )
        except (OSError, TimeoutError) as error:
            raise PeerLost(f"--url: {why_not_connected(self._url.authority, error)}") from None
        try:
            writer.write(self._head(method, path, len(body)) + body)
            head = await _read_head(reader)
            yield head, _body(head, reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise PeerLost(f"--url: {self._url.authority} has ended its answer too early") from error
        except (ValueError, LookupError, TypeError, AttributeError, asyncio.LimitOverrunError) as error:
            raise RemoteError(f"--url: the server there does not answer as OpenAI's API does: {error!r}") from error
        finally:
            writer.close()

    def _head(self, method: str, path: str, length: int) -> bytes:
        lines = [
            f"{method} {self._url.path.removesuffix('/v1')}{path} HTTP/1.1",
            f"Host: {self._url.authority}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            "Connection: close",
        ]
        if self._api_key:
            lines.append(f"Authorization: Bearer {self._api_key}")
        return "\r\n".join([*lines, "", ""]).encode()


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    """Read the head of an answer, and of all interim ones (100 Continue) before it."""
    begin = await reader.readexactly(5)
    if begin != b"HTTP/":  # a server of another protocol, such as HBServe's RPC, may never send a whole head
        raise RemoteError(f"--url: the server there does not speak HTTP: {begin!r}")
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = first.split()
    if len(words) < 2 or not words[1].isdecimal():
        raise RemoteError(f"--url: the server there does not speak HTTP: {first[:80]!r}")
    if 100 <= int(words[1]) < 200:
        return await _read_head(reader)
    pairs = (line.partition(":") for line in lines)
    return _Head(int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs})


async def _body(head: _Head, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the body of an answer. Raises IncompleteReadError if the connection ends before it does."""
    if head.fields.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readuntil(b"\n")
    elif (length := head.fields.get("content-length")) is not None:
        left = int(length)
        while left > 0:
            if not (part := await reader.read(min(left, 1 << 16))):
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(part)
            yield part
    else:
        while part := await reader.read(1 << 16):
            yield part


def _message(head: _Head, body: bytes) -> str:
    cure = "; --api-key or HBSERVE_API_KEY sends one" if head.status == 401 else ""
    with contextlib.suppress(ValueError):
        if (text := _error_of(json.loads(body))) is not None:
            return text + cure
    if (place := head.fields.get("location")) is not None:
        cure = f"; it points to {shown(place)}"
    return f"--url: the server answered {head.status}: {shown(body[:SHOWN].decode(errors='replace'))}{cure}"


def _error_of(answer: Any) -> str | None:
    """Return the message of an error as OpenAI's API sends it, or of one that is only a text, as of other servers."""
    error = answer.get("error") if isinstance(answer, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return text if isinstance(text, str) else None
