"""Admission: checks whether a request can ever run, holds the requests that wait, and bounds their number.

The queue is bounded by number, `max_queue_size` requests, and by time: a request is refused if the requests ahead of it
have more tokens than the scheduler starts in `max_queue_time_s`, at the measured rate. Until a rate is known, only the
number of requests counts.
"""

import asyncio
import itertools
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from hbserve_rpc import InvalidRequest, Overloaded, SamplingParams
from hbserve_rpc.messages import GenerateRequest, InstanceInfo
from hbserve_rpc.plain_values import plain_id, plain_token_ids, require_in_vocabulary, shown
from hbserve_rpc.prompt_shape import PromptShape, shape_of
from hbserve_scheduler.config import SchedulerConfig
from hbserve_scheduler.request import ScheduledRequest

SOONEST_RETRY_S, LATEST_RETRY_S = 1.0, 60.0
"""Bounds of `Overloaded.retry_after_s`, in seconds."""
MEMORY_S, LEAST_S = 10.0, 2.0
"""Approximate time over which the rate is measured, and time for which it is unknown at the beginning, in seconds."""


def admitted(request: GenerateRequest, infos: Sequence[InstanceInfo], digest_block_size: int = 0) -> GenerateRequest:
    """Return a normalised copy of the request, with its prompt's shape, checked against the instances that are ready.

    If none is ready, instances check the request themselves later. A prompt that comes with its shape has been
    normalised already and cannot be changed by anybody, so it is neither checked nor copied again.

    Raises:
        InvalidRequest: the request can never run; says what is wrong, and what is allowed.
    """
    request_id = plain_id("request_id", request.request_id)
    if not isinstance(request.params, SamplingParams):
        raise InvalidRequest(f"params={shown(request.params)}: expected SamplingParams")
    params = request.params.copied()
    prompt, shape = request.prompt_token_ids, request.shape
    if shape is None:
        prompt = tuple(plain_token_ids("prompt", prompt))
        shape = shape_of(prompt, digest_block_size)
    elif not isinstance(shape, PromptShape) or not isinstance(prompt, tuple) or shape.num_tokens != len(prompt):
        raise InvalidRequest("shape: belongs to another prompt")
    output = plain_token_ids("output_token_ids", request.output_token_ids)
    if not prompt:
        raise InvalidRequest("prompt: expected at least one token")
    if len(output) >= params.max_tokens:
        raise InvalidRequest(
            f"output_token_ids: {len(output)} tokens; expected fewer than max_tokens={params.max_tokens}, "
            "which counts them"
        )
    num_tokens = len(prompt) + len(output)
    if infos and num_tokens > (longest := min([info.max_prompt_len for info in infos])):
        raise InvalidRequest(f"prompt: {num_tokens} tokens; the instances take at most {longest}")
    if infos:
        size = min([info.vocab_size for info in infos])
        if shape.largest_id >= size:
            require_in_vocabulary("prompt", prompt, size)
        require_in_vocabulary("output_token_ids", output, size)
        params.require_vocabulary(size)
    return GenerateRequest(request_id, prompt, params, output, shape=shape)


class WaitingRequests(Sequence[ScheduledRequest]):
    """Queue of requests: lowest `SamplingParams.priority` first, then oldest first. Finding a request by id, removing
    one, and access to both ends take constant time, whatever the queue's length.

    A deque would have to be searched from end to end to remove a request or to find it by id, which takes 5 ms with
    20,000 requests.
    """

    def __init__(self) -> None:
        self.by_id: dict[str, ScheduledRequest] = {}
        """Waiting requests by id, in no order. Whether any wait is asked several times for each request, and to look at
        this dict is the fastest way."""
        self._levels: dict[int, OrderedDict[str, ScheduledRequest]] = {}
        """Waiting requests by priority, then by id. An OrderedDict is a linked list; a dict takes long to find its
        first entry after many have been removed at its beginning."""
        self._priorities: list[int] = []
        """Priorities that have requests, ascending."""
        self._tokens: dict[int, int] = {}
        self.num_tokens = 0

    def append(self, entry: ScheduledRequest) -> None:
        """Add a request behind all others of its priority."""
        assert entry.request.request_id not in self.by_id, "ids are checked at admission"
        priority = entry.request.params.priority
        if priority not in self._levels:
            self._levels[priority], self._tokens[priority] = OrderedDict(), 0
            insort(self._priorities, priority)
        request_id, num_tokens = entry.request.request_id, entry.num_tokens
        self.by_id[request_id] = self._levels[priority][request_id] = entry
        self._tokens[priority] += num_tokens
        self.num_tokens += num_tokens

    def remove(self, entry: ScheduledRequest) -> None:
        """Remove a request. Raises ValueError if it is not waiting."""
        if entry not in self:
            raise ValueError(f"request {entry.request.request_id!r} is not waiting")
        priority, num_tokens = entry.request.params.priority, entry.num_tokens
        del self.by_id[entry.request.request_id], self._levels[priority][entry.request.request_id]
        self._tokens[priority] -= num_tokens
        self.num_tokens -= num_tokens
        if not self._levels[priority]:
            del self._levels[priority], self._tokens[priority]
            self._priorities.pop(bisect_left(self._priorities, priority))

    def find(self, request_id: str) -> ScheduledRequest | None:
        return self.by_id.get(request_id)

    def num_tokens_before(self, priority: int) -> int:
        """Return the number of tokens of the requests that would go before a new one of this priority."""
        if not self._priorities or priority >= self._priorities[-1]:
            return self.num_tokens
        return sum(count for each, count in self._tokens.items() if each <= priority)

    def __contains__(self, entry: object) -> bool:
        return isinstance(entry, ScheduledRequest) and self.by_id.get(entry.request.request_id) is entry

    def __len__(self) -> int:
        return len(self.by_id)

    def __iter__(self) -> Iterator[ScheduledRequest]:
        for priority in self._priorities:
            yield from self._levels[priority].values()

    def __reversed__(self) -> Iterator[ScheduledRequest]:
        for priority in reversed(self._priorities):
            yield from reversed(self._levels[priority].values())

    @overload
    def __getitem__(self, place: int) -> ScheduledRequest: ...

    @overload
    def __getitem__(self, place: slice) -> list[ScheduledRequest]: ...

    def __getitem__(self, place: int | slice) -> ScheduledRequest | list[ScheduledRequest]:
        if isinstance(place, slice):
            return list(self)[place]
        if place == 0 and self._priorities:  # the common case
            return next(iter(self._levels[self._priorities[0]].values()))
        from_end = place < 0
        steps = -place - 1 if from_end else place
        found = next(itertools.islice(reversed(self) if from_end else iter(self), steps, None), None)
        if found is None:
            raise IndexError(f"request {place} of {len(self)} that wait")
        return found


