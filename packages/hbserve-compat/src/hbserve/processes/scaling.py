"""Scaling of a deployment that serves: whoever has started its instances adds some, or drains and ends some.

    one more    its process starts ─▶ its model is loaded ─▶ takes requests, and is started again from then on
    one less    drained ─▶ has nothing left, of any scheduler ─▶ its process ends
The number is of those that take requests: one that was told to drain goes, and else the newest of the role.
New ones begin when all that go have gone: they may need their GPUs.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from typing import Any

import msgspec

from hbserve.processes.launcher import AnInstance, Instances, num_ranks
from hbserve_rpc import InvalidRequest, RemoteError, canonical_host
from hbserve_rpc.messages import Role
from hbserve_scheduler import ConfigError, DeploymentConfig, InstanceFailed, InstanceSection, SchedulerServer, check

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Pause between two looks at what is waited for, to tell it if it has changed."""
READY_TIMEOUT_S = 600.0
"""How long a new instance may take to load its model. How long it waits for a place on a cluster is not limited."""


class Scaling:
    """Belongs to the event loop of its scheduler. Another wish, while one is carried out, takes its place."""

    def __init__(self, config: DeploymentConfig, server: SchedulerServer, instances: Instances[Any]) -> None:
        self._config = config
        """The deployment with instances that are there or come, and without those that go."""
        self._server = server
        self._instances = instances
        self._changes: dict[str, asyncio.Task[str]] = {}
        """Changes that are under way, by instance; each returns what is to be told when it is done."""
        self._deaths: dict[str, asyncio.Future[str]] = {}
        """Why processes of instances that come have ended, by instance."""
        self._going: dict[str, InstanceSection] = {}

    async def close(self) -> None:
        """What comes is ended, what goes stays; whoever started them ends them all."""
        changes = list(self._changes.values())
        for each in changes:
            each.cancel()
        await asyncio.gather(*changes, return_exceptions=True)

    def died(self, instance_id: str, why: str) -> None:
        """The process of an instance has ended. One that was still coming does not come then."""
        if (death := self._deaths.get(instance_id)) is not None and not death.done():
            death.set_result(why)

    async def scale(self, wanted: Mapping[Role, int]) -> AsyncGenerator[str, None]:
        """Have so many instances of these roles. Yields lines of what is done and waited for; whoever reads them no
        more changes nothing.

        Raises:
            InvalidRequest: there cannot be so many; nothing is changed.
            RemoteError: one that was to come has failed; has its reason.
        """
        self._begin(scaled(self._config, wanted, self._going, self._sent_away()))
        pending, failed, last = set(self._changes.values()), [], ""
        while pending:
            done, pending = await asyncio.wait(pending, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            for change in done:
                if change.cancelled():
                    yield f"{change.get_name()} is not wanted any more"
                elif (error := change.exception()) is not None:
                    failed.append(str(error))
                else:
                    yield change.result()
            if pending and (waits := "; ".join(sorted(map(self._waits_for, pending)))) != last:
                yield f"waiting for {waits}"
                last = waits
        if failed:
            raise RemoteError("; ".join(failed))
        yield describe(self._config)

    def _sent_away(self) -> set[str]:
        """Instances that were told to drain, also those that have left since; not those that still come."""
        handles = self._server.scheduler.fleet.handles
        names = {each.instance_id for each in self._config.named_instances if each.instance_id not in self._deaths}
        return {name for name in names if name not in handles or handles[name].status == "draining"}

    def _begin(self, config: DeploymentConfig) -> None:
        before, self._config = self._config, config
        kept = {each.instance_id for each in config.named_instances}
        for each in before.named_instances:
            if each.instance_id in kept:
                continue
            self._going[each.instance_id] = each
            if each.instance_id in self._deaths:  # it is not there yet
                self._changes[each.instance_id].cancel()
            else:
                self._change(each, self._remove(each))
        known = {each.instance_id for each in before.named_instances}
        going = [self._changes[name] for name in self._going]
        for each in config.named_instances:
            if each.instance_id not in known:
                self._deaths[each.instance_id] = asyncio.get_running_loop().create_future()
                self._change(each, self._add(each, config, going))

    def _change(self, instance: InstanceSection, change: Any) -> None:
        name = instance.instance_id
        self._changes[name] = task = asyncio.create_task(change, name=name)
        task.add_done_callback(self._end_change)

    def _end_change(self, change: "asyncio.Task[str]") -> None:
        """Also of one that was cancelled before it began."""
        name = change.get_name()
        del self._changes[name]
        self._going.pop(name, None)
        self._deaths.pop(name, None)
        if not change.cancelled():
            error = change.exception()
            logger.log(logging.WARNING if error else logging.INFO, "%s", error or change.result())

    async def _add(
        self, instance: InstanceSection, config: DeploymentConfig, going: Collection["asyncio.Task[str]"]
    ) -> str:
        name = instance.instance_id
        process: AnInstance | None = None
        try:
            if going:
                await asyncio.wait(going)
            process = self._instances.add(config, instance)
            process.restarts.are_wanted = False  # until it has shown that it can be started
            await process.start()
            await self._server.scheduler.add_instance(name, process.role, process.address)
            await self._until_ready(name)
            process.restarts.are_wanted = True
        except BaseException:
            self._forget(instance)
            await self._server.members.remove(name)
            if process is not None:
                await self._instances.remove(process)
            raise
        return f"{name} takes requests"

    async def _until_ready(self, name: str) -> None:
        ready = asyncio.create_task(self._server.scheduler.fleet.wait_ready(READY_TIMEOUT_S, name))
        death = self._deaths[name]
        first: list[asyncio.Future[Any]] = [ready, death]
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise InstanceFailed(f"{name}: {death.result()}")
            await ready
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    async def _remove(self, instance: InstanceSection) -> str:
        name, members = instance.instance_id, self._server.members
        (process,) = [each for each in self._instances.processes if each.name == name]
        await self._instances.let_go(process)
        with contextlib.suppress(InvalidRequest):  # it was told to leave before, and has left
            members.leave(name)
        if not await members.until_left(name):
            process.restarts.are_wanted = True
            self._config = _with(self._config, [*self._config.gpu_instances, instance])
            return f"{name} was called back, and stays"
        await self._instances.remove(process)
        return f"{name} has left"

    def _forget(self, instance: InstanceSection) -> None:
        self._config = _with(self._config, [each for each in self._config.gpu_instances if each != instance])

    def _waits_for(self, change: "asyncio.Task[str]") -> str:
        name = change.get_name()
        handle = self._server.scheduler.fleet.handles.get(name)
        if handle is None and name in self._going:
            return f"{name}: its process ends"
        if handle is None:
            starting = [each.waits_for for each in self._instances.processes if each.name == name]
            return f"{name}: {starting[0] if starting else 'others go first'}"
        if name in self._going and handle.last_stats is not None:
            return f"{name}, which has {handle.last_stats.active_requests} requests left"
        return handle.describe_problem()


def scaled(
    config: DeploymentConfig,
    wanted: Mapping[Role, int],
    going: Mapping[str, InstanceSection],
    drained: Collection[str] = (),
) -> DeploymentConfig:
    """The deployment with so many instances of these roles: without those that are drained and the newest ones, or with
    more that are like the first of their role. Nobody has a name or a rank of those that still go.

    Raises:
        InvalidRequest: there cannot be such a deployment; says why.
    """
    found = list(config.gpu_instances)
    for role, number in wanted.items():
        own = [each for each in found if each.discover is None and each.instance_type == role]
        serving = [each for each in own if each.instance_id not in drained]
        found = [each for each in found if each not in own or each in serving[:number]]
        for _ in range(number - len(serving)):
            found.append(_one_more(config, role, found, [*own, *found, *going.values()]))
    new = _with(config, found)
    try:
        check(new)
    except ConfigError as error:
        raise InvalidRequest(str(error)) from error
    return new


def _one_more(
    config: DeploymentConfig, role: Role, there: list[InstanceSection], known: list[InstanceSection]
) -> InstanceSection:
    """there: whose GPUs are in use; known: whose names and ranks are."""
    named = config.named_instances
    alike = [*(each for each in named if each.instance_type == role), *named, InstanceSection(instance_type=role)]
    names, ranks = {each.instance_id for each in known}, {each.kv_rank for each in known}
    new = msgspec.structs.replace(
        alike[0],
        instance_id=next(f"{role}-{number}" for number in range(len(known) + 1) if f"{role}-{number}" not in names),
        instance_type=role,
        port=0,
        kv_rank=next(rank for rank in range(len(known) + 1) if rank not in ranks),
    )
    if new.gpu_id is None:
        return new
    neighbours = [each for each in there if canonical_host(each.host) == canonical_host(new.host)]
    used = {gpu for each in neighbours for gpu in _gpus(config, each)}
    places = (msgspec.structs.replace(new, gpu_id=gpu) for gpu in range(max(used, default=0) + 2))
    return next(each for each in places if used.isdisjoint(_gpus(config, each)))


def _gpus(config: DeploymentConfig, instance: InstanceSection) -> Iterator[int]:
    if instance.gpu_id is not None:
        yield from range(instance.gpu_id, instance.gpu_id + num_ranks(config, instance))


def _with(config: DeploymentConfig, instances: list[InstanceSection]) -> DeploymentConfig:
    return msgspec.structs.replace(config, gpu_instances=instances)


def describe(config: DeploymentConfig) -> str:
    """How many instances of each role it has, as they are asked for."""
    roles = [each.instance_type for each in config.named_instances]
    return " ".join(f"{role}={roles.count(role)}" for role in dict.fromkeys(roles))
