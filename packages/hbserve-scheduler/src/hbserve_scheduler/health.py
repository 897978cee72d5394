"""The state in which a scheduler sees one instance, and every way from one state to another.

    added       it answers          it serves           silent, or not connected ─▶
      │             │                   │            ◀─ heard again
      ▼             ▼                   ▼
    ┌──────┐     ┌──────────┐       ┌───────┐            ┌─────────┐
    │ lost │ ──▶ │ starting │ ────▶ │ ready │ ◀────────▶ │ suspect │
    └──────┘     └──────────┘       └───────┘            └─────────┘
      ▲                               ▲   │ it is to end: it says so, or somebody else
      │ its process has ended,        │   ▼                   │
      │ it said goodbye, or was     ┌──────────┐              │
      └ silent for so long, in      │ draining │ ◀────────────┘
        whatever state it was       └──────────┘

One that was lost and answers may be in any of these; and from each it is "failed" when it says so, with its reason.

A new request goes to those that are ready, and to no others. What a suspect or a draining one has goes on there; what a
lost one had gets another attempt elsewhere. Whether one is ready has nothing to do with others: a pair that is not
connected yet is a fact of both, see links.py.

To be drained belongs to one life: its next one, of another epoch, takes requests again.
"""

from hbserve_rpc.messages import InstanceInfo, InstanceStatus

SERVING: tuple[InstanceStatus, ...] = ("ready", "suspect")
"""States of an instance that takes requests, or will in a moment."""


class Health:
    """State of one instance, which follows from what it has said and from the connection to it. Every method returns
    whether the state has changed."""

    def __init__(self) -> None:
        self.state: InstanceStatus = "lost"
        self.why = "it has not answered yet"
        """Why it is in this state; "" where that needs no reason."""
        self._info: InstanceInfo | None = None
        self._doubt = ""
        self.drained = ""
        """Epoch of the life that is to take no more requests."""

    def answers(self, info: InstanceInfo) -> bool:
        """Take in what it says of itself."""
        self._info = info
        return self._derive()

    def doubted(self, why: str) -> bool:
        """Note why it may be lost: it is silent, or not connected. "": it is heard again."""
        self._doubt = why
        return self._derive()

    def lost(self, why: str) -> bool:
        """Forget what it has said."""
        self._info, self._doubt = None, ""
        return self._become("lost", why)

    def drain(self, epoch: str) -> bool:
        """Give the life of this epoch no more requests; "": it may have some again."""
        self.drained = epoch
        return self._derive()

    def _derive(self) -> bool:
        info = self._info
        if info is None:
            return False
        if info.status == "ready" and self.drained == info.epoch:
            return self._become("draining", "it was told to drain")
        if info.status == "ready" and self._doubt:
            return self._become("suspect", self._doubt)
        return self._become(info.status, info.error)

    def _become(self, state: InstanceStatus, why: str) -> bool:
        is_another = state != self.state
        self.state, self.why = state, why
        return is_another
