"""One request in the scheduler: what was asked, what was delivered, and what the client reads."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from hbserve_rpc import RemoteError
from hbserve_rpc.messages import ClientEvent, FinishReason, GenerateRequest, RequestFinished, TokenEvent
from hbserve_scheduler.instances import InstanceHandle


@dataclass(eq=False)
class ScheduledRequest:
    """A request from `submit` to its end. Times are of `time.monotonic`."""

    request: GenerateRequest
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None
    second_token_s: float | None = None
    output: list[int] = field(default_factory=list)
    """Tokens that were delivered, over all attempts."""
    finish_reason: FinishReason | None = None
    """Set with the last token; the request's instances may then still be busy."""
    ended: bool = False
    """The client's stream has its last item; nothing is added to it."""
    failed_on: set[str] = field(default_factory=set)
    """Instances on which an attempt failed: the next one avoids them, if there are others."""
    was_on: list[tuple[InstanceHandle, str]] = field(default_factory=list)
    """Instances, in the life that they had, that have computed for it in attempts that failed."""
    num_tried: int = 0
    """Tokens that were delivered when the last attempt failed."""
    on_progress: Callable[[], None] | None = None
    """Called once, at the next token."""
    computed_on: str = ""
    """The prefill instance whose prefix cache has the prompt, because an attempt failed after it was computed."""
    events: asyncio.Queue[ClientEvent | Exception] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None
    num_attempts: int = 0
    num_cached_tokens: int = 0
    kv_bytes: int = 0
    kv_transfer_time_s: float = 0.0
    prefill_instance: str = ""
    decode_instance: str = ""

    def __post_init__(self) -> None:
        self.output += self.request.output_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """That are known: prompt, and output so far."""
        return self.num_prompt_tokens + len(self.output)

    @property
    def deaths(self) -> list[str]:
        """The instances that it was on as they died: by it, or by something else."""
        return [handle.instance_id for handle, epoch in self.was_on if epoch in handle.died]

    @property
    def is_suspect(self) -> bool:
        """It was on an instance as that died, and has not got beyond the place where it was then."""
        return not self.ended and len(self.output) == self.num_tried and bool(self.deaths)

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
        if (
            event.index < 0
            or len(self.output) + len(tokens) > self.request.params.max_tokens
            or min(tokens, default=0) < 0
        ):
            raise RemoteError(f"{len(tokens)} tokens from {event.index} on, which the request cannot have")
        self._note_times(len(tokens))
        if tokens or event.finish_reason:
            self.finish_reason = event.finish_reason
            first = len(self.output)
            of_prompt = event.prompt_logprobs if first == 0 else []
            self.events.put_nowait(TokenEvent(first, tokens, event.finish_reason, event.logprobs[known:], of_prompt))
            self.output += tokens
            if self.on_progress is not None:
                on_progress, self.on_progress = self.on_progress, None
                on_progress()

    def _note_times(self, num_new: int) -> None:
        num_delivered = len(self.output) - len(self.request.output_token_ids)
        if num_delivered < 2 and num_new:
            now_s = time.monotonic()
            if num_delivered == 0:
                self.first_token_s = now_s
            if num_delivered + num_new >= 2:
                self.second_token_s = now_s

    @property
    def handoff_s(self) -> float | None:
        """From the first token that was delivered to the second; None: there is no second."""
        if self.first_token_s is None or self.second_token_s is None:
            return None
        return self.second_token_s - self.first_token_s

    def fail(self, error: Exception) -> None:
        self.ended = True
        self.events.put_nowait(error)

    def finish(self, reason: FinishReason) -> None:
        self.ended = True
        now_s = time.monotonic()
        first_s = self.first_token_s or now_s
        num_output = len(self.output)
        self.finish_reason = reason
        self.events.put_nowait(
            RequestFinished(
                reason,
                self.num_prompt_tokens,
                num_output,
                queue_time_s=(self.started_s or now_s) - self.submitted_s,
                ttft_s=first_s - self.submitted_s,
                tpot_s=(now_s - first_s) / (num_output - 1) if num_output > 1 else 0.0,
                e2e_s=now_s - self.submitted_s,
                handoff_s=self.handoff_s or 0.0,
                kv_bytes=self.kv_bytes,
                kv_transfer_time_s=self.kv_transfer_time_s,
                num_cached_tokens=self.num_cached_tokens,
                num_attempts=self.num_attempts,
                prefill_instance=self.prefill_instance,
                decode_instance=self.decode_instance,
            )
        )


class EventStream(AsyncIterator[ClientEvent]):
    """TokenEvents, then one RequestFinished; or the error that ended the request. `aclose` before the end aborts it."""

    def __init__(self, entry: ScheduledRequest, abandon: Callable[[ScheduledRequest], None]) -> None:
        self._entry = entry
        self._abandon = abandon
        self._ended = False

    async def __anext__(self) -> ClientEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._entry.events.get()
        if isinstance(event, Exception):
            self._ended = True
            raise event
        self._ended = isinstance(event, RequestFinished)
        return event

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._abandon(self._entry)
