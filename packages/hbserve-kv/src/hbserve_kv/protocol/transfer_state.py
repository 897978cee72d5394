"""The life of one transfer, at its receiver and at its sender, without any I/O.

    OPENING ──begin, accept──▶ MOVING ──commit──▶ (COMMITTING ──acknowledge──▶) COMPLETED
       │                         │                      │
       └────────── fail ─────────┴──────────────────────┴──▶ DRAINING ──no block is in use any more──▶ FAILED_DRAINED
                                                                └──patience is over──▶ UNKNOWN ──(as above)──▶ ″

Only a sender is ever COMMITTING, until every receiver has acknowledged. COMPLETED and FAILED_DRAINED are final: only in
these may the blocks be freed, or used. The first cause of a failure is kept. A call that does not fit the phase (late,
duplicate, from another sender) changes nothing and returns False, so that the caller can count it.

Under tensor parallelism a receiver has several senders, which bring different heads of the same blocks. Each begins and
commits for itself; the transfer is COMPLETED when all heads have been committed. A sender is identified by its link,
whose key no other life has. A sender has a leg to each rank of the receiver. The progress of a leg is three integers:
parts pushed, begun (announced, or handed to the transport) and moved. If a leg fails, so does the transfer, unless the
leg's receiver has acknowledged it.

docs/kv-transfer.md shows which side owns the blocks in each phase.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from hbserve_rpc.plain_values import one_line


class Phase(IntEnum):
    """Phase in the life of a transfer, as drawn above."""

    OPENING = 0
    """No sender has begun; at a sender, not every receiver has accepted."""
    MOVING = 1
    COMMITTING = 2
    DRAINING = 3
    UNKNOWN = 4
    FAILED_DRAINED = 5
    COMPLETED = 6


class Outcome(Enum):
    """Outcome of a transfer, which decides what may happen to its blocks. Members are in order, from best to worst."""

    COMPLETED = "completed"
    """All bytes are there."""
    FAILED_DRAINED = "failed_drained"
    """Failed, and no byte can still land: the blocks may be used for something else."""
    UNKNOWN = "unknown"
    """Failed, and a byte may still land: the blocks must not be used until the transfer is drained."""


@dataclass(frozen=True)
class TransferResult:
    """Result of a transfer, on either side."""

    outcome: Outcome
    payload: bytes = b""
    """What the sender passed to `commit`; if there are several senders, what the first one passed."""
    num_bytes: int = 0
    num_parts: int = 0
    time_s: float = 0.0
    """Seconds during which a part of this transfer was moving, measured by the side that moved it; if there are several
    senders, the longest of their times."""
    error: str = ""
    """First cause of the failure; "" if the outcome is COMPLETED."""
    is_partial: bool = False
    """Whether it is COMPLETED with fewer blocks than were granted. Only for a receive posted with `may_be_partial`."""
    is_trusted: bool = True
    """Whether every sender of a receive had a key, or is a process of this host. If not, nobody knows who sent the
    data, and other requests must not use it."""


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of a transfer whose parts ended with these outcomes."""
    return max(outcomes, key=list(Outcome).index)


def joint_result(results: Sequence[TransferResult], error: str = "") -> TransferResult:
    """Return the result of a transfer whose parts ended with these results. Bytes and parts are added up."""
    return TransferResult(
        worst(each.outcome for each in results),
        results[0].payload,
        sum(each.num_bytes for each in results),
        sum(each.num_parts for each in results),
        max(each.time_s for each in results),
        error,
        any(each.is_partial for each in results),
        all(each.is_trusted for each in results),
    )


@dataclass(eq=False)
class TransferState:
    """Phase of a transfer on either side, and why it has failed."""

    phase: Phase = field(default=Phase.OPENING, init=False)
    cause: str = field(default="", init=False)
    """Why it has failed, in one line: a peer or a backend may have said it; "" if it has not."""

    @property
    def failed(self) -> bool:
        return Phase.DRAINING <= self.phase <= Phase.FAILED_DRAINED

    @property
    def ended(self) -> bool:
        return self.phase >= Phase.UNKNOWN

    @property
    def outcome(self) -> Outcome:
        assert self.ended, self.phase
        return {Phase.COMPLETED: Outcome.COMPLETED, Phase.UNKNOWN: Outcome.UNKNOWN}.get(
            self.phase, Outcome.FAILED_DRAINED
        )


@dataclass
class SenderProgress:
    """The progress of one sender of a transfer."""

    heads: frozenset[int]
    one_sided: bool
    """Whether it writes without our help. If so, losing it does not prove that nothing more will land; its death
    does."""
    landed: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)
    committed: bool = False
    drained: bool = False

    @property
    def is_quiet(self) -> bool:
        return not self.in_flight and (self.drained or self.committed)


