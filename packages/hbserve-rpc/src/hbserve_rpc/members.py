"""The structs and methods by which instances join a running deployment, are drained, change roles and leave it, and by
which it is scaled."""

from typing import Annotated, Literal

import msgspec

from hbserve_rpc.messages import Empty, InstanceInfo, Role
from hbserve_rpc.methods import Method, Notification, StreamMethod


class JoinRequest(msgspec.Struct, frozen=True, tag=True):
    """Use the instance that answers there, with what it says of itself. Of no effect if it is used already."""

    address: str
    role: Role | None = None
    """That it is expected to have; None: any."""
    again: bool = False
    """Also a life that was told to drain or to leave: it takes requests again. Who registers itself says no."""


class DrainRequest(msgspec.Struct, frozen=True, tag=True):
    """Give an instance no new requests, in the life that it has. Those that it has go on there."""

    instance_id: str
    leaves: bool = False
    """Forget it when it has nothing left."""
    within_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] | None = None
    """After so long, what it has gets another attempt elsewhere, and it is forgotten."""


class FlipRequest(msgspec.Struct, frozen=True, tag=True):
    """Have an instance serve as another role, without a new start."""

    instance_id: str
    role: Literal["prefill", "decode"]


class ScaleRequest(msgspec.Struct, frozen=True, tag=True):
    """Have so many instances of these roles, of those that the deployment has started itself."""

    wanted: dict[Role, Annotated[int, msgspec.Meta(ge=0, le=65536)]]


class ScaleNews(msgspec.Struct, frozen=True, tag=True):
    """A line for whoever has asked: what has been done, or what is waited for."""

    text: str


class Member(msgspec.Struct, frozen=True, tag=True):
    """An instance as schedulers of the same instances tell each other of it."""

    instance_id: str
    role: Role
    address: str
    drained: str = ""
    """The life in which it gets no new requests."""


class Members(msgspec.Struct, frozen=True, tag=True):
    """All instances; there are no others."""

    members: list[Member]


class Reloaded(msgspec.Struct, frozen=True, tag=True):
    """A deployment's file was read again. Those that are looked up by a name join when they are found."""

    joining: list[str]
    leaving: list[str]
    for_a_restart: list[str]
    """Sections that are other ones, and that are read only when a process starts."""


SCHEDULER_JOIN: Method[JoinRequest, InstanceInfo] = Method("scheduler.join", JoinRequest, InstanceInfo)
SCHEDULER_DRAIN: Method[DrainRequest, Empty] = Method("scheduler.drain", DrainRequest, Empty)
"""Answered when it is begun; the figures show when the instance has nothing left."""
INSTANCE_FLIP: Method[FlipRequest, InstanceInfo] = Method("instance.flip", FlipRequest, InstanceInfo)
"""Of an instance that has no request; else it is refused, as Overloaded. What it is from then on has another epoch."""
SCHEDULER_FLIP: StreamMethod[FlipRequest, ScaleNews] = StreamMethod("scheduler.flip", FlipRequest, ScaleNews)
"""Drains it first. Ends when it is done; if the stream is closed before, the instance stays what it was."""
SCHEDULER_SCALE: StreamMethod[ScaleRequest, ScaleNews] = StreamMethod("scheduler.scale", ScaleRequest, ScaleNews)
"""Ends when it is done. It goes on if the stream is closed."""
SCHEDULER_RELOAD: Method[Empty, Reloaded] = Method("scheduler.reload", Empty, Reloaded)
SCHEDULER_MEMBERS: Notification[Members] = Notification("scheduler.members", Members)
