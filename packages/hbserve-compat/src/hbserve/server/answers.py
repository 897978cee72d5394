"""All answers to one HTTP request: their tokens as they come, of whichever comes first."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

from hbserve.results import GenerationDelta
from hbserve.server.api_error import try_again
from hbserve.server.request_log import HTTP_REQUEST, HttpRequest
from hbserve.server.service import ServedModel
from hbserve.server.spans import Asked
from hbserve.text_request import TextRequest
from hbserve_rpc import SamplingParams
from hbserve_rpc.prompt_shape import PromptShape
from hbserve_rpc.trace_context import in_trace

MOST_NEWS = 256
"""That wait for a client which does not read. Further tokens wait in the scheduler, together."""
News = list[tuple[int, GenerationDelta]]
"""Number of the answer, and what is new of it."""


class Answers:
    """Answers to some prompts, to each as many as its `params` say: an asynchronous context manager, which submits
    them, and at its end aborts those that are still running."""

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[tuple[int, ...]],
        params: Sequence[SamplingParams],
        *,
        skip_special_tokens: bool = True,
        only_prompt: bool = False,
    ) -> None:
        """only_prompt: what is known of the prompts is wanted, and no token of an answer."""
        self._only_prompt = only_prompt
        self._model = model
        self._wanted = list(zip(prompts, params, strict=True))
        self._make = partial(
            TextRequest, model.scheduler, model.encoder.tokenizer, skip_special_tokens=skip_special_tokens
        )
        self._news: News = []
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._error: Exception | None = None
        self._requests: list[TextRequest] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._num_running = len(params)
        self._only: AsyncGenerator[GenerationDelta, None] | None = None
        """Of a request for one answer, what comes of it. Without a pump: a token then wakes one task less."""
        self._first: asyncio.Task[GenerationDelta | None] | None = None
        """The first of that, which has been waited for with a time limit."""

    async def __aenter__(self) -> Self:
        """Raises InvalidRequest or Overloaded, if the scheduler refuses one; then none goes on."""
        try:
            first, http = 0, HTTP_REQUEST.get()
            for number, (prompt, params) in enumerate(self._wanted):
                shape = await self._model.encoder.shape(prompt, self._model.scheduler.digest_block_size)
                request = self._begin(http, number, prompt, params, shape)
                self._requests.append(request)
                if len(self._wanted) == len(request.choices) == 1:
                    self._only = aiter(request)
                    break
                self._pumps.append(asyncio.create_task(self._pump(first, request)))
                first += len(request.choices)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    def _begin(
        self, http: HttpRequest, number: int, prompt: tuple[int, ...], params: SamplingParams, shape: PromptShape | None
    ) -> TextRequest:
        """Submit it, in the trace of the client, or in one of its own if spans are made of it."""
        spans, request_id = self._model.spans, http.name(number)
        traceparent = http.trace_context["traceparent"]
        if spans is not None:
            traceparent = spans.began(request_id, Asked(http, self._model.names[0], params))
            http.trace_response = http.trace_response or traceparent
        try:
            with in_trace(traceparent):
                return self._make(prompt, params, shape=shape, request_id=request_id)
        except BaseException:
            if spans is not None:
                spans.refused(request_id)
            raise

    async def _close(self) -> None:
        tasks = self._pumps if self._first is None else [self._first]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._only is not None:
            await self._only.aclose()
        for request in self._requests:  # a task that is cancelled before its first step closes nothing itself
            await request.aclose()

    async def _pump(self, first: int, request: TextRequest) -> None:
        """first: the number of the request's first answer."""
        try:
            async for delta in request:
                self._news.append((first + delta.get("choice", 0), self._wanted_of(delta)))
                self._changed.set()
                while len(self._news) >= MOST_NEWS:
                    self._taken.clear()
                    await self._taken.wait()
        except Exception as error:  # of the engines; whoever waits for news is to have it
            self._error = self._error or error
        finally:
            self._num_running -= 1
            self._changed.set()

    def _wanted_of(self, delta: GenerationDelta) -> GenerationDelta:
        """Raises ApiError: the request was ended by nobody who asked for it."""
        if delta["finish_reason"] == "abort":
            raise try_again("the server is ending", code="not_ready")
        if self._only_prompt:
            delta["text"], delta["token_ids"], delta["logprobs"] = "", [], None
            delta["finish_reason"], delta["stop_reason"] = delta["finish_reason"] and "length", None
        return delta

    async def begun(self, timeout_s: float) -> bool:
        """Wait for the first news; False: there are none after so long."""
        if self._only is not None:
            self._first = asyncio.create_task(_next(self._only))
            await asyncio.wait([self._first], timeout=timeout_s)
            return self._first.done()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        return self._changed.is_set()

    async def news(self) -> News:
        """Whatever is new, as soon as something is; empty at the end.

        Raises:
            HBServeRpcError, ApiError: one of the answers has failed; what came before was given out before.
        """
        if self._only is not None:
            delta = await (_next(self._only) if self._first is None else self._first)
            self._first = None
            return [] if delta is None else [(0, self._wanted_of(delta))]
        while self._num_running and not self._news and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None and not self._news:
            raise self._error
        found, self._news = self._news, []
        self._taken.set()
        return found


async def _next(deltas: AsyncGenerator[GenerationDelta, None]) -> GenerationDelta | None:
    """None: there are no more."""
    return await anext(deltas, None)