@dataclass
class IncomingState(TransferState):
    """State of a transfer at its receiver."""

    heads: frozenset[int] = frozenset({0})
    """KV heads that must arrive."""
    num_blocks: int = 0
    """Number of granted blocks. When a sender commits, it must have brought its heads of all of them."""
    may_be_partial: bool = False
    """Whether a sender may bring fewer blocks."""
    senders: dict[str, SenderProgress] = field(default_factory=dict)
    """Senders that have begun, by the key of their link."""

    @property
    def missing(self) -> frozenset[int]:
        """Heads that no sender has begun to bring yet; empty if the transfer has failed or ended."""
        if self.phase > Phase.MOVING:
            return frozenset()
        return self.heads.difference(*(sender.heads for sender in self.senders.values()))

    def begin(self, link: str, heads: Iterable[int] = (0,), *, one_sided: bool) -> bool:
        brought = frozenset(heads)
        if self.phase > Phase.MOVING or link in self.senders or not brought <= self.missing:
            return False
        self.phase = Phase.MOVING
        self.senders[link] = SenderProgress(brought, one_sided)
        return True

    def start_parts(self, link: str, *parts: int) -> bool:
        """Note that parts are under way: all of them or, if one does not fit, none. This is allowed while draining too:
        what the sender has begun to send is taken, so that both sides agree."""
        sender = self.senders.get(link)
        if sender is None or sender.committed or sender.drained or self.phase not in (Phase.MOVING, Phase.DRAINING):
            return False
        if len(set(parts) - sender.landed - sender.in_flight) < len(parts):
            return False
        sender.in_flight.update(parts)
        return True

    def end_part(self, link: str, part: int, error: str = "") -> None:
        """Note that a started part has landed or, with an `error`, has failed and nothing of it can land any more."""
        sender = self.senders[link]
        sender.in_flight.discard(part)
        if error:
            self.fail(error)
        else:
            sender.landed.add(part)
        self._drain()

    def commit(self, link: str, num_parts: int, num_blocks: int = 0) -> bool:
        """Note that a sender has sent all its parts. `num_blocks` is how many of the granted blocks have arrived."""
        sender = self.senders.get(link)
        if self.phase is not Phase.MOVING or sender is None or sender.committed:
            return False
        if not sender.one_sided and not _are_all(sender.landed, num_parts):
            self.fail(f"committed with {num_parts} parts, of which {len(sender.landed)} have landed")
            return False
        if num_blocks > self.num_blocks or (num_blocks < self.num_blocks and not self.may_be_partial):
            self.fail(f"committed with {num_blocks} blocks of the {self.num_blocks} that were granted")
            return False
        sender.committed = True
        if self.heads == {head for each in self.senders.values() if each.committed for head in each.heads}:
            self.phase = Phase.COMPLETED
        return True

    def fail(self, cause: str) -> None:
        if self.phase in (Phase.OPENING, Phase.MOVING):
            self.phase, self.cause = Phase.DRAINING, one_line(cause)
            self._drain()

    def sender_drained(self, link: str) -> bool:
        """Note that a sender sends nothing more, because it says so, or because it is lost. The loss of a one-sided
        sender does not show that; only its death does."""
        sender = self.senders.get(link)
        if self.phase in (Phase.COMPLETED, Phase.FAILED_DRAINED) or sender is None:
            return False
        sender.drained = True
        self._drain()
        return True

    def give_up(self) -> None:
        """Note that the deadline for draining has passed."""
        if self.phase is Phase.DRAINING:
            self.phase = Phase.UNKNOWN

    def _drain(self) -> None:
        quiet = all(sender.is_quiet for sender in self.senders.values())
        if self.phase in (Phase.DRAINING, Phase.UNKNOWN) and quiet:
            self.phase = Phase.FAILED_DRAINED

    def is_taking(self, link: str) -> bool:
        """Whether started parts are still under way over this link."""
        return link in self.senders and bool(self.senders[link].in_flight)

    @property
    def undrained(self) -> list[str]:
        """Links of the senders that may still write."""
        return [link for link, sender in self.senders.items() if not sender.is_quiet]


class Coverage:
    """Blocks of a transfer that were pushed, or announced. A block that moves layer by layer counts once all of its
    layers have."""

    def __init__(self, num_layers: int) -> None:
        self._whole: set[int] = set()
        self._by_layer: list[set[int]] = [set() for _ in range(num_layers)]

    def add(self, places: range, layers: range | None = None) -> None:
        """Add blocks, none of which is there: see `has_any`."""
        if layers is None:
            self._whole.update(places)
        for layer in layers or ():
            self._by_layer[layer].update(places)

    def has_any(self, places: range, layers: range | None = None) -> bool:
        """Whether one of the blocks is there already, be it in one of the layers."""
        by_layer = self._by_layer if layers is None else self._by_layer[layers.start : layers.stop]
        return not all(each.isdisjoint(places) for each in (self._whole, *by_layer))

    @property
    def by_layers(self) -> set[int]:
        """Blocks that moved layer by layer and are complete."""
        return set.intersection(*self._by_layer)

    def __len__(self) -> int:
        return len(self._whole | self.by_layers)


def _are_all(parts: set[int], num_parts: int) -> bool:
    """Whether the parts are 0, 1 … `num_parts` - 1. `num_parts` comes from a peer and may be any number."""
    return len(parts) == num_parts and all(0 <= part < num_parts for part in parts)


