"""One request in the scheduler: what was asked, what was delivered, and what the client reads.

A request with several choices (`SamplingParams.n`) is attempted as a whole: it is placed once, and its prompt is
computed and moved once. Each choice has its own output. If an attempt fails after tokens were delivered, each choice
continues by itself, as a request that already has output.
"""

import asyncio
import math
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import sub

import msgspec

from hbserve_rpc import RemoteError
from hbserve_rpc.messages import ClientEvent, FinishReason, GenerateRequest, TokenEvent
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_rpc.trace_context import TRACEPARENT
from hbserve_scheduler.figures import Figures, longest_pause
from hbserve_scheduler.instances import InstanceHandle


@dataclass(eq=False, slots=True)
class ScheduledRequest:
    """A request from `submit` to its end. Times are those of the event loop, as everywhere in the scheduler."""

    request: GenerateRequest
    num_prompt_tokens: int = field(init=False)
    figures: Figures = field(default_factory=Figures)
    """Figures of all requests."""
    submitted_s: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    arrivals: "array[float]" = field(default_factory=lambda: array("d"))
    """Times at which messages with new tokens came."""
    num_first: int = 0
    """Number of tokens in the first of these messages."""
    num_preemptions: int = 0
    output: list[int] = field(default_factory=list)
    """Tokens that were delivered, over all attempts."""
    finish_reason: FinishReason | None = None
    """Reason for the end, set with the last token; the request's instances may still be busy then."""
    ended: bool = False
    """Whether the client's stream has its last item, so that nothing more is added to it."""
    failed_on: set[str] = field(default_factory=set)
    """Ids of instances on which an attempt failed. The next one avoids them, if there are others."""
    was_on: list[tuple[InstanceHandle, str]] = field(default_factory=list)
    """Instances that computed for the request in attempts that failed, each with its epoch at the time."""
    num_tried: int = 0
    """Number of tokens that had been delivered when the last attempt failed."""
    on_progress: Callable[[], None] | None = None
    """Function that is called once, at the next token."""
    computed_on: str = ""
    """Id of the prefill instance that has the prompt in its prefix cache since an attempt that failed afterwards."""
    events: "deque[ClientEvent | Exception | ScheduledRequest]" = field(default_factory=deque)
    """Events that the client has not taken: at most one with tokens, to which new ones are added. If there are several
    choices, those that have events."""
    reader: "asyncio.Future[None] | None" = None
    """Future of whoever waits for an event. An asyncio.Event would take twice as long for each token."""
    on_event: Callable[[], None] | None = None
    """Function that is called for each event, after everything else is up to date; used instead of `reader`."""
    task: asyncio.Task[None] | None = None
    attempts: list[AttemptRecord] = field(default_factory=list)
    num_cached_tokens: int = 0
    kv_bytes: int = 0
    kv_transfer_time_s: float = 0.0
    choices: "list[ScheduledRequest]" = field(default_factory=list)
    """Choices, each as a request of its own; empty if there is only one."""
    choice: int = 0
    """Number of this choice among those of `parent`."""
    parent: "ScheduledRequest | None" = field(default=None, repr=False)
    is_prefilling: bool = False
    """Whether what is known of the transfer is incomplete. Ends of choices are not reported until it is complete."""
    on_choice_ended: Callable[[int], None] | None = None
    """Function that is called when a choice is ended from here while an instance computes all of them."""
    deadline_s: float = math.inf
    time_limit: str = ""
    """Name and value of the setting that gave the deadline."""
    traceparent: str = field(default_factory=TRACEPARENT.get)
    """Trace context in which the request was submitted."""
    _timer: asyncio.TimerHandle | None = None
    _num_counted: int = 0
    _output_counted: int = 0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.output += self.request.output_token_ids
        if (num_choices := self.request.params.n) > 1:
            self.choices = [self._choice(number) for number in range(num_choices)]

    def _choice(self, number: int) -> "ScheduledRequest":
        asked = msgspec.structs.replace(self.request, params=self.request.params.of_choice(number))
        return ScheduledRequest(asked, self.figures, self.submitted_s, choice=number, parent=self)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are known: prompt, and output so far."""
        return self.num_prompt_tokens + len(self.output)

    @property
    def deaths(self) -> list[str]:
        """Ids of instances that died while the request was on them, because of it or of something else."""
        return [handle.instance_id for handle, epoch in self.was_on if epoch in handle.died]

    @property
    def num_delivered(self) -> int:
        """Number of output tokens of all choices together."""
        return sum([len(each.output) for each in self.choices]) if self.choices else len(self.output)

    @property
    def is_suspect(self) -> bool:
        """Whether an instance died while the request was on it, and the request has made no progress since."""
        return not self.ended and self.num_delivered == self.num_tried and bool(self.deaths)

    def deliver(self, event: TokenEvent) -> None:
        """Pass new tokens on, without those that the client already has. The event belongs to this request from now on.

        Raises:
            RemoteError: tokens are missing between those delivered and these, or the request cannot have them.
        """
        if self.choices:
            self._deliver_choice(event)
            return
        if self.ended or self.finish_reason is not None:
            return
        first = len(self.output)
        known = first - event.index
        if known < 0:
            raise RemoteError(f"tokens {first} to {event.index - 1} are missing")
        tokens = event.token_ids[known:] if known else event.token_ids
        has_room = first + len(tokens) <= self.request.params.max_tokens
        if event.index < 0 or not has_room:
            raise RemoteError(f"{len(tokens)} tokens from {event.index} on, which the request cannot have")
        if tokens or event.finish_reason:
            if tokens:
                if not self.arrivals:
                    self.num_first = len(tokens)
                self.arrivals.append(asyncio.get_running_loop().time())
            if event.num_preemptions:
                self.num_preemptions = event.num_preemptions
            self.finish_reason = event.finish_reason
            self.output += tokens
            if self.on_progress is not None:
                self._tell_progress()
            if known or event.choice != self.choice or (event.prompt_logprobs and first):
                of_prompt, logprobs = [] if first else event.prompt_logprobs, event.logprobs[known:]
                event = TokenEvent(first, tokens, event.finish_reason, logprobs, of_prompt, self.choice)
            self._add_tokens(event)

    def _tell_progress(self) -> None:
        if self.on_progress is not None:
            on_progress, self.on_progress = self.on_progress, None
            on_progress()

    def _add_tokens(self, new: TokenEvent) -> None:
        if not self.events:
            self._add(new)
            return
        waiting = self.events[-1]  # an event of tokens, because nothing else comes before the last token
        assert isinstance(waiting, TokenEvent)
        waiting.token_ids.extend(new.token_ids)
        waiting.logprobs.extend(new.logprobs)
        if new.finish_reason is not None:
            self.events[-1] = msgspec.structs.replace(waiting, finish_reason=new.finish_reason)

    def _add(self, event: "ClientEvent | Exception | ScheduledRequest") -> None:
        self.events.append(event)
        if self.on_event is not None:
            self.on_event()
        elif self.reader is not None and not self.reader.done():
            self.reader.set_result(None)
        if self.parent is not None and len(self.events) == 1:
            self.parent._add(self)

    def take(self) -> ClientEvent | Exception:
        """Remove and return the next event; there must be one."""
        event = self.events.popleft()
        if not isinstance(event, ScheduledRequest):
            return event
        found = event.take()
        if event.events:
            self.events.append(event)
        return found

    # ---- several choices -----------------------------------------------------------------------------------------

    def _deliver_choice(self, event: TokenEvent) -> None:
        if not 0 <= event.choice < len(self.choices):
            raise RemoteError(f"a token came of choice {event.choice}, of {len(self.choices)}")
        choice = self.choices[event.choice]
        choice.deliver(event)
        if event.token_ids:
            self._tell_progress()
        if choice.finish_reason is not None:
            self.finish_choice(choice, choice.finish_reason)

    def finish_choice(self, choice: "ScheduledRequest", reason: FinishReason) -> None:
        """Note that a choice has ended, here or on its instance. The end of the last choice is reported with the end of
        the request, as it is without choices."""
        choice.finish_reason = reason
        if all(each.finish_reason is not None for each in self.choices):
            self.finish_reason = reason
        elif not self.is_prefilling:
            self.tell_ends()

    def tell_ends(self) -> None:
        """Report the choices that have ended."""
        for choice in self.choices:
            if choice.finish_reason is not None and not choice.ended:
                if choice.task is None:
                    self.hand_down(choice)
                choice.finish(choice.finish_reason)

    def end_choice(self, number: int, reason: FinishReason) -> bool:
        """End one of several choices before its instances do. Return False if there is none, or it has ended."""
        if not 0 <= number < len(self.choices):
            return False
        choice = self.choices[number]
        if choice.finish_reason is not None:
            return False
        self.finish_choice(choice, reason)
        if choice.task is not None:
            choice.task.cancel()
        elif self.on_choice_ended is not None:
            self.on_choice_ended(number)
        return True

    def hand_down(self, choice: "ScheduledRequest") -> None:
        """Give a choice that continues by itself the history that all choices have in common."""
        choice.attempts, choice.failed_on, choice.was_on = [*self.attempts], {*self.failed_on}, [*self.was_on]
        choice.computed_on, choice.num_cached_tokens = self.computed_on, self.num_cached_tokens
        choice.kv_bytes, choice.kv_transfer_time_s = self.kv_bytes, self.kv_transfer_time_s

    def gather(self, choice: "ScheduledRequest", kv_bytes: int, kv_transfer_time_s: float) -> None:
        """Add to the request what has happened to a choice since it continued by itself. kv_bytes, kv_transfer_time_s:
        the values that were handed down to the choice then."""
        self.attempts = max(self.attempts, choice.attempts, key=len)
        self.kv_bytes += choice.kv_bytes - kv_bytes
        self.kv_transfer_time_s += choice.kv_transfer_time_s - kv_transfer_time_s

    @property
    def has_parted(self) -> bool:
        """Whether the choices have tokens already. Then they still share a prompt, but no further attempt."""
        return any(len(each.output) > len(self.output) for each in self.choices)

    # ---- figures -------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Add what was delivered since the last call to the figures. Doing so token by token would be too slow."""
        for each in self.choices:
            each.count()
        if not self.arrivals:
            return
        if self._num_counted == 0 and self.choice == 0:
            self.figures.prompt_tokens += self.num_prompt_tokens
        since = self.arrivals[max(0, self._num_counted - 1) :]
        self.figures.between_tokens.observe_all(map(sub, since[1:], since))
        self._num_counted = len(self.arrivals)
        num_output = len(self.output) - len(self.request.output_token_ids)
        self.figures.output_tokens += num_output - self._output_counted
        self._output_counted = num_output

    @property
    def first_token_s(self) -> float | None:
        if self.choices:
            return self.choices[0].first_token_s
        return self.arrivals[0] if self.arrivals else None

    @property
    def second_token_s(self) -> float | None:
        if self.choices:
            return self.choices[0].second_token_s
        if self.num_first > 1:
            return self.arrivals[0]
        return self.arrivals[1] if len(self.arrivals) > 1 else None

    @property
    def busy_instances(self) -> set[str]:
        """Ids of the instances that still have the request, or one of its choices."""
        last = [each.attempts[-1] for each in [self, *self.choices] if each.attempts and not each.ended]
        return set().union(*(attempt.busy_instances for attempt in last))

    def since_submit_s(self) -> float:
        return asyncio.get_running_loop().time() - self.submitted_s

    def record(self, error: str = "") -> RequestRecord:
        """Make the record that is kept of the request. To be called when it has ended."""
        self.count()
        e2e_s, parts = self.since_submit_s(), self.choices or [self]
        pauses = [longest_pause(each.arrivals, self.submitted_s) for each in parts if each.num_preemptions]
        first_token_s, second_token_s = self.first_token_s, self.second_token_s
        return RequestRecord(
            self.request.request_id,
            time.time() - e2e_s,
            self.num_prompt_tokens,
            self.num_delivered,
            self.num_cached_tokens,
            self.kv_bytes,
            self.kv_transfer_time_s,
            self.attempts,
            e2e_s,
            self.finish_reason if not error else None,
            None if first_token_s is None else first_token_s - self.submitted_s,
            None if second_token_s is None else second_token_s - self.submitted_s,
            error,
            len(self.choices) or 1,
            sum([each.num_preemptions for each in parts]),
            max(filter(None, pauses), key=lambda pause: pause[1] - pause[0], default=None),
            self.traceparent,
        )

    def limit_time(self, most_s: float | None, on_end: "Callable[[ScheduledRequest], None]") -> None:
        """Call `on_end` with the request unless it ends within `most_s`, or its own `timeout_s`, after submission."""
        own_s = self.request.params.timeout_s
        if most_s is None and own_s is None:  # the common case
            return
        limits = {"request_timeout_s": most_s, "timeout_s": own_s}
        known = {name: limit_s for name, limit_s in limits.items() if limit_s is not None}
        name = min(known, key=known.__getitem__)
        self.time_limit = f"{name}={known[name]}"
        self.deadline_s = self.submitted_s + known[name]
        self._timer = asyncio.get_running_loop().call_at(self.deadline_s, on_end, self)
        for each in self.choices:
            each.deadline_s = self.deadline_s

    def left_s(self) -> float | None:
        """Return the seconds left until the deadline; None if there is none."""
        return None if self.deadline_s == math.inf else max(0.0, self.deadline_s - asyncio.get_running_loop().time())

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def fail(self, error: Exception) -> None:
        """End the request with an error, unless it has ended."""
        if self.ended:
            return
        self._end_timer()
        for each in [self, *self.choices]:
            each.ended = True
        self.figures.add(self.record(str(error)))
        self._add(error)

    def finish(self, reason: FinishReason) -> None:
        self.ended = True
        self._end_timer()
        self.finish_reason = reason
        for each in self.choices:
            each.finish_reason = each.finish_reason or reason
        self.tell_ends()
        record = self.record()
        if self.parent is None:
            self.figures.add(record)
        if not self.choices:
            self._add(record.finished(reason, self.choice))
