"""The instances of one deployment, and which of them takes a request."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection

from hbserve_rpc.messages import InstanceInfo, Role
from hbserve_scheduler.config import SchedulerConfig
from hbserve_scheduler.errors import ConfigError, InstanceFailed, NotReady
from hbserve_scheduler.instances import InstanceHandle
from hbserve_scheduler.links import Links
from hbserve_scheduler.placement import Placement
from hbserve_scheduler.policies import POLICIES, connected_first

REFRESH_TIMEOUT_S = 2.0


class Fleet:
    """Instances come, go and come back; requests ask for places."""

    def __init__(self, config: SchedulerConfig, on_change: Callable[[], None]) -> None:
        self.handles: dict[str, InstanceHandle] = {}
        self._config = config
        self._on_change = on_change
        self.links = Links(self.handles, config.max_warm_links)
        self._started = False
        self._choose = {
            "prefill": POLICIES[config.prefill_policy](),
            "decode": POLICIES[config.decode_policy](),
            "hybrid": POLICIES[config.decode_policy](),
        }

    async def add(self, instance_id: str, role: Role, address: str) -> None:
        if instance_id in self.handles:
            raise ConfigError(f"instance_id={instance_id!r}: is in use; each instance needs its own")
        handle = InstanceHandle(instance_id, role, address, self._config, self._on_change, self.links.look)
        self.handles[instance_id] = handle
        if self._started:
            await handle.start()

    async def remove(self, instance_id: str) -> None:
        handle = self.handles.pop(instance_id)
        handle.lost("it was removed")
        await handle.close()

    async def start(self) -> None:
        self._started = True
        for handle in self.handles.values():
            await handle.start()

    async def stop(self) -> None:
        await self.links.close()
        for handle in self.handles.values():
            await handle.close()

    def ready_infos(self) -> list[InstanceInfo]:
        return [handle.info for handle in self.handles.values() if handle.status == "ready" and handle.info]

    async def refresh(self) -> None:
        """Ask every instance for its figures; one that does not answer soon keeps its last."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                handles = self.handles.values()
                await asyncio.gather(*(handle.refresh() for handle in handles), return_exceptions=True)

    async def wait_ready(self, timeout_s: float) -> None:
        """Raises InstanceFailed at once when one says so, NotReady after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while missing := [handle for handle in self.handles.values() if handle.status != "ready"]:
            for handle in missing:
                if handle.status == "failed":
                    raise InstanceFailed(handle.describe_problem())
            if time.monotonic() > deadline_s:
                problems = "; ".join(handle.describe_problem() for handle in missing)
                raise NotReady(f"not ready within {timeout_s:g} s: {problems}")
            await asyncio.sleep(0.05)

    def available(self, role: Role) -> list[InstanceHandle]:
        """Ready instances with room for one more request."""

        def has_room(handle: InstanceHandle) -> bool:
            if role == "prefill":
                return handle.num_inflight < self._config.max_inflight_prefills
            if role == "hybrid":
                return handle.load < self._config.max_inflight_requests
            return handle.num_pending < self._config.max_pending_reservations

        return [
            handle
            for handle in self.handles.values()
            if handle.role == role and handle.status == "ready" and has_room(handle)
        ]

    def _others(self, role: Role, avoid: Collection[str]) -> list[InstanceHandle]:
        available = self.available(role)
        return [handle for handle in available if handle.instance_id not in avoid] or available

    def has_room(self) -> bool:
        return bool(self.available("hybrid")) or bool(self.available("prefill") and self.available("decode"))

    def place(
        self, num_tokens: int, avoid: Collection[str] = (), computed_on: str = "", num_choices: int = 1
    ) -> Placement | None:
        """Choose instances for a prompt and take the places there; None if there is no room.

        Those to `avoid` are chosen only where there is no other. `computed_on`: a prefill instance that has the prompt
        in its prefix cache, and is chosen if it has room.
        """
        prefills, decodes, hybrids = (self._others(role, avoid) for role in ("prefill", "decode", "hybrid"))
        if prefills and decodes:
            prefills = [each for each in prefills if each.instance_id == computed_on] or prefills
            epochs = {each.epoch for each in decodes}
            prefills = connected_first(prefills, lambda each: _best_link(each, epochs), num_tokens)
            prefill = self._choose["prefill"](prefills)
            decodes = connected_first(decodes, lambda each: prefill.links.get(each.epoch), num_tokens=1)
            return Placement(prefill, self._choose["decode"](decodes), num_tokens, num_choices)
        if hybrids:
            return Placement(None, self._choose["hybrid"](hybrids), num_tokens, num_choices)
        return None

    def may_serve_soon(self) -> bool:
        """Whether each role that a request needs has an instance that is ready or loading its model."""
        there = {handle.role for handle in self.handles.values() if handle.status in ("ready", "starting")}
        return "hybrid" in there or {"prefill", "decode"} <= there

    def why_nobody(self) -> str:
        problems = [each.describe_problem() for each in self.handles.values() if each.status != "ready"]
        if not problems:
            problems = ["all are busy" if self.handles else "none were added"]
        return f"no instances for {self._config.instance_wait_s:g} s: " + "; ".join(problems)


def _best_link(prefill: InstanceHandle, epochs: Collection[str]) -> bool | None:
    """To a decode instance of these: True, None for not connected yet, False where it cannot be connected to any."""
    if any(is_there and epoch in epochs for epoch, is_there in prefill.links.items()):
        return True
    return False if all(prefill.links.get(epoch) is False for epoch in epochs) else None
