"""Figures that grow, and can be summed over processes: values by range, one link between two instances, one kind
of HTTP requests, and what an RPC server could not use."""

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Sequence
from typing import Self

import msgspec

FEW = 16
"""Values of which each is looked for among the bounds; of more, the bounds among them."""


class Histogram(msgspec.Struct, tag=True):
    """Counts of values by range, as Prometheus has them: summed, they stay exact.

    `counts[i]` values were at most `bounds[i]`, and more than the bound before it; the last count is of the rest."""

    bounds: list[float]
    counts: list[int]
    total: float = 0.0
    """Sum of the values."""

    @classmethod
    def over(cls, bounds: Sequence[float]) -> Self:
        """An empty one. The bounds ascend."""
        return cls(list(bounds), [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Iterable[float]) -> None:
        """Of many at once, which takes less time than one after the other."""
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
        """As it is now."""
        return Histogram(self.bounds, list(self.counts), self.total)

    def __add__(self, other: "Histogram") -> "Histogram":
        """Of both. Raises ValueError: their bounds differ."""
        if self.bounds != other.bounds:
            raise ValueError(f"histograms over {self.bounds} and over {other.bounds} cannot be added")
        counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        return Histogram(list(self.bounds), counts, self.total + other.total)


class LinkCounts(msgspec.Struct, tag=True):
    """Transfers of one scheduler's requests from a prefill instance to a decode instance."""

    prefill: str
    decode: str
    is_up: bool | None = None
    """Connected, or cannot be now; None: not tried yet, or not any more."""
    active: int = 0
    """Requests for which the decode instance has room, and not all of the KV yet."""
    outcomes: dict[str, int] = {}
    """Transfers that have ended: completed, failed or aborted."""
    num_bytes: int = 0
    time_s: float = 0.0
    """Time during which something was moving; that of transfers beside each other is added."""

    def end(self, outcome: str) -> None:
        """One that was active has ended."""
        self.active -= 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def is_between(self, instance_ids: Container[str]) -> bool:
        """Whether both of its instances are among these."""
        return self.prefill in instance_ids and self.decode in instance_ids

    def copy(self) -> "LinkCounts":
        return msgspec.structs.replace(self, outcomes=dict(self.outcomes))

    def __add__(self, other: "LinkCounts") -> "LinkCounts":
        """Of both; whether it is up is as `self` has it."""
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
    """HTTP requests of one method to one path whose answers had a status of one class."""

    method: str
    path: str
    """As the routes have it, with the names of its parameters; "none": there is none."""
    status: str
    """2xx, 4xx, …"""
    seconds: Histogram
    """Until the end of the answer. It has the number of requests too."""
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
    """What came to an RPC server and had no effect. Each is logged too; none is to be expected."""

    dropped_frames: int = 0
    """Messages that were undecodable, or from a client that is not known."""
    failed_notifications: int = 0
    """Notifications of a method that is not served, that were undecodable, or whose handler raised."""

    def __add__(self, other: "RpcFaults") -> "RpcFaults":
        return RpcFaults(
            self.dropped_frames + other.dropped_frames, self.failed_notifications + other.failed_notifications
        )
