"""The instances of one deployment, and the choice of those that take a request."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from operator import attrgetter

from hbserve_rpc import RpcClient
from hbserve_rpc.messages import InstanceInfo, Role
from hbserve_rpc.prompt_shape import PromptShape
from hbserve_scheduler.config import SchedulerConfig
from hbserve_scheduler.errors import ConfigError, InstanceFailed, NotReady
from hbserve_scheduler.health import SERVING
from hbserve_scheduler.instance_client import ClientFactory, InstanceClient
from hbserve_scheduler.instances import InstanceHandle, Placement
from hbserve_scheduler.links import Links
from hbserve_scheduler.policies import (
    MOST_COMPARED,
    SPARE_REQUESTS,
    Available,
    connected_first,
    least_loaded,
    make_policy,
)
from hbserve_scheduler.prefixes import Prefixes
from hbserve_scheduler.request import ScheduledRequest

REFRESH_TIMEOUT_S = 2.0


class Fleet:
    """The instances of one scheduler, which come, go and come back, and the places of requests on them."""

    def __init__(
        self, config: SchedulerConfig, on_change: Callable[[], None], client_factory: ClientFactory = RpcClient
    ) -> None:
        self.handles: dict[str, InstanceHandle] = {}
        self._config = config
        self._on_change = on_change
        self.client_factory = client_factory
        self.on_members: Callable[[], None] = lambda: None
        """Callback for when an instance is added, removed or drained."""
        self.links = Links(self.handles, config.max_warm_links)
        self._started = False
        self.prefixes = Prefixes()
        prefill = make_policy("scheduler.prefill_policy", config.prefill_policy, self.prefixes)
        decode, hybrid = (make_policy("scheduler.decode_policy", config.decode_policy, self.prefixes) for _ in range(2))
        self._available: dict[Role, Available] = {
            "prefill": Available(prefill, lambda each: each.num_inflight < config.max_inflight_prefills),
            "decode": Available(decode, lambda each: each.num_pending < config.max_pending_reservations),
            "hybrid": Available(hybrid, lambda each: each.load < config.max_inflight_requests),
        }
        self._roles_asked = {
            role for role, each in self._available.items() if getattr(each.policy, "wants_digests", False)
        }
        """Roles for which the choice of an instance depends on what instances have cached."""
        if config.local_prefill_tokens:
            self._roles_asked.add("decode")
        self._asking: asyncio.Task[None] | None = None
        self._turns = itertools.count(1)
        # These depend on all instances together, and are computed when one of them changes, not for each request.
        self._decodes: dict[str, InstanceHandle] = {}
        """Decode instances, by epoch."""
        self._limiting: list[InstanceInfo] | None = None
        self._roles_there: dict[bool, bool] = {}
        self._lacks_prefill: bool | None = None

    async def add(self, instance_id: str, role: Role, address: str) -> None:
        if instance_id in self.handles:
            raise ConfigError(f"instance_id={instance_id!r}: is in use; each instance needs its own")
        handle = InstanceHandle(
            instance_id, role, address, self._config, self._handle_changed, self._info_changed, self.make_client
        )
        handle.turn = next(self._turns)
        self.handles[instance_id] = handle
        self.on_members()
        if self._started:
            await handle.start()

    async def remove(self, instance_id: str, why: str = "it was removed") -> None:
        """Stop using an instance. Its unfinished requests fail there, with `why` as the cause."""
        handle = self.handles.pop(instance_id)
        handle.lost(why, level=logging.INFO)
        self._available[handle.role].forget(handle)
        self.on_members()
        await handle.close(why)

    def drain(self, instance_id: str, epoch: str) -> None:
        """Give an instance no new requests in the life of this epoch; with "" as the epoch, let it have some again."""
        handle = self.handles[instance_id]
        if handle.health.drained != epoch:
            handle.drain(epoch)
            self.on_members()

    def make_client(self, address: str) -> InstanceClient:
        """Make a connection to an instance. It is not started yet."""
        settings = self._config
        return self.client_factory(
            address,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            heartbeat_timeout_s=settings.heartbeat_timeout_s,
        )

    async def start(self) -> None:
        self._started = True
        for handle in self.handles.values():
            await handle.start()
        if self._roles_asked:
            asking = self.prefixes.keep(self._handles_asked, self._config.heartbeat_interval_s)
            self._asking = asyncio.create_task(asking)

    def _handles_asked(self) -> list[InstanceHandle]:
        return [handle for handle in self.handles.values() if handle.role in self._roles_asked]

    async def stop(self) -> None:
        await self.links.close()
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        for handle in self.handles.values():
            await handle.close("this scheduler has ended")

    @property
    def digest_block_size(self) -> int:
        """Number of tokens in the blocks whose digests policies need; 0: none needs any, or there is no instance."""
        return next((info.block_size for info in self.limiting_infos()), 0) if self._roles_asked else 0

    def limiting_infos(self) -> list[InstanceInfo]:
        """Return the ready instances with the lowest limits of prompts and token ids: what these accept, all accept."""
        if self._limiting is None:
            ready = [handle.info for handle in self.handles.values() if handle.status in SERVING and handle.info]
            bounds = (attrgetter("max_prompt_len"), attrgetter("vocab_size"))
            self._limiting = [min(ready, key=bound) for bound in bounds] if ready else []
        return self._limiting

    def _handle_changed(self, handle: InstanceHandle) -> None:
        """Note that an instance has changed, so that there may be more room than before."""
        self._available[handle.role].update(handle)
        self._on_change()

    def _info_changed(self, handle: InstanceHandle) -> None:
        """Note that an instance is in another state, or another life."""
        self._limiting, self._roles_there, self._lacks_prefill = None, {}, None
        self._decodes = {each.epoch: each for each in self.handles.values() if each.role == "decode" and each.info}
        for role, available in self._available.items():
            if role != handle.role:
                available.forget(handle)  # it may have had that role before
        self._available[handle.role].update(handle)
        self.links.update()

    async def refresh(self) -> None:
        """Ask every reachable instance for its stats. One that does not answer soon keeps its last ones."""
        heard = [handle for handle in self.handles.values() if handle.status not in ("lost", "suspect")]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                await asyncio.gather(*(handle.refresh() for handle in heard), return_exceptions=True)

    async def wait_ready(self, timeout_s: float, only: str | None = None) -> None:
        """Wait until all instances, or `only` one, are ready. Raises InstanceFailed at once when one reports a failure,
        and NotReady after `timeout_s`."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while missing := [
            handle
            for handle in self.handles.values()
            if handle.status != "ready" and only in (None, handle.instance_id)
        ]:
            for handle in missing:
                if handle.status == "failed":
                    raise InstanceFailed(handle.describe_problem())
            if asyncio.get_running_loop().time() > deadline_s:
                problems = "; ".join(handle.describe_problem() for handle in missing)
                raise NotReady(f"not ready within {timeout_s:g} s: {problems}")
            await asyncio.sleep(0.05)

    def has_room(self) -> bool:
        there = self._available
        if there["hybrid"].members:
            return True
        return bool(there["decode"].members and (there["prefill"].members or self._has_no_prefill()))

    def place_request(self, entry: ScheduledRequest) -> Placement | None:
        """Choose instances for a request and take places on them. Return None if there is no room.

        Instances on which the request has failed are chosen only if there are no others. A prefill instance that has
        the prompt in its prefix cache since an earlier attempt is chosen if it has room.
        """
        there = self._available
        prefill: InstanceHandle | None = None
        num_tokens, avoid = entry.num_tokens, entry.failed_on
        prompt = entry.request.shape or PromptShape(num_tokens)
        local = self._choose_local(num_tokens, avoid, prompt)
        if local is not None:
            decode = local
        elif there["prefill"].members and there["decode"].members:
            prefill = self._choose_prefill(num_tokens, avoid, entry.computed_on, prompt)
            decode = self._choose_decode(prefill, avoid, prompt)
        elif there["hybrid"].members:
            decode = there["hybrid"].choose(prompt, _others(there["hybrid"], avoid) if avoid else None)
        else:
            return None
        placement = Placement(prefill, decode, num_tokens, entry.request.params.n)
        for handle in filter(None, (prefill, decode)):
            handle.turn = next(self._turns)
            self._available[handle.role].update(handle)
        return placement

    def _has_no_prefill(self) -> bool:
        """Whether no prefill instance is ready and decode instances are to compute prompts instead. A restarted prefill
        instance may take minutes to load its model."""
        if self._lacks_prefill is None:
            handles = self.handles.values()
            self._lacks_prefill = (
                self._config.local_prefill_fallback
                and not any(each.role == "prefill" and each.status == "ready" for each in handles)
                and any(_computes_prompts(each) for each in handles)
            )
        return self._lacks_prefill

    def _choose_local(self, num_tokens: int, avoid: Collection[str], prompt: PromptShape) -> InstanceHandle | None:
        """Return a decode instance that is to compute the prompt itself, because the prompt is short or mostly cached
        there, or because there is no prefill instance. None: there is no such instance."""
        available, most = self._available["decode"], self._config.local_prefill_tokens
        if not available.members:
            return None
        if self._has_no_prefill():
            able = [each for each in _others(available, avoid) if _computes_prompts(each)]
            return available.choose(prompt, able) if able else None
        if num_tokens < most:
            chosen = available.choose(prompt, _others(available, avoid) if avoid else None)
            return chosen if _computes_prompts(chosen) else None
        if not most or not prompt.digests or avoid:
            return None
        num_blocks, holders = self.prefixes.longest(prompt.digests, available)
        if num_tokens - num_blocks * self.digest_block_size >= most:
            return None
        holder = min(islice(holders, MOST_COMPARED), key=least_loaded)
        is_busy = holder.load > available.least_load() + SPARE_REQUESTS
        return holder if _computes_prompts(holder) and not is_busy else None

    def _choose_prefill(
        self, num_tokens: int, avoid: Collection[str], computed_on: str, prompt: PromptShape
    ) -> InstanceHandle:
        available, decodes = self._available["prefill"], self._available["decode"]
        if not avoid:
            first = available.choose(prompt)
            if next(self._linked_to(first), None) is not None:
                return first
        candidates = _others(available, avoid)
        candidates = [each for each in candidates if each.instance_id == computed_on] or candidates
        epochs = {each.epoch for each in _others(decodes, avoid)}
        candidates = connected_first(candidates, lambda each: _best_link(each, epochs), num_tokens)
        return available.choose(prompt, candidates)

    def _linked_to(self, prefill: InstanceHandle) -> Iterator[InstanceHandle]:
        """Yield the decode instances with room to which a prefill instance has a link."""
        there, decodes = self._available["decode"].members, self._decodes
        for epoch, is_up in prefill.links.items():
            if is_up and (decode := decodes.get(epoch)) is not None and decode in there:
                yield decode

    def _choose_decode(self, prefill: InstanceHandle, avoid: Collection[str], prompt: PromptShape) -> InstanceHandle:
        available = self._available["decode"]
        if not avoid:
            linked = [*self._linked_to(prefill)]
            if linked and min([each.load for each in linked]) <= available.least_load() + SPARE_REQUESTS:
                return available.choose(prompt, linked)
        candidates = connected_first(
            _others(available, avoid), lambda each: prefill.links.get(each.epoch), num_tokens=1
        )
        return available.choose(prompt, candidates)

    def linked(self) -> Iterator[tuple[InstanceHandle, InstanceHandle, bool]]:
        """Yield the prefill and decode instances between which a link is kept, and whether it is up."""
        for prefill in self.handles.values():
            for epoch, is_up in prefill.links.items():
                if (decode := self._decodes.get(epoch)) is not None:
                    yield prefill, decode, is_up

    def may_serve(self, *, soon: bool = False) -> bool:
        """Whether each role that a request needs has an instance that serves. With `soon`, an instance that is loading
        its model counts too."""
        if soon not in self._roles_there:
            statuses = (*SERVING, "starting") if soon else SERVING
            roles = {handle.role for handle in self.handles.values() if handle.status in statuses}
            able = "hybrid" in roles or {"prefill", "decode"} <= roles
            self._roles_there[soon] = able or ("decode" in roles and self._has_no_prefill())
        return self._roles_there[soon]

    def why_nobody(self) -> str:
        return f"no instances for {self._config.instance_wait_s:g} s: {'; '.join(self.problems())}"

    def problems(self) -> list[str]:
        """Describe what may keep the fleet from serving: instances that are not ready, and roles without instances."""
        if not self.handles:
            return ["no instance has been added"]
        problems = [each.describe_problem() for each in self.handles.values() if each.status != "ready"]
        return problems + missing_roles({handle.role for handle in self.handles.values()})


def missing_roles(there: Collection[Role]) -> list[str]:
    """Describe which instances are missing if there are only these roles."""
    if "hybrid" in there:
        return []
    return [f"there is no {role} instance" for role in ("prefill", "decode") if role not in there]


def _computes_prompts(decode: InstanceHandle) -> bool:
    return decode.role == "decode" and decode.info is not None and decode.info.serves_generate


def _others(available: Iterable[InstanceHandle], avoid: Collection[str]) -> list[InstanceHandle]:
    """Return all instances but those to avoid, or all if there are no others."""
    everyone = list(available)
    return [each for each in everyone if each.instance_id not in avoid] or everyone


def _best_link(prefill: InstanceHandle, epochs: Collection[str]) -> bool | None:
    """Return the state of the best link to any decode instance with one of these epochs: True for connected, None for
    not connected yet, False if none can be connected."""
    if any(is_there and epoch in epochs for epoch, is_there in prefill.links.items()):
        return True
    return False if all(prefill.links.get(epoch) is False for epoch in epochs) else None
