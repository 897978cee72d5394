"""The life of one incoming transfer, without any I/O.

    POSTED ──begin──▶ RECEIVING ──commit──▶ COMPLETED
       │                  │
       └──────fail────────┴──▶ DRAINING ──nothing can land any more──▶ FAILED_DRAINED
                                   └──────its deadline passed──────▶ UNKNOWN ──(as above)──▶ FAILED_DRAINED

COMPLETED and FAILED_DRAINED are final. The first cause of a failure is kept. Anything that does not fit the state
(late, duplicate, of another sender) changes nothing and returns False, for the caller to count.

Under tensor parallelism several senders bring different heads of the same blocks. Each begins and commits for itself;
the transfer is COMPLETED when all heads have been committed. A sender is named by its link, which no other life has.
"""

from collections.abc import Iterable
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


@dataclass(frozen=True)
class TransferResult:
    """How a transfer ended, on either side."""

    outcome: Outcome
    payload: bytes = b""
    """What the sender gave to `commit`; of several senders, the first one's."""
    num_bytes: int = 0
    num_parts: int = 0
    time_s: float = 0.0
    """Time during which a part of this transfer was moving, as the side measured it that moved it; of several senders,
    the longest."""
    error: str = ""
    """The first cause, unless the outcome is COMPLETED."""
    is_partial: bool = False
    """COMPLETED with fewer blocks than were granted; only of a receive that was posted with `may_be_partial`."""


@dataclass
class SenderState:
    """What one sender has done for a transfer."""

    heads: frozenset[int]
    one_sided: bool
    """It writes without our help, so losing it does not show that nothing more will land; its death does."""
    landed: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)
    committed: bool = False
    drained: bool = False

    @property
    def is_quiet(self) -> bool:
        return not self.in_flight and (self.drained or self.committed)


@dataclass
class IncomingState:
    heads: frozenset[int] = frozenset({0})
    """Heads that must come."""
    num_blocks: int = 0
    """Blocks that were granted: each sender must have brought its heads of all of them when it commits."""
    may_be_partial: bool = False
    """Or of fewer."""
    state: State = State.POSTED
    cause: str = ""
    senders: dict[str, SenderState] = field(default_factory=dict)

    def begin(self, link: str, heads: Iterable[int] = (0,), *, one_sided: bool) -> bool:
        brought = frozenset(heads)
        taken = {head for sender in self.senders.values() for head in sender.heads}
        if self.state > State.RECEIVING or link in self.senders or brought & taken or not brought <= self.heads:
            return False
        self.state = State.RECEIVING
        self.senders[link] = SenderState(brought, one_sided)
        return True

    def start_parts(self, link: str, *parts: int) -> bool:
        """All or none. Also while draining: what the sender had begun to send is taken, so that both sides agree."""
        sender = self.senders.get(link)
        if sender is None or sender.committed or sender.drained or self.state not in (State.RECEIVING, State.DRAINING):
            return False
        if len(set(parts) - sender.landed - sender.in_flight) < len(parts):
            return False
        sender.in_flight.update(parts)
        return True

    def end_part(self, link: str, part: int, error: str = "") -> None:
        """A part that was started has landed, or has failed and nothing of it can land any more."""
        sender = self.senders[link]
        sender.in_flight.discard(part)
        if error:
            self.fail(error)
        else:
            sender.landed.add(part)
        self._drain()

    def commit(self, link: str, num_parts: int, num_blocks: int = 0) -> bool:
        """`num_blocks`: of those that were granted, how many have come."""
        sender = self.senders.get(link)
        if self.state is not State.RECEIVING or sender is None or sender.committed:
            return False
        if not sender.one_sided and not _are_all(sender.landed, num_parts):
            self.fail(f"committed with {num_parts} parts, of which {len(sender.landed)} have landed")
            return False
        if num_blocks > self.num_blocks or (num_blocks < self.num_blocks and not self.may_be_partial):
            self.fail(f"committed with {num_blocks} blocks of the {self.num_blocks} that were granted")
            return False
        sender.committed = True
        if self.heads == {head for each in self.senders.values() if each.committed for head in each.heads}:
            self.state = State.COMPLETED
        return True

    def fail(self, cause: str) -> None:
        if self.state in (State.POSTED, State.RECEIVING):
            self.state, self.cause = State.DRAINING, cause
            self._drain()

    def sender_drained(self, link: str) -> bool:
        """The sender says that it sends no more; or its loss shows it, or its death if it is one-sided."""
        sender = self.senders.get(link)
        if self.state in (State.COMPLETED, State.FAILED_DRAINED) or sender is None:
            return False
        sender.drained = True
        self._drain()
        return True

    def give_up(self) -> None:
        """The deadline for draining has passed."""
        if self.state is State.DRAINING:
            self.state = State.UNKNOWN

    def _drain(self) -> None:
        quiet = all(sender.is_quiet for sender in self.senders.values())
        if self.state in (State.DRAINING, State.UNKNOWN) and quiet:
            self.state = State.FAILED_DRAINED

    def is_taking(self, link: str) -> bool:
        """Parts that were started over this link are under way."""
        return link in self.senders and bool(self.senders[link].in_flight)

    @property
    def undrained(self) -> list[str]:
        """Links of the senders that may still write."""
        return [link for link, sender in self.senders.items() if not sender.is_quiet]

    @property
    def ended(self) -> bool:
        return self.state >= State.UNKNOWN

    @property
    def outcome(self) -> Outcome:
        assert self.ended, self.state
        return {State.COMPLETED: Outcome.COMPLETED, State.UNKNOWN: Outcome.UNKNOWN}.get(
            self.state, Outcome.FAILED_DRAINED
        )


def _are_all(parts: set[int], num_parts: int) -> bool:
    """Whether they are 0, 1 … `num_parts` - 1. That number is a peer's word, and may be any."""
    return len(parts) == num_parts and all(0 <= part < num_parts for part in parts)
