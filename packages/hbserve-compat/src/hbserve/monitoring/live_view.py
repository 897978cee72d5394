"""Live figures of a running deployment: its state now, recent rates and latencies, and where the last requests spent
their time.

    Watched ──▶ LiveView ──▶ View: `hbserve top` draws it, and so does /dashboard; `hbserve top --once --json` prints it

Rates and latencies cover the last WINDOW_S: what was added to counters and histograms in that time.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec

from hbserve_rpc.counts import Histogram
from hbserve_rpc.instance_metrics import block_states
from hbserve_rpc.messages import InstanceStats, Role, SchedulerStats
from hbserve_rpc.records import AttemptRecord, RequestRecord

WINDOW_S = 10.0
APART_S = 0.1
"""Least time between two looks that are remembered, so that few are however many people watch."""
FIRST_LOOK_S, OVERLAP_S = 60.0, 1.0
NUM_REQUESTS = 10
"""Number of the requests whose waterfall is shown."""
LATENCIES = {
    "ttft": "time_to_first_token_seconds",
    "itl": "inter_token_latency_seconds",
    "handoff": "kv_handoff_exposed_seconds",
}
"""Name of the histogram, by the latency's name in a View."""


class Latency(msgspec.Struct, frozen=True):
    """Percentiles over the window, as precise as a histogram allows. None: there were no values."""

    p50_s: float | None
    p95_s: float | None


class InstanceView(msgspec.Struct, frozen=True):
    instance_id: str
    role: Role
    status: str
    running: int
    waiting: int
    blocks: dict[str, int]
    """Number of blocks in each state."""
    tokens_per_s: float
    """Rate of tokens computed, in prompts and in answers."""


class LinkView(msgspec.Struct, frozen=True):
    prefill: str
    decode: str
    is_up: bool | None
    """Whether the instances are connected (False: they cannot be now). None: that was not tried yet, or the link is no
    longer kept."""
    active: int
    """Number of transfers under way."""
    gb_per_s: float | None
    """Rate over the time in which something moved. None: nothing moved."""
    outcomes: dict[str, int]
    """Number of transfers that have ended since the start, by outcome."""


class Segment(msgspec.Struct, frozen=True):
    """A part of a request's time. Its segments follow each other from its submission to its end."""

    name: str
    """Kind of the segment: queue, reserve, prefill, kv (a transfer, while nothing was computed), decode, preempted, or
    failed (an attempt)."""
    begin_s: float
    end_s: float


class RequestView(msgspec.Struct, frozen=True):
    """A request that has ended."""

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    e2e_s: float
    end: str
    """How the request ended: stop, length, abort, or why it failed."""
    instances: str
    held_up: str
    """What the request waited for, in words, if that took much of its time."""
    segments: list[Segment]


class View(msgspec.Struct, frozen=True):
    """All that is shown of a deployment at one moment."""

    unix_s: float
    waiting: int
    running: int
    completed: int
    failed: int
    aborted: int
    rejected: int
    retries: int
    requests_per_s: float
    """Rate of requests that ended."""
    tokens_per_s: float
    """Rate of tokens that were delivered."""
    latencies: dict[str, Latency]
    delayed: dict[str, int]
    """Number of requests that were held up since the start, by the main cause."""
    instances: list[InstanceView]
    links: list[LinkView]
    requests: list[RequestView]
    """The last requests, the newest first."""


class Deployment(Protocol):
    """The source of a deployment's figures and records: SchedulerServer, or RemoteScheduler."""

    async def fetch_stats(self) -> SchedulerStats: ...

    async def fetch_records(self, last_s: float, request_id: str = "") -> list[RequestRecord]: ...


class Watched:
    """A deployment whose figures are fetched again and again."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._live = LiveView()
        self._looked_at_s = time.monotonic() - FIRST_LOOK_S

    async def look(self) -> View:
        """Fetch the figures, and make a view. Raises the deployment's own errors, or an error if it does not answer."""
        now_s = time.monotonic()
        # OVERLAP_S: asks again for what ended while the last answer was under way.
        records = await self._deployment.fetch_records(now_s - self._looked_at_s + OVERLAP_S)
        stats = await self._deployment.fetch_stats()
        self._looked_at_s = now_s
        return self._live.look(time.monotonic(), time.time(), stats, records)


