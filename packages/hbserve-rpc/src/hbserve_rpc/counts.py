"""Counters that can be summed over processes: histograms, and counts for one link between two instances, for one kind
of HTTP requests, and for what an RPC server could not use."""

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Sequence
from typing import Self

import msgspec

FEW = 16
"""Number of values below which each value is looked up among the bounds. From there on, the bounds are looked up among
the values."""


class Histogram(msgspec.Struct, tag=True):
    """Counts of values by range, as in Prometheus: their sums over processes are exact.

    `counts[i]` is the number of values at most `bounds[i]` and above the bound before it; the last count is of the
    values above all bounds."""

    bounds: list[float]
    counts: list[int]
    total: float = 0.0
    """Sum of the values."""

    @classmethod
    def over(cls, bounds: Sequence[float]) -> Self:
        """Make an empty histogram. The bounds must ascend."""
        return cls(list(bounds), [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Iterable[float]) -> None:
        """Count many values at once, which takes less time than one after the other."""
        ordered = sorted(values)
        if len(ordered) < FEW:
            for value in ordered:
                self.counts[bisect_left(self.bounds, value)] += 1
            self.total += sum(ordered)
            return
        below = 0
        for i, bound in enumerate(self.bounds):
            self.counts[i] -= below
            below = bisect_right(ordered, bound, below)
            self.counts[i] += below
        self.counts[-1] += len(ordered) - below
        self.total += sum(ordered)

    def copy(self) -> "Histogram":
        """Return a copy that later values do not change."""
        return Histogram(self.bounds, list(self.counts), self.total)

    def __add__(self, other: "Histogram") -> "Histogram":
        """Return the sum of both. Raises ValueError if their bounds differ."""
        if self.bounds != other.bounds:
            raise ValueError(f"histograms over {self.bounds} and over {other.bounds} cannot be added")
        counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        return Histogram(list(self.bounds), counts, self.total + other.total)


class LinkCounts(msgspec.Struct, tag=True):
    """Counts of the transfers of one scheduler's requests from a prefill instance to a decode instance."""

    prefill: str
    decode: str
    is_up: bool | None = None
    """Whether the two are connected (True) or cannot be at the moment (False). None: not tried yet, or no longer."""
    active: int = 0
    """Number of requests for which the decode instance has reserved room, but does not have all of the KV yet."""
    outcomes: dict[str, int] = {}
    """Number of transfers that have ended, by outcome: completed, failed or aborted."""
    num_bytes: int = 0
    time_s: float = 0.0
    """Time during which transfers were moving data. The times of concurrent transfers are added up."""

    def end(self, outcome: str) -> None:
        """Count the end of an active transfer."""
        self.active -= 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def is_between(self, instance_ids: Container[str]) -> bool:
        """Whether both instances of the link are among these."""
        return self.prefill in instance_ids and self.decode in instance_ids

    def copy(self) -> "LinkCounts":
        return msgspec.structs.replace(self, outcomes=dict(self.outcomes))

    def __add__(self, other: "LinkCounts") -> "LinkCounts":
        """Return the sum of both, with the `is_up` of `self`."""
        outcomes = {
            key: self.outcomes.get(key, 0) + other.outcomes.get(key, 0) for key in self.outcomes | other.outcomes
        }
        return LinkCounts(
            self.prefill,
            self.decode,
            self.is_up,
            self.active + other.active,
            outcomes,
            self.num_bytes + other.num_bytes,
            self.time_s + other.time_s,
        )


class HttpCounts(msgspec.Struct, tag=True):
    """Counts of HTTP requests with one method, one path, and answers whose status is of one class."""

    method: str
    path: str
    """Path of the route, with the names of its parameters instead of their values; "none" if no route matched."""
    status: str
    """Class of the status: 2xx, 4xx, …"""
    seconds: Histogram
    """Times until the end of the answer. It has the number of requests too."""
    request_bytes: int = 0
    response_bytes: int = 0

    def copy(self) -> "HttpCounts":
        return msgspec.structs.replace(self, seconds=self.seconds.copy())

    def __add__(self, other: "HttpCounts") -> "HttpCounts":
        return HttpCounts(
            self.method,
            self.path,
            self.status,
            self.seconds + other.seconds,
            self.request_bytes + other.request_bytes,
            self.response_bytes + other.response_bytes,
        )


class RpcFaults(msgspec.Struct, frozen=True, tag=True):
    """Counts of messages to an RPC server that had no effect. Each of them is also logged; none is expected."""

    dropped_frames: int = 0
    """Number of messages that were undecodable or from an unknown client."""
    failed_notifications: int = 0
    """Number of notifications whose method is not served, that were undecodable, or whose handler raised."""

    def __add__(self, other: "RpcFaults") -> "RpcFaults":
        return RpcFaults(
            self.dropped_frames + other.dropped_frames, self.failed_notifications + other.failed_notifications
        )
