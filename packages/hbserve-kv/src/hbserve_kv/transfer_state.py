"""The life of one incoming transfer, without any I/O.

    POSTED ──begin──▶ RECEIVING ──commit──▶ COMPLETED
       │                  │
       └──────fail────────┴──▶ DRAINING ──nothing can land any more──▶ FAILED_DRAINED
                                   └──────its deadline passed──────▶ UNKNOWN ──(as above)──▶ FAILED_DRAINED

COMPLETED and FAILED_DRAINED are final. The first cause of a failure is kept. Anything that does not fit the state
(late, duplicate, of another sender) changes nothing and returns False, for the caller to count.
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
    one_sided: bool
    """The sender writes without our help, so only it, or its death, can say that nothing more will land."""
    state: State = State.POSTED
    sender_epoch: str = ""
    cause: str = ""
    landed: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)
    _sender_drained: bool = False

    def begin(self, sender_epoch: str) -> bool:
        if self.state is not State.POSTED:
            return False
        self.state, self.sender_epoch = State.RECEIVING, sender_epoch
        return True

    def start_part(self, sender_epoch: str, part: int) -> bool:
        if self.state is not State.RECEIVING or sender_epoch != self.sender_epoch:
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

    def commit(self, sender_epoch: str, num_parts: int) -> bool:
        if self.state is not State.RECEIVING or sender_epoch != self.sender_epoch:
            return False
        if not self.one_sided and self.landed != set(range(num_parts)):
            self.fail(f"committed with {num_parts} parts, of which {len(self.landed)} have landed")
            return False
        self.state = State.COMPLETED
        return True

    def fail(self, cause: str) -> None:
        if self.state in (State.POSTED, State.RECEIVING):
            began = self.state is State.RECEIVING
            self.state, self.cause = State.DRAINING, cause
            self._sender_drained = self._sender_drained or not began
            self._drain()

    def sender_drained(self, sender_epoch: str) -> bool:
        """The sender says, or its death shows, that it writes no more."""
        if self.state in (State.COMPLETED, State.FAILED_DRAINED) or sender_epoch != self.sender_epoch:
            return False
        self._sender_drained = True
        self._drain()
        return True

    def give_up(self) -> None:
        """The deadline for draining has passed."""
        if self.state is State.DRAINING:
            self.state = State.UNKNOWN

    def _drain(self) -> None:
        quiet = not self.in_flight and (self._sender_drained or not self.one_sided)
        if self.state in (State.DRAINING, State.UNKNOWN) and quiet:
            self.state = State.FAILED_DRAINED

    @property
    def ended(self) -> bool:
        return self.state >= State.UNKNOWN

    @property
    def outcome(self) -> Outcome:
        assert self.ended, self.state
        return {State.COMPLETED: Outcome.COMPLETED, State.UNKNOWN: Outcome.UNKNOWN}.get(
            self.state, Outcome.FAILED_DRAINED
        )
