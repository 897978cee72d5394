"""One request in the scheduler: what was asked, what was delivered, and what the client reads.

A request of several choices (`SamplingParams.n`) is attempted as a whole: it is placed once, and its prompt computed
and moved once. What was delivered is each choice's own. When an attempt fails after that has begun, each choice goes on
by itself, as a request with output would.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec

from hbserve_rpc import RemoteError
from hbserve_rpc.messages import ClientEvent, FinishReason, GenerateRequest, RequestFinished, TokenEvent

_IN_COMMON = (
    "started_s", "num_attempts", "num_cached_tokens", "kv_bytes", "kv_transfer_time_s", "prefill_instance",
    "decode_instance", "computed_on",
)  # fmt: skip


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
    choices: "list[ScheduledRequest]" = field(default_factory=list)
    """Each as a request of its own, where there are several; they have their events in common."""
    choice: int = 0
    """Its place among them."""
    on_choice_ended: Callable[[int], None] | None = None
    """Told when one is ended from here, while an instance computes all of them."""

    def __post_init__(self) -> None:
        self.output += self.request.output_token_ids
        if self.request.params.n > 1:
            self.choices = [self._choice(number) for number in range(self.request.params.n)]

    def _choice(self, number: int) -> "ScheduledRequest":
        params = self.request.params.of_choice(number)
        asked = msgspec.structs.replace(self.request, params=params)
        return ScheduledRequest(asked, self.submitted_s, events=self.events, choice=number)

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
        if self.choices:
            self._deliver_choice(event)
            return
        if self.ended:
            return
        known = len(self.output) - event.index
        if known < 0:
            raise RemoteError(f"tokens {len(self.output)} to {event.index - 1} are missing")
        tokens = event.token_ids[known:]
        self._note_times(len(tokens))
        if tokens or event.finish_reason:
            self.finish_reason = event.finish_reason
            first = len(self.output)
            of_prompt = event.prompt_logprobs if first == 0 else []
            logprobs = event.logprobs[known:]
            self.events.put_nowait(TokenEvent(first, tokens, event.finish_reason, logprobs, of_prompt, self.choice))
            self.output += tokens

    def _deliver_choice(self, event: TokenEvent) -> None:
        if not 0 <= event.choice < len(self.choices):
            raise RemoteError(f"a token of choice {event.choice} came, of {len(self.choices)}")
        choice = self.choices[event.choice]
        choice.deliver(event)
        if choice.finish_reason is not None:
            self.finish_choice(choice, choice.finish_reason)

    def finish_choice(self, choice: "ScheduledRequest", reason: FinishReason) -> None:
        """It has ended, well or not. The last one is told of when the request has ended too, as where it is alone."""
        if all(each.ended for each in self.choices if each is not choice):
            self.finish_reason = reason
        elif not choice.ended:
            self._tell_end(choice, reason)

    def _tell_end(self, choice: "ScheduledRequest", reason: FinishReason) -> None:
        if choice.task is None:
            self.hand_down(choice)
        choice.finish(reason)

    def end_choice(self, number: int, reason: FinishReason) -> bool:
        """End one of several choices before its instances do. False: there is no such one, or it has ended."""
        if not 0 <= number < len(self.choices):
            return False
        choice = self.choices[number]
        if choice.ended or choice.finish_reason is not None:
            return False
        self.finish_choice(choice, reason)
        if choice.task is not None:
            choice.task.cancel()
        elif self.on_choice_ended is not None:
            self.on_choice_ended(number)
        return True

    def hand_down(self, choice: "ScheduledRequest") -> None:
        """What has happened to all choices so far has happened to this one too."""
        for name in _IN_COMMON:
            setattr(choice, name, getattr(self, name))
        choice.failed_on = set(self.failed_on)

    @property
    def has_parted(self) -> bool:
        """Whether its choices have tokens already: they have their prompt in common still, but no attempt any more."""
        return any(len(each.output) > len(self.output) for each in self.choices)

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
        """From the first token that was delivered to the second, of the first choice; None: there is no second."""
        if self.choices:
            return self.choices[0].handoff_s
        if self.first_token_s is None or self.second_token_s is None:
            return None
        return self.second_token_s - self.first_token_s

    def fail(self, error: Exception) -> None:
        for each in [self, *self.choices]:
            each.ended = True
        self.events.put_nowait(error)

    def finish(self, reason: FinishReason) -> None:
        self.ended = True
        if self.choices:
            for each in self.choices:
                if not each.ended:
                    self._tell_end(each, each.finish_reason or reason)
            return
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
                choice=self.choice,
            )
        )


class EventStream(AsyncIterator[ClientEvent]):
    """TokenEvents, then one RequestFinished, of each choice; or the error that ended the request. `aclose` before the
    end aborts it."""

    def __init__(self, entry: ScheduledRequest, abandon: Callable[[ScheduledRequest], None]) -> None:
        self._entry = entry
        self._abandon = abandon
        self._ended = False
        self._num_choices = entry.request.params.n

    async def __anext__(self) -> ClientEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._entry.events.get()
        if isinstance(event, Exception):
            self._ended = True
            raise event
        self._num_choices -= isinstance(event, RequestFinished)
        self._ended = self._num_choices == 0
        return event

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._abandon(self._entry)
