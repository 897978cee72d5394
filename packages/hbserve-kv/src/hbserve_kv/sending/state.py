"""The life of one outgoing transfer, without any I/O.

    OPENING ──every leg accepted──▶ SENDING ──commit──▶ COMMITTING ──every leg acknowledged──▶ COMPLETED
       │                               │                    │
       └───────────── fail ────────────┴────────────────────┴──▶ DRAINING ──no block is read any more──▶ FAILED_DRAINED
                                                                    └──patience is over──▶ UNKNOWN ──(as above)──▶ ″

COMPLETED and FAILED_DRAINED are final: only then are the blocks the caller's again. The first cause of a failure is
kept. Anything that does not fit the state changes nothing and returns False.

A leg is what goes to one rank of the receiver, and its progress is three integers: parts pushed, begun (announced, or
handed to the transport) and moved. One leg that fails fails the transfer, unless its receiver has acknowledged it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from hbserve_kv.protocol.transfer_state import Outcome


class Phase(IntEnum):
    OPENING = 0
    SENDING = 1
    COMMITTING = 2
    DRAINING = 3
    UNKNOWN = 4
    FAILED_DRAINED = 5
    COMPLETED = 6


@dataclass
class LegState:
    one_sided: bool = False
    """Its receiver learns from the commit alone that parts have landed."""
    accepted: bool = False
    num_pushed: int = 0
    num_begun: int = 0
    num_moved: int = 0
    num_moving: int = 0
    """Parts that were begun and have not ended yet."""
    has_stray: bool = False
    """A part that has failed may go on."""
    closed: bool = False
    """Its connection is: nothing is read for it any more, whatever the transport says later."""
    acknowledged: bool = False

    @property
    def is_quiet(self) -> bool:
        return self.closed or not (self.num_moving or self.has_stray)

    @property
    def may_commit(self) -> bool:
        """The receiver of a two-sided transport knows when the parts have landed that were announced to it."""
        return self.num_pushed == (self.num_moved if self.one_sided else self.num_begun)


class SendState:
    def __init__(self, num_legs: int = 1, on_change: Callable[[], None] = lambda: None) -> None:
        """on_change: called after what somebody may wait for, which the parts that move before the commit are not."""
        self.legs = [LegState() for _ in range(num_legs)]
        self.phase = Phase.OPENING
        self.cause = ""
        self.error: Exception | None = None
        """The exception that the cause comes from, if it was one."""
        self.payload = b""
        self._on_change = on_change

    def accept(self, leg: int, *, one_sided: bool) -> bool:
        """The receiver has accepted this leg."""
        mine = self.legs[leg]
        if self.phase is not Phase.OPENING or mine.accepted:
            return False
        mine.accepted, mine.one_sided = True, one_sided
        if all(each.accepted for each in self.legs):
            self.phase = Phase.SENDING
            self._on_change()
        return True

    def push(self, leg: int) -> bool:
        """One part more."""
        if self.phase is not Phase.SENDING:
            return False
        self.legs[leg].num_pushed += 1
        return True

    def commit(self, payload: bytes = b"") -> bool:
        """No more parts are pushed."""
        if self.phase is not Phase.SENDING:
            return False
        self.phase, self.payload = Phase.COMMITTING, payload
        return self._changed()

    def begin_parts(self, leg: int, num_parts: int) -> bool:
        """Parts go to the transport now, so their blocks may be read. False: they must not."""
        mine = self.legs[leg]
        is_open = self.phase in (Phase.SENDING, Phase.COMMITTING) and not (mine.closed or mine.acknowledged)
        if not is_open or mine.num_begun + num_parts > mine.num_pushed:
            return False
        mine.num_begun += num_parts
        mine.num_moving += num_parts
        return self._changed()

    def end_parts(self, leg: int, num_parts: int, error: str = "", *, may_go_on: bool = False) -> None:
        """Parts that were begun have moved or, with an error, have failed; then they may go on until `close`."""
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
        """The receiver has all of this leg, whatever happens to its connection now."""
        if not self.may_commit(leg) or self.legs[leg].acknowledged:
            return False
        self.legs[leg].acknowledged = True
        return self._changed()

    def fail(self, cause: str, leg: int | None = None, error: Exception | None = None) -> bool:
        """`leg`: the one by which the transfer fails."""
        given = self.legs if leg is None else [self.legs[leg]]
        if self.failed or all(each.acknowledged for each in given):
            return False
        self.phase, self.cause, self.error = Phase.DRAINING, cause, error
        return self._changed()

    def close(self, leg: int) -> None:
        """Nothing is read for this leg any more, not even for a part that has failed or has not ended."""
        self.legs[leg].closed = True
        self._changed()

    def give_up(self) -> bool:
        """Patience with what is still under way is over."""
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
        if self.phase is not Phase.SENDING:
            self._on_change()
        return True

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
