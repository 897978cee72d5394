"""One request in the scheduler: what was asked, what was delivered, and what the client reads."""

import asyncio
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from operator import sub

from hbserve_rpc import RemoteError
from hbserve_rpc.messages import ClientEvent, FinishReason, GenerateRequest, RequestFinished, TokenEvent
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_scheduler.figures import Figures


@dataclass(eq=False)
class ScheduledRequest:
    """A request from `submit` to its end. Times are of `time.monotonic`."""

    request: GenerateRequest
    figures: Figures = field(default_factory=Figures)
    """Of all requests."""
    submitted_s: float = field(default_factory=time.monotonic)
    arrivals: "array[float]" = field(default_factory=lambda: array("d"))
    """When messages with new tokens came."""
    num_first: int = 0
    """Tokens of the first of them."""
    output: list[int] = field(default_factory=list)
    """Tokens that were delivered, over all attempts."""
    finish_reason: FinishReason | None = None
    """Set with the last token; the request's instances may then still be busy."""
    ended: bool = False
    """The client's stream has its last item; nothing is added to it."""
    failed_on: set[str] = field(default_factory=set)
    """Instances on which an attempt failed: the next one avoids them, if there are others."""
    computed_on: str = ""
    """The prefill instance whose prefix cache has the prompt, because an attempt failed after it was computed."""
    events: deque[ClientEvent | Exception] = field(default_factory=deque)
    """That the client has not taken; of tokens there is one, in which all wait."""
    has_event: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    attempts: list[AttemptRecord] = field(default_factory=list)
    num_cached_tokens: int = 0
    kv_bytes: int = 0
    kv_transfer_time_s: float = 0.0
    _num_counted: int = 0
    _output_counted: int = 0

    def __post_init__(self) -> None:
        self.output += self.request.output_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """That are known: prompt, and output so far."""
        return self.num_prompt_tokens + len(self.output)

    def deliver(self, event: TokenEvent) -> None:
        """Pass new tokens on; those that the client has already are dropped.

        Raises:
            RemoteError: tokens are missing between those delivered and these.
        """
        if self.ended:
            return
        known = len(self.output) - event.index
        if known < 0:
            raise RemoteError(f"tokens {len(self.output)} to {event.index - 1} are missing")
        tokens = event.token_ids[known:]
        if tokens or event.finish_reason:
            if tokens:
                if not self.arrivals:
                    self.num_first = len(tokens)
                self.arrivals.append(time.monotonic())
            self.finish_reason = event.finish_reason
            first = len(self.output)
            of_prompt = event.prompt_logprobs if first == 0 else []
            self._add_tokens(TokenEvent(first, tokens, event.finish_reason, event.logprobs[known:], of_prompt))
            self.output += tokens

    def _add_tokens(self, new: TokenEvent) -> None:
        if not self.events:
            self._add(new)
            return
        waiting = self.events.pop()  # nothing else comes before the last token
        assert isinstance(waiting, TokenEvent)
        waiting.token_ids.extend(new.token_ids)
        waiting.logprobs.extend(new.logprobs)
        self._add(
            TokenEvent(waiting.index, waiting.token_ids, new.finish_reason, waiting.logprobs, waiting.prompt_logprobs)
        )

    def _add(self, event: ClientEvent | Exception) -> None:
        self.events.append(event)
        self.has_event.set()

    def count(self) -> None:
        """Add what was delivered since the last time to the figures: not token by token, which would be felt."""
        if not self.arrivals:
            return
        if self._num_counted == 0:
            self.figures.prompt_tokens += self.num_prompt_tokens
        since = self.arrivals[max(0, self._num_counted - 1) :]
        self.figures.between_tokens.observe_all(map(sub, since[1:], since))
        self._num_counted = len(self.arrivals)
        num_output = len(self.output) - len(self.request.output_token_ids)
        self.figures.output_tokens += num_output - self._output_counted
        self._output_counted = num_output

    @property
    def first_token_s(self) -> float | None:
        return self.arrivals[0] if self.arrivals else None

    @property
    def second_token_s(self) -> float | None:
        if self.num_first > 1:
            return self.arrivals[0]
        return self.arrivals[1] if len(self.arrivals) > 1 else None

    def since_submit_s(self) -> float:
        return time.monotonic() - self.submitted_s

    def record(self, error: str = "") -> RequestRecord:
        """What is kept of it. To be asked for when it has ended."""
        self.count()
        e2e_s = self.since_submit_s()
        return RequestRecord(
            self.request.request_id,
            time.time() - e2e_s,
            self.num_prompt_tokens,
            len(self.output),
            self.num_cached_tokens,
            self.kv_bytes,
            self.kv_transfer_time_s,
            self.attempts,
            e2e_s,
            self.finish_reason if not error else None,
            None if self.first_token_s is None else self.first_token_s - self.submitted_s,
            None if self.second_token_s is None else self.second_token_s - self.submitted_s,
            error,
        )

    def fail(self, error: Exception) -> None:
        self.ended = True
        self.figures.add(self.record(str(error)))
        self._add(error)

    def finish(self, reason: FinishReason) -> None:
        self.ended = True
        self.finish_reason = reason
        record = self.record()
        self.figures.add(record)
        self._add(record.finished(reason))


class EventStream(AsyncIterator[ClientEvent]):
    """TokenEvents, then one RequestFinished; or the error that ended the request. `aclose` before the end aborts it."""

    def __init__(self, entry: ScheduledRequest, abandon: Callable[[ScheduledRequest], None]) -> None:
        self._entry = entry
        self._abandon = abandon
        self._ended = False

    async def __anext__(self) -> ClientEvent:
        if self._ended:
            raise StopAsyncIteration
        entry = self._entry
        while not entry.events:
            entry.has_event.clear()
            await entry.has_event.wait()
        event = entry.events.popleft()
        if isinstance(event, Exception):
            self._ended = True
            raise event
        self._ended = isinstance(event, RequestFinished)
        return event

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._abandon(self._entry)
