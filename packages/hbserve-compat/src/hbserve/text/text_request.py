"""TextRequest: text for a prompt, through any scheduler. DisaggregatedLLM, the server and the commands share it."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

from hbserve.results import Answer, GenerationDelta, GenerationResult, timings_of
from hbserve.text.detokenizer import Detokenizer
from hbserve.text.prompts import naming
from hbserve_rpc import Overloaded, RemoteError, SamplingParams
from hbserve_rpc.messages import ClientEvent, FinishReason, GenerateRequest, RequestFinished, TokenEvent, TokenLogprobs
from hbserve_rpc.prompt_shape import PromptShape

MOST_UNDER_WAY = 2048
"""Most requests of one call, including those that wait in a remote scheduler."""


class Events(Protocol):
    """A stream of one request's events; closing it aborts the request."""

    def __aiter__(self) -> AsyncIterator[ClientEvent]: ...

    async def each(self, take: Callable[[ClientEvent], object]) -> bool: ...

    async def aclose(self) -> None: ...


class Scheduler(Protocol):
    """The scheduler of a request: CpuScheduler, or RemoteScheduler."""

    @property
    def digest_block_size(self) -> int: ...

    def check(self, request: GenerateRequest) -> GenerateRequest: ...

    async def wait_for_room(self, priority: int = ...) -> None: ...

    def submit(self, request: GenerateRequest) -> Any: ...

    async def abort(self, request_id: str, reason: FinishReason = ..., choice: int | None = ...) -> bool: ...


