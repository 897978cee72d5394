"""The life of one incoming transfer, without any I/O.

    POSTED ──begin──▶ RECEIVING ──commit──▶ COMPLETED
       │                  │
       └──────fail────────┴──▶ DRAINING ──nothing can land any more──▶ FAILED_DRAINED
                                   └──────its deadline passed──────▶ UNKNOWN ──(as above)──▶ FAILED_DRAINED

COMPLETED and FAILED_DRAINED are final. The first cause of a failure is kept. Anything that does not fit the state
(late, duplicate, over another link) changes nothing and returns False, for the caller to count.
"""

from dataclasses import dataclass, field
from enum import Enum, IntEnum


class State(IntEnum):
    POSTED = 0
    RECEIVING = 1
    DRAINING = 2
    UNKNOWN = 3
    FAILED_DRAINED = 4
    COMPLETED = 5


class Outcome(Enum):
    """How a transfer ended, which decides what may happen to its blocks."""

    COMPLETED = "completed"
    """All bytes are there."""
    FAILED_DRAINED = "failed_drained"
    """Failed, and no byte can still land: the blocks may be used for something else."""
    UNKNOWN = "unknown"
    """Failed, and a byte may still land: the blocks must not be used until the transfer is drained."""


@dataclass
class IncomingState:
    num_bytes: int
    """What a commit must have moved."""
    one_sided: bool
    """The sender writes without our help, so in-flight parts are unknown here until it, or its link, has stopped."""
    state: State = State.POSTED
    link: str = ""
    cause: str = ""
    landed: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)
    _sender_stopped: bool = False

    def begin(self, link: str) -> bool:
        if self.state is not State.POSTED:
            return False
        self.state, self.link = State.RECEIVING, link
        return True

    def start_part(self, link: str, part: int) -> bool:
        if self.state is not State.RECEIVING or link != self.link:
            return False
        if part in self.landed or part in self.in_flight:
            return False
        self.in_flight.add(part)
        return True

    def end_part(self, part: int, error: str = "") -> None:
        """A part that was started has landed, or has failed and nothing of it can land any more."""
        self.in_flight.discard(part)
        if error:
            self.fail(error)
        else:
            self.landed.add(part)
        self._drain()

    def commit(self, link: str, num_parts: int, num_bytes: int) -> bool:
        if self.state is not State.RECEIVING or link != self.link:
            return False
        if not self.one_sided and self.landed != set(range(num_parts)):
            self.fail(f"committed with {num_parts} parts, of which {len(self.landed)} have landed")
            return False
        if num_bytes != self.num_bytes:
            self.fail(f"committed with {num_bytes} bytes, expected {self.num_bytes}")
            return False
        self.state = State.COMPLETED
        return True

    def fail(self, cause: str) -> bool:
        if self.state not in (State.POSTED, State.RECEIVING):
            return False
        # A transfer that never began has no writer.
        self._sender_stopped = self._sender_stopped or self.state is State.POSTED
        self.state, self.cause = State.DRAINING, cause
        self._drain()
        return True

    def sender_stopped(self, link: str) -> bool:
        """The sender says that it writes no more, or its link was torn down on this side."""
        if self.final or link != self.link:
            return False
        self._sender_stopped = True
        self._drain()
        return True

    def give_up(self) -> None:
        """The deadline for draining has passed."""
        if self.state is State.DRAINING:
            self.state = State.UNKNOWN

    def _drain(self) -> None:
        quiet = not self.in_flight and (self._sender_stopped or not self.one_sided)
        if self.failed and quiet:
            self.state = State.FAILED_DRAINED

    @property
    def failed(self) -> bool:
        """Failed, and not drained yet."""
        return self.state in (State.DRAINING, State.UNKNOWN)

    @property
    def final(self) -> bool:
        return self.state >= State.FAILED_DRAINED

    @property
    def outcome(self) -> Outcome | None:
        """None while the transfer goes on."""
        return {
            State.UNKNOWN: Outcome.UNKNOWN,
            State.FAILED_DRAINED: Outcome.FAILED_DRAINED,
            State.COMPLETED: Outcome.COMPLETED,
        }.get(self.state)