class BeginningRate:
    """Rate at which the queue drains: tokens per second of the requests that are started while others have to wait.

    At other times the rate of starts is only the rate at which requests arrive. Observations fade by half in about 7 s,
    counting only time in which requests wait.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = self._last = 0.0
        self._waiting_since_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second; None if nothing has to wait, or the rate is not known yet."""
        if self._seconds < LEAST_S or self._waiting_since_s is None:
            return None
        # The last request counts half: it was started at once, and no other is until it has made room.
        return max(0.0, self._tokens - self._last / 2) / self._seconds

    def update(self, now_s: float, *, some_wait: bool) -> None:
        """Note that no more requests can be started now. some_wait: whether some are waiting for room."""
        if self._waiting_since_s is not None and now_s > self._waiting_since_s:
            passed_s = now_s - self._waiting_since_s
            kept = math.exp(-passed_s / MEMORY_S)
            self._tokens *= kept
            self._seconds = self._seconds * kept + MEMORY_S * (1 - kept)
        self._waiting_since_s = now_s if some_wait else None

    def begun(self, num_tokens: int) -> None:
        if self._waiting_since_s is not None:  # otherwise neither this request nor any before it had to wait
            self._tokens += num_tokens
            self._last = num_tokens


class Admission:
    """Bounds of the queue. They refuse requests for which it has no room, and let callers wait for room. An object
    belongs to one event loop."""

    def __init__(self, config: SchedulerConfig, waiting: WaitingRequests) -> None:
        self._config = config
        self._waiting = waiting
        self._rate = BeginningRate()
        self._changed = asyncio.Event()

    def update(self, now_s: float, *, is_served: bool) -> None:
        """Note that no more requests can be started now. is_served: whether there are instances that serve requests."""
        if is_served:
            self._rate.update(now_s, some_wait=bool(self._waiting))
        else:  # a rate measured without instances says nothing about the rate with instances that may come
            self._rate = BeginningRate()
        self.wake()

    def begun(self, entry: ScheduledRequest) -> None:
        self._rate.begun(entry.num_tokens)

    def _queue_time_s(self, priority: int) -> float | None:
        """Return how long a new request would wait, in seconds; None if it would not wait, or the rate is unknown."""
        num_tokens, rate = self._waiting.num_tokens_before(priority), self._rate.tokens_per_s
        if num_tokens == 0 or rate is None:
            return None
        return num_tokens / rate if rate > 0 else math.inf

    def require_room(self, priority: int) -> None:
        """Raise Overloaded, with the time to wait before another try, if the queue is full for this priority."""
        num_waiting, queue_time_s = len(self._waiting), self._queue_time_s(priority)
        most_s = self._config.max_queue_time_s
        if num_waiting >= self._config.max_queue_size:
            problem = f"{num_waiting} requests are waiting, which is scheduler.max_queue_size"
        elif queue_time_s is not None and queue_time_s > most_s:
            problem = f"the requests that wait have {self._waiting.num_tokens_before(priority)} tokens, of which "
            problem += f"{self._rate.tokens_per_s or 0:.0f} a second are begun: scheduler.max_queue_time_s={most_s:g}"
        else:
            return
        raise Overloaded(problem, self._half_a_queue_s(queue_time_s))

    def _half_a_queue_s(self, queue_time_s: float | None) -> float:
        """Return roughly the time until half of a full queue will have been started."""
        if queue_time_s is None:  # a request that comes now will wait as long as the first one has so far
            queue_time_s = asyncio.get_running_loop().time() - self._waiting[0].submitted_s
        return min(max(queue_time_s / 2, SOONEST_RETRY_S), LATEST_RETRY_S)

    def is_half_full(self, priority: int) -> bool:
        """Whether callers with many requests should wait, in order to leave room for others."""
        too_many = len(self._waiting) >= max(1, self._config.max_queue_size // 2)
        return too_many or (self._queue_time_s(priority) or 0.0) > self._config.max_queue_time_s / 2

    async def wait_until(self, there_is: Callable[[], bool]) -> None:
        """Wait until `there_is()` is true. It is asked whenever `wake` is called."""
        while not there_is():
            self._changed.clear()
            await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()
