"""A client of any server's /v1/chat/completions, which `hbserve chat --url` uses."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hbserve.client.event_data import EventData
from hbserve.client.server_url import parse_url, require_header
from hbserve_rpc import PeerLost, RemoteError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
"""How long a server may take to answer the first check. The answer to a chat has no such limit: it may be queued."""


def why_not_connected(address: str, error: Exception) -> str:
    """Describe, in one line, why a connection failed. A certificate that is not trusted does not mean that there is no
    server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        cure = "SSL_CERT_FILE names a file of certificates that are"
        return f"the certificate of {address} is not trusted: {error.verify_message}; {cure}"
    return f"no server at {address}: {error or 'no answer'}"


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
            async with asyncio.timeout(ANSWER_TIMEOUT_S), self._asked("GET", "/v1/models") as (status, parts):
                # Any other status is left to the first question: the server may be loading, or have no such list.
                if status in (401, 403):
                    raise RemoteError(_message(status, b"".join([part async for part in parts])))
        except TimeoutError:
            raise PeerLost(
                f"--url: {self._url.authority} accepts connections, but did not answer within {ANSWER_TIMEOUT_S:g} s"
            ) from None

    async def answer(self, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        """Yield the text of an answer as it comes.

        Raises:
            PeerLost: there is no server at the address, or the connection has ended.
            RemoteError: the server refused or failed; has the server's message.
        """
        body = json.dumps({"messages": messages, "stream": True, **self._parameters}).encode()
        async with self._asked("POST", "/v1/chat/completions", body) as (status, parts):
            if status != 200:
                raise RemoteError(_message(status, b"".join([part async for part in parts])))
            async for text in _texts(parts):
                yield text

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: bytes = b""
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Yield the status and the body of an answer. Errors of the connection, here and in the block, become ours."""
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
            status, is_chunked = await _read_head(reader)
            yield status, _chunked(reader) if is_chunked else _plain(reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise PeerLost(f"--url: {self._url.authority} has closed the connection") from error
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


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Return the status, and whether the body is in chunked transfer coding."""
    begin = await reader.readexactly(5)
    if begin != b"HTTP/":  # a server of another protocol, such as HBServe's RPC, may never send a whole head
        raise RemoteError(f"--url: the server there does not speak HTTP: {begin!r}")
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    words = first.split()
    if len(words) < 2 or not words[1].isdecimal():
        raise RemoteError(f"--url: the server there does not speak HTTP: {first[:80]!r}")
    return int(words[1]), "transfer-encoding: chunked" in lines


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(1 << 16):
        yield part


async def _texts(parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield the content of the events of a stream."""
    events = EventData()
    async for part in parts:
        for event in events.feed(part):
            chunk = json.loads(event)
            if "error" in chunk:
                raise RemoteError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""


def _message(status: int, body: bytes) -> str:
    cure = "; --api-key or HBSERVE_API_KEY sends one" if status == 401 else ""
    try:
        return str(json.loads(body)["error"]["message"]) + cure
    except (ValueError, KeyError, TypeError):
        return f"--url: the server answered {status}: {body[:200]!r}"
