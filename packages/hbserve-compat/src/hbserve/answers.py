"""From prompts to text through any scheduler: what DisaggregatedLLM and `hbserve generate --connect` share."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from hbserve.detokenizer import Detokenizer
from hbserve.results import GenerationDelta, GenerationResult, timings_of
from hbserve.tokenizer import Prompt, encode
from hbserve_rpc import HBServeRpcError, InvalidRequest, LogitsNotFinite, RemoteError, SamplingParams
from hbserve_rpc.messages import ClientEvent, FinishReason, GenerateRequest, RequestFinished


class Events(Protocol):
    """A stream of one request's events; closing it aborts the request."""

    def __aiter__(self) -> AsyncIterator[ClientEvent]: ...

    async def aclose(self) -> None: ...


class Scheduler(Protocol):
    """CpuScheduler, or RemoteScheduler."""

    def submit(self, request: GenerateRequest) -> Any: ...

    async def abort(self, request_id: str, reason: FinishReason = ...) -> bool: ...


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt rather than a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def one_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams per prompt.

    Raises:
        InvalidRequest: a list of another length, or something else than SamplingParams.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    for each in [params] if isinstance(params, Mapping) else params:
        if not isinstance(each, SamplingParams):
            raise InvalidRequest(f"sampling_params: expected SamplingParams, or a list of them; got {each!r}")
    if len(params) != num_prompts:
        raise InvalidRequest(
            f"sampling_params: {len(params)} for {num_prompts} prompts; expected one, or one per prompt"
        )
    return list(params)


class Answer:
    """One submitted request: iterate it for text as it comes."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Any,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        """Raises InvalidRequest or Overloaded if a scheduler in this process refuses."""
        self.request_id = request_id or uuid.uuid4().hex
        self.detokenizer = Detokenizer(tokenizer, params.stop, skip_special_tokens=skip_special_tokens)
        self._scheduler = scheduler
        self._events: Events = scheduler.submit(GenerateRequest(self.request_id, encode(tokenizer, prompt), params))

    async def __aiter__(self) -> AsyncGenerator[GenerationDelta, None]:
        """Raises what ended the request, if that is an error; leaving early aborts it."""
        text, seen = self.detokenizer, 0
        try:
            async for event in self._events:
                if isinstance(event, RequestFinished):
                    last_text = text.feed([], final=True)
                    yield GenerationDelta(
                        request_id=self.request_id, text=last_text, token_ids=[], timings=timings_of(event),
                        finish_reason="stop" if text.stopped else event.finish_reason,
                    )  # fmt: skip
                elif not text.stopped:
                    new_text = text.feed(event.token_ids)
                    new_ids, seen = text.token_ids[seen:], len(text.token_ids)
                    if text.stopped:
                        # The engines know no text: tell them to stop. The last event then says how long all took.
                        await self._scheduler.abort(self.request_id, "stop")
                    yield GenerationDelta(
                        request_id=self.request_id, text=new_text, token_ids=new_ids, finish_reason=None, timings=None
                    )
        finally:
            await self._events.aclose()

    async def result(self) -> GenerationResult:
        """The whole answer."""
        async for delta in self:
            if delta["timings"] is not None and delta["finish_reason"] is not None:
                return GenerationResult(
                    **delta["timings"], request_id=self.request_id, text=self.detokenizer.text,
                    token_ids=self.detokenizer.token_ids, finish_reason=delta["finish_reason"],
                )  # fmt: skip
        raise RemoteError(f"request {self.request_id}: its stream ended without its end")

    async def aclose(self) -> None:
        """Abort it, if it has not ended."""
        await self._events.aclose()


async def submit_all(
    scheduler: Scheduler, tokenizer: Any, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
) -> list[Answer]:
    """Submit every prompt, or none: a refusal names the prompt, if there are several, and those before it are ended.

    Raises:
        InvalidRequest, Overloaded: as `Answer` does.
    """
    answers: list[Answer] = []
    for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        try:
            answers.append(Answer(scheduler, tokenizer, prompt, each))
        except (HBServeRpcError, ValueError) as error:
            for answer in answers:
                await answer.aclose()
            kind = type(error) if isinstance(error, HBServeRpcError) else InvalidRequest
            raise kind(f"prompts[{i}]: {error}" if len(prompts) > 1 else str(error)) from error
    return answers


async def gather_answers(answers: Sequence[Answer], on_done: Callable[[], object]) -> list[GenerationResult]:
    """All results, in order. If one fails the others are aborted, and its error is raised.

    One for which the model gives no numbers is named, if there are several.
    """

    async def follow(i: int, answer: Answer) -> GenerationResult:
        try:
            result = await answer.result()
        except LogitsNotFinite as error:
            raise LogitsNotFinite(f"prompts[{i}]: {error}" if len(answers) > 1 else str(error)) from error
        on_done()
        return result

    tasks = [asyncio.create_task(follow(i, answer)) for i, answer in enumerate(answers)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
