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
"""It takes requests, or will in a moment."""


class Health:
    """Of one instance. `state` follows from what it has said, and what was heard of it."""

    def __init__(self) -> None:
        self.state: InstanceStatus = "lost"
        self.why = "it has not answered yet"
        """It is in this state."""
        self._info: InstanceInfo | None = None
        self._doubt = ""
        self.drained = ""
        """The life that is to take no more."""

    def answers(self, info: InstanceInfo) -> bool:
        """It says what it is. Returns whether its state is another, as all of these do."""
        self._info = info
        return self._derive()

    def doubted(self, why: str) -> bool:
        """It is silent, or not connected; with "", it is heard again."""
        self._doubt = why
        return self._derive()

    def lost(self, why: str) -> bool:
        self._info, self._doubt = None, ""
        return self._become("lost", why)

    def drain(self, epoch: str) -> bool:
        """This life is to take no requests any more; with "", it may again."""
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
