"""All answers to one HTTP request, merged: their tokens in the order in which they come."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

from hbserve.results import GenerationDelta
from hbserve.server.http.api_error import in_names_of_client, renamed, try_again
from hbserve.server.http.request_log import HTTP_REQUEST, HttpRequest
from hbserve.server.service import ServedModel
from hbserve.server.spans import Asked
from hbserve.text.prompts import naming
from hbserve.text.text_request import TextRequest
from hbserve_rpc import SamplingParams
from hbserve_rpc.prompt_shape import PromptShape
from hbserve_rpc.rpc_stream import whenever_told
from hbserve_rpc.trace_context import in_trace

News = list[tuple[int, GenerationDelta]]
"""Pairs of an answer's index and a new piece of it."""


class Answers:
    """Answers to some prompts, as many to each as its `params` say. An asynchronous context manager that submits the
    requests, and at its end aborts those that are still running."""

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[tuple[int, ...]],
        params: Sequence[SamplingParams],
        *,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        only_prompt: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """Submit nothing yet.

        shown_ids: special tokens that are not skipped.
        only_prompt: whether only information about the prompts is wanted, and no token of an answer.
        names: the client's names for some of the fields that errors name.
        """
        self._only_prompt = only_prompt
        self._names = names or {}
        self._model = model
        self._wanted = list(zip(prompts, params, strict=True))
        self._make = partial(
            TextRequest,
            model.scheduler,
            model.encoder.tokenizer,
            skip_special_tokens=skip_special_tokens,
            shown_ids=shown_ids,
        )
        self._news: News = []
        """Pieces that were not taken yet: at most one for each prompt. Further tokens collect in the scheduler."""
        self._changed = asyncio.Event()
        self._on_change: Callable[[], object] = self._changed.set
        """Callback for news, and for the end of an answer."""
        self._taken = asyncio.Event()
        self._error: Exception | None = None
        self._requests: list[TextRequest] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._num_running = len(params)

    async def __aenter__(self) -> Self:
        """Submit the requests. Raises InvalidRequest or Overloaded if the scheduler refuses one; then none goes on."""
        try:
            first, http = 0, HTTP_REQUEST.get()
            for number, (prompt, params) in enumerate(self._wanted):
                if number > 0:  # a thousand prompts take a tenth of a second, in which others get their tokens
                    await asyncio.sleep(0)
                shape = await self._model.encoder.shape(prompt, self._model.scheduler.digest_block_size)
                with renamed(self._names), naming(number, len(self._wanted)):
                    request = self._begin(http, number, prompt, params, shape)
                self._requests.append(request)
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
        """Submit a request in the client's trace, or in a trace of its own if spans are made."""
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
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for request in self._requests:
            await request.aclose()

    async def _pump(self, first: int, request: TextRequest) -> None:
        """Collect the news of a request. `first` is the index of its first answer."""

        def take(delta: GenerationDelta) -> bool:
            self._news.append((first + delta.get("choice", 0), self._wanted_of(delta)))
            self._on_change()
            return bool(self._news)

        try:
            while await request.each(take):
                self._taken.clear()
                if self._news:
                    await self._taken.wait()
        except Exception as error:  # from the engines; is raised to the caller that waits for news
            self._error = self._error or in_names_of_client(error, self._names)
        finally:
            self._num_running -= 1
            self._on_change()

    def _wanted_of(self, delta: GenerationDelta) -> GenerationDelta:
        """Remove what the client does not want to have. Raises ApiError if the server, and not the client, has ended
        the request."""
        if delta["finish_reason"] == "abort":
            raise try_again("the server is ending", code="not_ready")
        if self._only_prompt:
            delta["text"], delta["token_ids"], delta["logprobs"] = "", [], None
            delta["finish_reason"], delta["stop_reason"] = delta["finish_reason"] and "length", None
        return delta

    async def first(self, timeout_s: float) -> News:
        """Wait for the first news, and return them; empty if none came in time. Raises what `each` raises."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        if self._error is not None and not self._news:
            raise self._error
        return self._given_out()

    def _given_out(self) -> News:
        found, self._news = self._news, []
        self._taken.set()
        return found

    async def each(self, take: Callable[[News], object]) -> bool:
        """Pass news to `take`, in the iteration of the loop in which they arrive, until it returns True.

        Returns:
            Whether there may be more.

        Raises:
            HBServeRpcError, ApiError: one of the answers has failed; what came earlier was passed on first.
        """
        is_left = False

        def give() -> bool:
            nonlocal is_left
            is_left = bool(self._news and take(self._given_out()))
            if self._error is not None and not is_left:
                raise self._error
            return is_left or not self._num_running

        await whenever_told(give, self._tell)
        return is_left

    def _tell(self, on_change: Callable[[], None] | None) -> None:
        self._on_change = on_change or self._changed.set
