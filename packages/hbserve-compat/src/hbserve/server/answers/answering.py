"""Sending of answers over HTTP: in one piece or as a stream, while the connection to the client is watched."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from starlette.types import Message, Receive, Scope, Send

from hbserve.server.answers.answers import Answers, News
from hbserve.server.http.api_error import ApiError, as_api_error
from hbserve.server.http.direct_body import DirectBody

logger = logging.getLogger(__name__)

EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
JSON = (b"content-type", b"application/json")
# Keep proxies from collecting chunks until they have enough of them, which would defeat streaming.
NO_BUFFERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class CancellableResponse:
    """An ASGI response that runs a job, and cancels it when the client disconnects and so cannot read the result."""

    def __init__(self, job: Callable[[Send], Awaitable[None]]) -> None:
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = False

        async def noting(message: Message) -> None:
            nonlocal sent
            sent = True
            await send(message)

        job = asyncio.ensure_future(self._job(noting))
        watcher = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((job, watcher), return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                job.result()
        except Exception as error:
            if sent or (known := as_api_error(error)) is None:
                raise
            await known.response(scope)(scope, receive, send)
        finally:
            job.cancel()
            watcher.cancel()
            await asyncio.gather(job, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AnswerFormat(Protocol):
    """The format of one answer for its client, as events or in one piece."""

    def opening(self) -> bytes:
        """Return the events that are sent with the status line."""

    def chunks(self, news: News) -> bytes:
        """Return the events for new pieces of the answer."""

    def closing(self) -> bytes:
        """Return the last events of a complete answer."""

    def failed(self, error: ApiError) -> bytes:
        """Return the last events of a failed answer."""

    def take(self, news: News) -> None:
        """Keep new pieces for `whole`. Replaces `chunks` for a client that wants the answer in one piece."""

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""


class Reply:
    """The sending of one answer to its client. The status line goes with the first bytes."""

    def __init__(
        self, send: Send, headers: dict[str, str], first_byte_timeout_s: float, direct: DirectBody | None = None
    ) -> None:
        """Send nothing yet. A stream will begin after `first_byte_timeout_s` even without a token. `direct` writes past
        ASGI; None: there is no such way."""
        self._send = send
        self._direct = direct
        self._first_byte_timeout_s = first_byte_timeout_s
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def answer(self, answers: Answers, rendering: AnswerFormat, *, streamed: bool) -> None:
        """Send the answer. Raises the error that ends one of the answers; once a stream has begun, the error becomes an
        event of the stream instead."""
        await (self._stream(answers, rendering) if streamed else self._whole(answers, rendering))

    async def _whole(self, answers: Answers, rendering: AnswerFormat) -> None:
        await answers.each(rendering.take)
        body = msgspec.json.encode(rendering.whole())
        await self._start([JSON, (b"content-length", str(len(body)).encode())])
        await self._part(body, more=False)

    async def _stream(self, answers: Answers, rendering: AnswerFormat) -> None:
        first = await answers.first(self._first_byte_timeout_s)
        await self._start([EVENT_STREAM, *NO_BUFFERS])
        await self._part(rendering.opening() + rendering.chunks(first))
        try:
            await self._rest(answers, rendering)
            last = rendering.closing()
        except Exception as error:
            last = rendering.failed(_told(error))
        await self._part(last, more=False)

    async def _rest(self, answers: Answers, rendering: AnswerFormat) -> None:
        """Send all chunks after the first, each as it comes. If the client does not read, they are sent together."""
        direct, held = self._direct, b""

        def give(news: News) -> bool:
            nonlocal held
            chunks = rendering.chunks(news)
            if direct is not None:
                return bool(chunks) and not direct.write(chunks)
            held = chunks
            return True

        while await answers.each(give):
            await self._part(held)  # even if it is empty, because this waits until the client reads

    async def _start(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": [*headers, *self._headers]})

    async def _part(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _told(error: Exception) -> ApiError:
    known = as_api_error(error)
    if known is None:
        logger.exception("an answer failed; please report it", exc_info=error)
    return known or ApiError(500, "internal error; the server's log has it")