class LiveView:
    """Makes views of one deployment, and remembers enough earlier figures for rates and latencies."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, SchedulerStats]] = deque()
        self._requests: deque[RequestView] = deque(maxlen=NUM_REQUESTS)
        self._seen: dict[tuple[str, float], None] = {}

    def look(self, now_s: float, unix_s: float, stats: SchedulerStats, records: Iterable[RequestRecord]) -> View:
        """Make a view. `records` are those of requests that ended lately, each once or more; `now_s` comes from a
        monotonic clock."""
        while len(self._looks) > 1 and self._looks[0][0] < now_s - WINDOW_S:
            self._looks.popleft()
        if not self._looks or now_s - self._looks[-1][0] >= APART_S:
            self._looks.append((now_s, stats))
        began_s, before = self._looks[0]
        took_s = max(now_s - began_s, 1e-9)
        for record in records:
            self._remember(record)
        ended, ended_before = (sum(each.ended_requests.values()) for each in (stats, before))
        return View(
            unix_s,
            stats.waiting_requests,
            stats.running_requests,
            stats.completed_requests,
            stats.failed_requests,
            stats.aborted_requests,
            stats.rejected_requests,
            stats.retries,
            (ended - ended_before) / took_s,
            max(0, stats.output_tokens - before.output_tokens) / took_s,
            {name: _latency(stats, before, histogram) for name, histogram in LATENCIES.items()},
            stats.delayed_requests,
            list(_instances(stats, before, took_s)),
            list(_links(stats, before)),
            list(reversed(self._requests)),
        )

    def _remember(self, record: RequestRecord) -> None:
        key = record.request_id, record.submitted_at
        if key not in self._seen:
            self._requests.append(request_view(record))
            self._seen[key] = None
            while len(self._seen) > 4096:  # as many as a scheduler keeps
                del self._seen[next(iter(self._seen))]


def _instances(stats: SchedulerStats, before: SchedulerStats, took_s: float) -> Iterator[InstanceView]:
    then = {(each.instance_id, each.epoch): each for each in before.instances}
    for each in stats.instances:
        # The counters of a restarted instance begin at 0.
        old = then.get((each.instance_id, each.epoch), InstanceStats(each.instance_id, each.role, each.status))
        computed = each.generated_tokens + each.prefill_tokens - old.generated_tokens - old.prefill_tokens
        yield InstanceView(
            each.instance_id,
            each.role,
            each.status,
            each.running_requests,
            each.waiting_requests,
            block_states(each),
            max(0, computed) / took_s,
        )


def _links(stats: SchedulerStats, before: SchedulerStats) -> Iterator[LinkView]:
    for key, each in sorted(stats.links.items()):
        old = before.links.get(key)
        num_bytes = each.num_bytes - (old.num_bytes if old else 0)
        moving_s = each.time_s - (old.time_s if old else 0.0)
        rate = num_bytes / moving_s / 1e9 if moving_s > 0 else None
        yield LinkView(each.prefill, each.decode, each.is_up, each.active, rate, each.outcomes)


def _latency(stats: SchedulerStats, before: SchedulerStats, name: str) -> Latency:
    now, then = stats.histograms.get(name), before.histograms.get(name)
    if now is None:
        return Latency(None, None)
    counts = now.counts if then is None else [a - b for a, b in zip(now.counts, then.counts, strict=True)]
    return Latency(*(_percentile(now, counts, part) for part in (0.5, 0.95)))


def _percentile(histogram: Histogram, counts: list[int], part: float) -> float | None:
    """Estimate a percentile by interpolation within its bucket; beyond the last bound, return that. None: there are no
    values."""
    wanted, below = part * sum(counts), 0
    if not any(counts):
        return None
    for i, (bound, count) in enumerate(zip(histogram.bounds, counts, strict=False)):
        if below + count >= wanted and count:
            low = histogram.bounds[i - 1] if i else 0.0
            return low + (bound - low) * (wanted - below) / count
        below += count
    return histogram.bounds[-1]


def request_view(record: RequestRecord) -> RequestView:
    last = record.attempts[-1] if record.attempts else AttemptRecord(0.0)
    names = [last.prefill_instance, last.decode_instance if record.is_disaggregated else ""]
    return RequestView(
        record.request_id,
        record.num_prompt_tokens,
        record.num_output_tokens,
        record.e2e_s,
        record.finish_reason or f"failed: {record.error}",
        " > ".join(filter(None, names)),
        record.held_up,
        list(segments(record)),
    )


def segments(record: RequestRecord) -> Iterator[Segment]:
    """Yield the segments of a request's waterfall. Of things that overlap, only one is shown: while the prompt is
    computed, moving KV and waiting for room count as prefill."""
    ends: list[tuple[str, float]] = [("queue", record.queue_s)]
    for attempt in record.attempts:
        ends.append(("queue", attempt.began_s))
        if attempt.error:
            ends.append(("failed", record.e2e_s if attempt.ended_s is None else attempt.ended_s))
        else:
            ends += _ends(attempt, record)
    at_s = 0.0
    for name, end_s in [*ends, ("decode" if record.first_token_s is not None else "queue", record.e2e_s)]:
        end_s = min(end_s, record.e2e_s)
        if end_s > at_s:
            yield Segment(name, at_s, end_s)
            at_s = end_s


def _ends(attempt: AttemptRecord, record: RequestRecord) -> list[tuple[str, float]]:
    """Return the end of each part of an attempt, in order. A part that ends before an earlier one has no length."""
    first_s = record.e2e_s if attempt.first_token_s is None else attempt.first_token_s
    computed_s = attempt.computed[-1][0] if attempt.computed else first_s
    found: list[tuple[str, float]] = []
    if record.is_disaggregated:
        granted_s = record.e2e_s if attempt.granted_s is None else attempt.granted_s
        early = [at_s for at_s, _ in attempt.computed if at_s <= granted_s]
        found += [("prefill", early[-1])] if early else []
        found += [("reserve", granted_s), ("prefill", computed_s)]
        found += [("kv", attempt.kv_there_s)] if attempt.kv_there_s is not None else []
    else:
        found.append(("prefill", computed_s))
    if record.stalled is not None:
        found += [("decode", record.stalled[0]), ("preempted", record.stalled[1])]
    return found
