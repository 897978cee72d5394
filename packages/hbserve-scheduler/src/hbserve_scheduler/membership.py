"""Membership of a running deployment: instances join it, are drained, take another role, and leave.

All changes are made here, whoever asks for them: a command, an instance that registers itself, a DNS name that is
looked up, or the file that is read again. Each time the whole list is sent to the siblings, which are other schedulers
of the same instances.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence

from hbserve_rpc import HBServeRpcError, InvalidAddress, InvalidRequest, Overloaded, parse_address
from hbserve_rpc.members import INSTANCE_FLIP, FlipRequest, Member
from hbserve_rpc.messages import DESCRIBE, Empty, InstanceInfo, Role
from hbserve_scheduler.fleet import Fleet
from hbserve_scheduler.instances import InstanceHandle

logger = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 5.0
LOOK_S = 0.2
"""Pause between two checks whether a leaving instance has no requests left."""
MOST_SENT_AWAY = 1024
FORGOTTEN_S = 60.0
"""Time for which an instance that joined by itself, and is lost, stays a member if it does not join again."""


class Membership:
    """The members of a scheduler's fleet. An object belongs to the event loop of its scheduler."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._sent_away: dict[str, None] = {}
        """Epochs of the last MOST_SENT_AWAY lives that were told to leave. They cannot come back by themselves."""
        self._flipping: set[str] = set()
        """Instances that are drained only for another role. One that is told to drain meanwhile is no longer here."""
        self._setting = asyncio.Lock()
        self._forgetting: dict[str, asyncio.TimerHandle] = {}

    async def close(self) -> None:
        for timer in self._forgetting.values():
            timer.cancel()
        leaving = list(self._leaving.values())
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)

    def has(self, instance_id: str) -> bool:
        """Return whether the instance is a member that is reachable, or was so a moment ago."""
        handle = self._fleet.handles.get(instance_id)
        return handle is not None and handle.status != "lost"

    async def add(self, member: Member) -> None:
        """Use a member as soon as it is there. If there is one with its id already, that one stays as it is."""
        if member.instance_id not in self._fleet.handles:
            await self._fleet.add(member.instance_id, member.role, member.address)

    async def remove(self, instance_id: str) -> None:
        """Stop using an instance at once; its requests get another attempt elsewhere. An unknown id is ignored."""
        if instance_id in self._fleet.handles:
            await self._fleet.remove(instance_id)

    # ---- asked for by somebody who decides -----------------------------------------------------------------------

    async def join(self, address: str, role: Role | None = None, *, again: bool = False) -> InstanceInfo:
        """Add the instance at `host:port`, as it describes itself. If it is a member already, it stays one, at the
        address that it has, for as long as this life of it answers there.

        again: whether to add even a life that was told to drain or to leave for good, which then takes requests again.

        Raises:
            InvalidRequest: the instance cannot be a member; says why.
            HBServeRpcError: nobody answers there.
        """
        try:
            parse_address(address)
        except InvalidAddress as error:
            raise InvalidRequest(f"address: {error}") from error
        info = await self._describe(address)
        if info.epoch in self._sent_away and not again:
            raise InvalidRequest(f"{info.instance_id} at {address} was told to leave; whoever told it may call it back")
        started_as = info.started_as or info.role
        if role not in (None, started_as):
            raise InvalidRequest(f"{info.instance_id} at {address}: it is a {started_as} instance, expected {role}")
        while (known := self._fleet.handles.get(info.instance_id)) is not None and known.address != address:
            if known.epoch == info.epoch or await self._is_about_to_be(known, info.epoch):
                return info  # this is another address of the same life
            if known.status != "lost":
                raise InvalidRequest(f"{info.instance_id} at {address}: {known.address} has this id and is in use")
            if self._fleet.handles.get(info.instance_id) is known:
                await self._fleet.remove(info.instance_id)
        if known is None:
            await self._fleet.add(info.instance_id, started_as, address)
            logger.info("%s at %s joins", info.instance_id, address)
        if again or (info.instance_id in self._leaving and info.epoch not in self._sent_away):
            self._call_back(info)
        if not again:
            self._watch(info.instance_id)
        return info

    async def _is_about_to_be(self, handle: InstanceHandle, epoch: str) -> bool:
        """Whether a member that is not reached (yet) answers at its known address, as the life with this epoch."""
        last = handle.last_stats
        if handle.status != "lost" or (last is not None and last.epoch != epoch):
            return False
        with contextlib.suppress(HBServeRpcError):
            return (await self._describe(handle.address)).epoch == epoch
        return False

    def _watch(self, instance_id: str) -> None:
        """Restart the timer of FORGOTTEN_S for an instance that has joined by itself."""
        if (before := self._forgetting.pop(instance_id, None)) is not None:
            before.cancel()
        loop = asyncio.get_running_loop()
        self._forgetting[instance_id] = loop.call_later(FORGOTTEN_S, self._forget, instance_id)

    def _forget(self, instance_id: str) -> None:
        del self._forgetting[instance_id]
        if self.has(instance_id):
            self._watch(instance_id)
        elif instance_id in self._fleet.handles:
            self.leave(instance_id, for_good=False)  # it is not reachable, so it is removed at once

    async def _describe(self, address: str) -> InstanceInfo:
        client = self._fleet.make_client(address)
        try:
            await client.start()
            return await client.call(DESCRIBE, Empty(), timeout_s=DESCRIBE_TIMEOUT_S)
        finally:
            await client.close()

    def _call_back(self, info: InstanceInfo) -> None:
        self._sent_away.pop(info.epoch, None)
        if (leaving := self._leaving.pop(info.instance_id, None)) is not None:
            leaving.cancel()
        self._fleet.drain(info.instance_id, "")

    def drain(self, instance_id: str) -> None:
        """Give an instance no new requests in its present life; those that it has go on. Its next life takes requests.

        Raises:
            InvalidRequest: there is no such instance, or nobody answers there.
        """
        handle = self._require(instance_id)
        if not handle.epoch:
            raise InvalidRequest(f"instance_id={instance_id!r}: {handle.describe_problem()}")
        self._flipping.discard(instance_id)
        self._fleet.drain(instance_id, handle.epoch)

    def _require(self, instance_id: str) -> InstanceHandle:
        """Return an instance's handle. Raises InvalidRequest if there is no such instance."""
        handle = self._fleet.handles.get(instance_id)
        if handle is None:
            there = ", ".join(self._fleet.handles) or "none"
            raise InvalidRequest(f"instance_id={instance_id!r}: no instance has it; there are: {there}")
        return handle

    def leave(self, instance_id: str, within_s: float | None = None, *, for_good: bool = True) -> None:
        """Drain an instance, and remove it when it has no requests of any scheduler left. After `within_s` it is
        removed anyhow, and its requests get another attempt elsewhere. An unreachable instance is removed at once.

        for_good: whether somebody decided that this life must not come back by itself.

        Raises:
            InvalidRequest: there is no such instance.
        """
        handle = self._require(instance_id)
        self._flipping.discard(instance_id)
        if handle.epoch:
            self._fleet.drain(instance_id, handle.epoch)
        if for_good and (epoch := handle.epoch or (handle.last_stats.epoch if handle.last_stats is not None else "")):
            self._sent_away[epoch] = None  # also if it is not reached: only its network may be lost
            while len(self._sent_away) > MOST_SENT_AWAY:
                del self._sent_away[next(iter(self._sent_away))]
        if (before := self._leaving.get(instance_id)) is not None:
            before.cancel()
        self._leaving[instance_id] = asyncio.create_task(self._see_off(handle, within_s))

    async def flip(self, request: FlipRequest) -> AsyncGenerator[str, None]:
        """Drain an instance, and have it serve in the other role from then on, which is another life of it. Yield lines
        about what is being waited for, and what was done. If anything goes wrong before it is done, or nobody reads
        these lines any more, the instance takes requests again in its old role.

        Raises:
            InvalidRequest: the role cannot be changed; says why.
            HBServeRpcError: the instance no longer answers.
        """
        name, role = request.instance_id, request.role
        handle = self._require(name)
        if handle.role == role:
            yield f"{name} is a {role} instance already"
            return
        self._require_flippable(handle)
        epoch, last = handle.epoch, 0
        self.drain(name)
        self._flipping.add(name)
        try:
            while handle.role != role:
                if name not in self._flipping:
                    raise InvalidRequest(f"{name} was told to drain, and stays a {handle.role} instance")
                if num_left := await self._until_empty(handle):
                    if num_left != last:
                        yield f"{name} has {num_left} requests left"
                    last = num_left
                    continue
                if handle.health.drained != epoch:
                    raise InvalidRequest(f"{name} was called back, and stays a {handle.role} instance")
                with contextlib.suppress(Overloaded):  # a sibling that had not heard of the draining gave it a request
                    handle.take_info(await handle.client.call(INSTANCE_FLIP, request, timeout_s=DESCRIBE_TIMEOUT_S))
        finally:
            if handle.health.drained == epoch and self._fleet.handles.get(name) is handle:
                self._fleet.drain(name, "" if name in self._flipping else handle.epoch or epoch)
            self._flipping.discard(name)
        yield f"{name} is a {role} instance"

    def _require_flippable(self, handle: InstanceHandle) -> None:
        """Raise InvalidRequest if the instance cannot get another role now."""
        name, peers = handle.instance_id, self._fleet.handles.values()
        if handle.role == "hybrid":
            raise InvalidRequest(f"{name} is a hybrid instance, which moves no KV, and stays one")
        if handle.status != "ready" or name in self._leaving:
            raise InvalidRequest(handle.describe_problem())
        if not any(each.status == "ready" and each.role == handle.role for each in peers if each is not handle):
            raise InvalidRequest(f"{name} is the last {handle.role} instance that takes requests")

    async def until_left(self, instance_id: str) -> bool:
        """Wait until an instance that was told to leave has left. Return False if it was called back meanwhile."""
        while (leaving := self._leaving.get(instance_id)) is not None:
            await asyncio.wait([leaving])
        return instance_id not in self._fleet.handles

    async def _see_off(self, handle: InstanceHandle, within_s: float | None) -> None:
        instance_id, why = handle.instance_id, "it was removed"
        try:
            async with asyncio.timeout(within_s):
                while await self._until_empty(handle):
                    pass
        except TimeoutError:
            why = f"it was told to leave, and had {within_s:g} s to finish what it had"
        except HBServeRpcError:
            pass  # it is not reachable, and has no requests that could end
        del self._leaving[instance_id]
        if self._fleet.handles.get(instance_id) is handle:
            await self._fleet.remove(instance_id, why)
            logger.info("%s has left", instance_id)

    async def _until_empty(self, handle: InstanceHandle) -> int:
        """Wait for one or two moments, and return how many requests an instance has left. 0: it had none twice in a
        row, so none has come from a sibling that had not heard of the draining either."""
        for _ in range(2):
            if num_left := await self._num_left(handle):
                await asyncio.sleep(LOOK_S)
                return num_left
            await asyncio.sleep(LOOK_S)
        return 0

    async def _num_left(self, handle: InstanceHandle) -> int:
        if not handle.epoch:
            return 0
        await handle.refresh()
        return handle.last_stats.active_requests if handle.last_stats is not None else 0

    # ---- siblings ------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        return [
            Member(each.instance_id, each.declared, each.address, each.health.drained)
            for each in self._fleet.handles.values()
        ]

    async def set_members(self, members: Sequence[Member]) -> None:
        """Have exactly these members, as told by the scheduler that knows them."""
        async with self._setting:
            wanted = {each.instance_id: each for each in members}
            for instance_id, handle in list(self._fleet.handles.items()):
                each = wanted.get(instance_id)
                if each is None or (each.role, each.address) != (handle.declared, handle.address):
                    await self._fleet.remove(instance_id)
            for each in members:
                await self.add(each)
                self._fleet.drain(each.instance_id, each.drained)
