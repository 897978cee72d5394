"""The structs and methods by which instances join a running deployment, are drained, change roles and leave, and by
which the deployment is scaled."""

from typing import Annotated, Literal

import msgspec

from hbserve_rpc.messages import Empty, InstanceInfo, Role
from hbserve_rpc.methods import Method, Notification, StreamMethod
from hbserve_rpc.plain_values import Id


class JoinRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to use the instance that answers at `address`, as it describes itself. Has no effect if it is in use."""

    address: str
    role: Role | None = None
    """Role that the instance is expected to have; None: any."""
    again: bool = False
    """Whether an instance that was told to drain or to leave takes requests again, in the same life. False where an
    instance registers itself."""


class DrainRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to give an instance, in its present life, no new requests. Those that it has go on there."""

    instance_id: Id
    leaves: bool = False
    """Whether to forget the instance when it has no requests left."""
    within_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] | None = None
    """Time after which the requests that it still has get another attempt elsewhere, and the instance is forgotten."""


class FlipRequest(msgspec.Struct, frozen=True, tag=True):
    """Request that an instance serve in another role, without a restart."""

    instance_id: Id
    role: Literal["prefill", "decode"]


class ScaleRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to have `wanted[role]` instances of each role, of those that the deployment has started itself."""

    wanted: dict[Role, Annotated[int, msgspec.Meta(ge=0, le=65536)]]


class ScaleNews(msgspec.Struct, frozen=True, tag=True):
    """A line for the caller: what has been done, or what is being waited for."""

    text: str


class Member(msgspec.Struct, frozen=True, tag=True):
    """An instance, as schedulers of the same instances describe it to each other."""

    instance_id: Id
    role: Role
    address: str
    drained: str = ""
    """Epoch in which the instance gets no new requests; "" if it is not drained."""


class Members(msgspec.Struct, frozen=True, tag=True):
    """The complete list of instances."""

    members: list[Member]


class Reloaded(msgspec.Struct, frozen=True, tag=True):
    """Result of reading a deployment's file again. Instances that are looked up by a DNS name join when found."""

    joining: list[str]
    leaving: list[str]
    for_a_restart: list[str]
    """Sections that have changed, but are read only when a process starts."""


SCHEDULER_JOIN: Method[JoinRequest, InstanceInfo] = Method("scheduler.join", JoinRequest, InstanceInfo)
SCHEDULER_DRAIN: Method[DrainRequest, Empty] = Method("scheduler.drain", DrainRequest, Empty)
"""Method that is answered when draining has begun. The stats show when the instance has no requests left."""
INSTANCE_FLIP: Method[FlipRequest, InstanceInfo] = Method("instance.flip", FlipRequest, InstanceInfo)
"""Method of an instance without requests; one that has some refuses with Overloaded. In its new role the instance has
another epoch."""
SCHEDULER_FLIP: StreamMethod[FlipRequest, ScaleNews] = StreamMethod("scheduler.flip", FlipRequest, ScaleNews)
"""Stream that drains the instance, changes its role, and then ends. If it is closed before, the role stays the same."""
SCHEDULER_SCALE: StreamMethod[ScaleRequest, ScaleNews] = StreamMethod("scheduler.scale", ScaleRequest, ScaleNews)
"""Stream that ends when the scaling is done. The scaling goes on if the stream is closed."""
SCHEDULER_RELOAD: Method[Empty, Reloaded] = Method("scheduler.reload", Empty, Reloaded)
SCHEDULER_MEMBERS: Notification[Members] = Notification("scheduler.members", Members)
