"""Figures that grow: of one link between two instances, and of one kind of HTTP requests. Sums over processes."""

import msgspec

from hbserve_rpc.histogram import Histogram


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