@dataclass
class LegProgress:
    """Progress of one leg, which is what a transfer sends to one rank of its receiver."""

    one_sided: bool = False
    """Whether the receiver learns only from the commit that parts have landed."""
    accepted: bool = False
    num_pushed: int = 0
    num_begun: int = 0
    num_moved: int = 0
    num_moving: int = 0
    """Number of parts that were begun and have not ended yet."""
    has_stray: bool = False
    """Whether a part that has failed may still be moving."""
    closed: bool = False
    """Whether its connection is closed. Then nothing is read for it any more, whatever the transport reports later."""
    acknowledged: bool = False

    @property
    def is_quiet(self) -> bool:
        return self.closed or not (self.num_moving or self.has_stray)

    @property
    def may_commit(self) -> bool:
        """Whether the leg has come far enough for a commit. The receiver of a two-sided transport knows by itself when
        announced parts have landed, so there it is enough that all have begun."""
        return self.num_pushed == (self.num_moved if self.one_sided else self.num_begun)


class SendState(TransferState):
    """State of a transfer at its sender."""

    def __init__(self, num_legs: int = 1, on_change: Callable[[], None] = lambda: None) -> None:
        """`on_change` is called after each change that somebody may wait for. A part that moves before the commit is
        not such a change."""
        super().__init__()
        self.legs = [LegProgress() for _ in range(num_legs)]
        self.error: Exception | None = None
        """The exception that `cause` comes from; None if there was none."""
        self.payload = b""
        self._on_change = on_change

    def accept(self, leg: int, *, one_sided: bool) -> bool:
        """Note that the receiver has accepted this leg."""
        mine = self.legs[leg]
        if self.phase is not Phase.OPENING or mine.accepted:
            return False
        mine.accepted, mine.one_sided = True, one_sided
        if all(each.accepted for each in self.legs):
            self.phase = Phase.MOVING
            self._on_change()
        return True

    def push(self, leg: int) -> bool:
        """Count one more part."""
        if self.phase is not Phase.MOVING:
            return False
        self.legs[leg].num_pushed += 1
        return True

    def commit(self, payload: bytes = b"") -> bool:
        """Note that no more parts will be pushed."""
        if self.phase is not Phase.MOVING:
            return False
        self.phase, self.payload = Phase.COMMITTING, payload
        return self._changed()

    def begin_parts(self, leg: int, num_parts: int) -> bool:
        """Hand parts to the transport, which may read their blocks from now on. Returns False if it must not."""
        mine = self.legs[leg]
        is_open = self.phase in (Phase.MOVING, Phase.COMMITTING) and not (mine.closed or mine.acknowledged)
        if not is_open or mine.num_begun + num_parts > mine.num_pushed:
            return False
        mine.num_begun += num_parts
        mine.num_moving += num_parts
        return self._changed()

    def end_parts(self, leg: int, num_parts: int, error: str = "", *, may_go_on: bool = False) -> None:
        """Note that parts that were begun have moved or, with an `error`, have failed. If `may_go_on`, the failed ones
        may still move until `close`."""
        mine = self.legs[leg]
        mine.num_moving -= num_parts
        if error:
            mine.has_stray = mine.has_stray or may_go_on
            self.fail(error, leg)
        else:
            mine.num_moved += num_parts
        self._changed()

    def may_commit(self, leg: int) -> bool:
        """Whether the receiver should be asked to acknowledge this leg."""
        return self.phase is Phase.COMMITTING and self.legs[leg].may_commit

    def acknowledge(self, leg: int) -> bool:
        """Note that the receiver has all of this leg, whatever happens to its connection from now on."""
        if not self.may_commit(leg) or self.legs[leg].acknowledged:
            return False
        self.legs[leg].acknowledged = True
        return self._changed()

    def fail(self, cause: str, leg: int | None = None, error: Exception | None = None) -> bool:
        """Note that the transfer has failed. `leg` is the one that made it fail; None: none in particular."""
        given = self.legs if leg is None else [self.legs[leg]]
        if self.failed or all(each.acknowledged for each in given):
            return False
        self.phase, self.cause, self.error = Phase.DRAINING, one_line(cause), error
        return self._changed()

    def close(self, leg: int) -> None:
        """Note that nothing is read for this leg any more, not even for a part that has failed or has not ended."""
        self.legs[leg].closed = True
        self._changed()

    def give_up(self) -> bool:
        """Stop waiting for what is still under way."""
        if self.phase is not Phase.DRAINING:
            return False
        self.phase = Phase.UNKNOWN
        return self._changed()

    def _changed(self) -> bool:
        if all(leg.is_quiet for leg in self.legs):
            if self.phase is Phase.COMMITTING and all(leg.acknowledged for leg in self.legs):
                self.phase = Phase.COMPLETED
            elif self.phase in (Phase.DRAINING, Phase.UNKNOWN):
                self.phase = Phase.FAILED_DRAINED
        if self.phase is not Phase.MOVING:
            self._on_change()
        return True
