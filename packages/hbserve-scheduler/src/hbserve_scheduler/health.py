"""The states in which a scheduler sees one instance, and every transition from one to another.

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

A lost instance that answers may be in any of these states; and from each it becomes "failed" when it says so, with its
reason.

New requests go only to ready instances. Requests of a suspect or draining instance go on there; those of a lost one get
another attempt elsewhere. Whether an instance is ready does not depend on others: that a pair is not connected yet is a
fact about both, see links.py.

Draining applies to one life of an instance: the next one, with another epoch, takes requests again.
"""

from hbserve_rpc.messages import InstanceInfo, InstanceStatus
from hbserve_rpc.plain_values import one_line

SERVING: tuple[InstanceStatus, ...] = ("ready", "suspect")
"""States of an instance that takes requests, or probably will in a moment."""


class Health:
    """State of one instance, which is derived from what the instance has reported and from the connection to it. Every
    method returns whether the state has changed."""

    def __init__(self) -> None:
        self.state: InstanceStatus = "lost"
        self.why = "it has not answered yet"
        """Reason for the state; "" where it needs none."""
        self._info: InstanceInfo | None = None
        self._doubt = ""
        self.drained = ""
        """Epoch of the life that is to take no more requests; "" if there is none."""

    def answers(self, info: InstanceInfo) -> bool:
        """Note what the instance reports about itself."""
        self._info = info
        return self._derive()

    def doubted(self, why: str) -> bool:
        """Note why the instance may be lost: it is silent, or not connected. "" means that it is heard again."""
        self._doubt = why
        return self._derive()

    def lost(self, why: str) -> bool:
        """Note that the instance is lost, and forget what it has reported."""
        self._info, self._doubt = None, ""
        return self._become("lost", why)

    def drain(self, epoch: str) -> bool:
        """Give the life of this epoch no more requests; with "", let the instance have some again."""
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
        self.state, self.why = state, one_line(why)
        return is_another