class TextChoice:
    """Makes the text of one choice of a request, as its events come."""

    def __init__(
        self,
        request_id: str,
        tokenizer: Any,
        params: SamplingParams,
        *,
        skip_special_tokens: bool,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._request_id = request_id
        self.detokenizer = Detokenizer(
            tokenizer,
            params.stop,
            skip_special_tokens=skip_special_tokens,
            shown_ids=shown_ids,
            min_tokens=params.min_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        """Log-probabilities of the tokens in all deltas so far; None: they are not wanted."""

    def feed(self, event: TokenEvent, prompt_logprobs: list[TokenLogprobs | None] | None) -> GenerationDelta:
        """Return the delta of an event's tokens, up to the one that completes a stop string."""
        text = self.detokenizer
        num_given = len(text.token_ids)
        new_text = text.feed(event.token_ids)
        new_ids = text.token_ids[num_given:]
        return {  # no call of GenerationDelta: for each token, a function call takes measurable time
            "request_id": self._request_id,
            "text": new_text,
            "token_ids": new_ids,
            "finish_reason": None,
            "stop_reason": None,
            "logprobs": None if self.logprobs is None else self._new_logprobs(event.logprobs[: len(new_ids)]),
            "prompt_logprobs": prompt_logprobs,
            "timings": None,
        }

    def end(self, event: RequestFinished) -> GenerationDelta:
        """Return the last delta, with everything that was held back."""
        text = self.detokenizer
        last_text = text.feed([], final=True)
        return GenerationDelta(
            request_id=self._request_id,
            text=last_text,
            token_ids=[],
            timings=timings_of(event),
            finish_reason="stop" if text.stopped else event.finish_reason,
            stop_reason=self._stop_reason(event),
            logprobs=self._new_logprobs([]),
            prompt_logprobs=None,
        )

    def _stop_reason(self, end: RequestFinished) -> str | int | None:
        """Return the stop string or the id of `stop_token_ids` that ended the choice; None if something else did."""
        text = self.detokenizer
        if text.stopped or end.finish_reason != "stop":
            return text.stop_string
        return next((token_id for token_id in text.token_ids[-1:] if token_id in self._stop_token_ids), None)

    def _new_logprobs(self, new: list[TokenLogprobs]) -> list[TokenLogprobs] | None:
        if self.logprobs is None:
            return None
        self.logprobs += new
        return new


class TextRequest:
    """One submitted request. Iterating it yields text as it comes."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Any,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        shape: PromptShape | None = None,
        request_id: str | None = None,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Submit the request. `shape` is the prompt's, if it has been computed already; `shown_ids` are special tokens
        that are not skipped.

        Raises InvalidRequest or Overloaded if a scheduler in this process refuses the request.
        """
        self.request_id = request_id or uuid.uuid4().hex
        self.choices = [
            TextChoice(self.request_id, tokenizer, params, skip_special_tokens=skip_special_tokens, shown_ids=shown_ids)
            for _ in range(params.n)
        ]
        self._stopped: list[int] = []
        """Choices that a stop string has ended, of which the engines were not told yet."""
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._asks_of_prompt = params.prompt_logprobs is not None
        self._scheduler = scheduler
        self._events: Events = scheduler.submit(GenerateRequest(self.request_id, tuple(prompt), params, shape=shape))

    async def __aiter__(self) -> AsyncGenerator[GenerationDelta, None]:
        """Yield the deltas. Raises the error that ended the request, if one did. Leaving early aborts the request."""
        try:
            async for event in self._events:
                if (delta := self._delta(event)) is not None:
                    if self._stopped:
                        await self._stop_engines()
                    yield delta
        finally:
            await self._events.aclose()

    async def each(self, take: Callable[[GenerationDelta], object]) -> bool:
        """Pass what iterating would yield to `take` until that returns True, as `EventStream.each` does.

        No task is woken for a token. Returns whether there may be more, and raises what iterating raises. Returning
        early does not abort the request.
        """
        is_left = False

        def give(event: ClientEvent) -> bool:
            nonlocal is_left
            delta = self._delta(event)
            is_left = delta is not None and bool(take(delta))
            return is_left or bool(self._stopped)

        while await self._events.each(give):
            if self._stopped:
                await self._stop_engines()
            if is_left:
                return True
        return False

    def _delta(self, event: ClientEvent) -> GenerationDelta | None:
        """Return the delta of an event; None if it comes after a stop string."""
        choice = self.choices[event.choice]
        if isinstance(event, RequestFinished):
            delta = choice.end(event)
        elif choice.detokenizer.stop_string is not None:
            return None
        else:
            delta = choice.feed(event, self._of_prompt(event) if self._asks_of_prompt else None)
            if choice.detokenizer.stop_string is not None:
                self._stopped.append(event.choice)
        if len(self.choices) > 1:
            delta["choice"] = event.choice
        return delta

    async def _stop_engines(self) -> None:
        """Stop choices in the engines, which do not see stop strings in text. The last event then has the timings."""
        stopped, self._stopped = self._stopped, []
        for number in stopped:
            await self._scheduler.abort(self.request_id, "stop", number if len(self.choices) > 1 else None)

    def _of_prompt(self, event: TokenEvent) -> list[TokenLogprobs | None] | None:
        """Return the prompt's log-probabilities with a first token; None with others. The engines report them once for
        all choices."""
        if event.index > 0:
            return None
        if event.prompt_logprobs or self._prompt_logprobs is None:
            self._prompt_logprobs = [None, *event.prompt_logprobs]
        return self._prompt_logprobs

    async def result(self) -> GenerationResult:
        """Wait for the end, and return the whole answer, with all of them in `outputs` if there are several."""
        found: dict[int, Answer] = {}
        async for delta in self:
            if delta["timings"] is not None and delta["finish_reason"] is not None:
                number = delta.get("choice", 0)
                choice = self.choices[number]
                found[number] = Answer(
                    **delta["timings"],
                    request_id=self.request_id,
                    text=choice.detokenizer.text,
                    token_ids=choice.detokenizer.token_ids,
                    finish_reason=delta["finish_reason"],
                    stop_reason=delta["stop_reason"],
                    logprobs=choice.logprobs,
                    prompt_logprobs=self._prompt_logprobs,
                )
        if len(found) < len(self.choices):
            raise RemoteError(f"request {self.request_id}: its stream ended without its end")
        result = cast("GenerationResult", found[0].copy())
        if len(found) > 1:
            result["outputs"] = [found[number] for number in range(len(found))]
        return result

    async def aclose(self) -> None:
        """Abort the request, unless it has ended."""
        await self._events.aclose()


def check_all(
    scheduler: Scheduler, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[PromptShape | None]:
    """Check, before any request is submitted, that all can run, as far as the scheduler knows. Returns the prompts'
    shapes.

    Raises:
        InvalidRequest: a request can never run. Names the prompt, if there are several.
    """
    shapes = []
    for place, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        with naming(place, len(prompts)):
            shapes.append(scheduler.check(GenerateRequest("check", tuple(prompt), each)).shape)
    return shapes


async def _patient_result(request: TextRequest, again: Callable[[], Awaitable[TextRequest]]) -> GenerationResult:
    """Return a request's result. If a remote scheduler refuses it before it has begun, it is submitted `again` when
    there may be room."""
    while True:
        try:
            return await request.result()
        except Overloaded as refused:
            await asyncio.sleep(refused.retry_after_s)
            request = await again()


async def answer_all(
    scheduler: Scheduler,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    shapes: Sequence[PromptShape | None],
    on_done: Callable[[], object],
) -> list[GenerationResult]:
    """Return all results, in order. Requests are submitted as the queue drains. If this raises, none of them goes on.

    `shapes` is the result of `check_all`, so that no prompt is examined twice.

    Raises:
        InvalidRequest: an instance refuses a request, for a reason that only instances know. Names the prompt, if there
            are several.
        LogitsNotFinite: the model computes NaN or infinity for a prompt, which is named if there are several.
        RequestTimeout, Unavailable, RemoteError: a request has failed.
    """
    under_way = asyncio.Semaphore(MOST_UNDER_WAY)
    requests: dict[int, TextRequest] = {}

    async def begin(place: int) -> TextRequest:
        await scheduler.wait_for_room(params[place].priority)
        with naming(place, len(prompts)):
            requests[place] = TextRequest(scheduler, tokenizer, prompts[place], params[place], shape=shapes[place])
        return requests[place]

    async def follow(place: int, request: TextRequest) -> GenerationResult:
        with naming(place, len(prompts)):
            result = await _patient_result(request, lambda: begin(place))
        under_way.release()
        on_done()
        return result

    try:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for place in range(len(prompts)):
                await under_way.acquire()
                tasks.append(group.create_task(follow(place, await begin(place))))
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    finally:
        # A task that is cancelled before its first step closes nothing itself.
        for request in requests.values():
            await request.aclose()
    return [task.result() for task in tasks]
