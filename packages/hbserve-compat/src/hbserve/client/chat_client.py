"""A client of any server's /v1/chat/completions, which `hbserve chat --url` uses."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hbserve.client.event_data import EventData
from hbserve.client.http_stream import HttpAnswer, HttpClient
from hbserve.client.server_url import require_header
from hbserve_rpc import InvalidRequest, PeerLost, RemoteError
from hbserve_rpc.plain_values import shown

ANSWER_TIMEOUT_S = 10.0
"""How long a server may take to answer the first check. The answer to a chat has no such limit: it may be queued."""
SHOWN = 200
"""Number of bytes of an unexpected answer that are shown."""


class ChatClient:
    """Asks for the answers of a chat, each over a connection of its own: people pause for longer than routers keep idle
    connections."""

    def __init__(self, url: str, api_key: str | None, **parameters: Any) -> None:
        """Take a server's `url`, with or without /v1. Raises InvalidAddress, InvalidRequest."""
        headers = {"Connection": "close"}
        if api_key:
            require_header("--api-key", "Authorization", api_key)
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = HttpClient(url, headers, option="--url")
        self._http.prefix = self._http.prefix.removesuffix("/v1")
        self._parameters = parameters

    async def require_server(self) -> None:
        """Ask for the list of models, so that a wrong address or key is reported before the first question.

        Raises:
            PeerLost: there is no server at the address, or it does not answer.
            RemoteError: the server does not accept the key, or does not speak HTTP.
        """
        with _naming_the_option():
            await self._http.connect()
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    answer = await self._http.request("GET", "/v1/models")
            except TimeoutError:
                late = f"accepts connections, but did not answer within {ANSWER_TIMEOUT_S:g} s"
                raise PeerLost(f"{self._http.authority} {late}") from None
        # Any other status is left to the first question: the server may be loading, or have no such list.
        if answer.status in (401, 403):
            raise RemoteError(_message(answer))

    async def answer(self, messages: list[dict[str, str]]) -> AsyncIterator[tuple[str, str | None]]:
        """Yield the text of an answer as it comes, and with its last piece the reason why it ended.

        Raises:
            PeerLost: there is no server at the address, or the connection or the answer has ended too early.
            InvalidRequest: the server refuses these messages or parameters, with its message.
            RemoteError: the server failed, with its message; or it does not answer as OpenAI's API does.
        """
        body = json.dumps({"messages": messages, "stream": True, **self._parameters}).encode()
        pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        asking = asyncio.create_task(self._http.request("POST", "/v1/chat/completions", body, pieces.put_nowait))
        asking.add_done_callback(lambda _: pieces.put_nowait(None))
        events, beginning, has_ended = EventData(), b"", False
        try:
            while (piece := await pieces.get()) is not None:
                beginning = (beginning + piece)[:SHOWN]
                for text, reason in _texts(events.feed(piece)):
                    has_ended = has_ended or reason is not None
                    yield text, reason
            with _naming_the_option():
                answer = await asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        if answer.status != 200:
            raise (InvalidRequest if answer.status in (400, 413, 422) else RemoteError)(_message(answer))
        if not events.any:
            begins = f"its answer begins with {shown(beginning.decode(errors='replace'))}"
            raise RemoteError(f"--url: the server there answers without server-sent events: {begins}")
        if not has_ended and not events.are_done:
            raise PeerLost("--url: the server has ended its answer too early")


@contextlib.contextmanager
def _naming_the_option() -> Iterator[None]:
    """Put the option that has the server's address before errors of the connection."""
    try:
        yield
    except (PeerLost, RemoteError) as error:
        raise type(error)(f"--url: {error}") from None


def _texts(events: list[bytes]) -> Iterator[tuple[str, str | None]]:
    """Yield the content of events. Raises RemoteError."""
    try:
        for event in events:
            chunk = json.loads(event)
            if chunk.get("error"):
                raise RemoteError(_error_of(chunk) or f"--url: the server failed: {shown(chunk)}")
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or "", choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RemoteError(f"--url: the server there does not answer as OpenAI's API does: {error!r}") from error


def _message(answer: HttpAnswer) -> str:
    cure = "; --api-key or HBSERVE_API_KEY sends one" if answer.status == 401 else ""
    with contextlib.suppress(ValueError):
        if (text := _error_of(json.loads(answer.body))) is not None:
            return text + cure
    if answer.location is not None:
        cure = f"; it points to {shown(answer.location)}"
    body = shown(answer.body[:SHOWN].decode(errors="replace"))
    return f"--url: the server answered {answer.status}: {body}{cure}"


def _error_of(answer: Any) -> str | None:
    """Return the message of an error as OpenAI's API sends it, or of one that is only a text, as of other servers."""
    error = answer.get("error") if isinstance(answer, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return text if isinstance(text, str) else None
