"""Scaling of a running deployment: the process that has started its instances adds some, or drains and ends some.

    one more    its process starts ─▶ its model is loaded ─▶ takes requests, and is started again from then on
    one less    drained ─▶ has nothing left, of any scheduler ─▶ its process ends
Only instances that take requests count. Those that were told to drain are ended first, and then the newest of the role.
New ones start when all that leave have left, because they may need their GPUs.
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
"""Pause between two looks at what is waited for, which is reported when it has changed."""
READY_TIMEOUT_S = 600.0
"""How long a new instance may take to load its model. How long it waits for a place on a cluster is not limited."""


class Scaling:
    """Carries out changes of the numbers of instances. Belongs to the event loop of its scheduler. A new request
    replaces one that is being carried out."""

    def __init__(self, config: DeploymentConfig, server: SchedulerServer, instances: Instances[Any]) -> None:
        self._config = config
        """The deployment with the instances that are there or are starting, and without those that are leaving."""
        self._server = server
        self._instances = instances
        self._changes: dict[str, asyncio.Task[str]] = {}
        """Changes under way, by instance. Each returns the line that reports that it is done."""
        self._deaths: dict[str, asyncio.Future[str]] = {}
        """Futures of the instances that are starting, which get the reason if an instance's process ends."""
        self._going: dict[str, InstanceSection] = {}

    async def close(self) -> None:
        """Cancel all changes: starting instances are ended, and leaving ones stay. The caller then ends them all."""
        changes = list(self._changes.values())
        for each in changes:
            each.cancel()
        await asyncio.gather(*changes, return_exceptions=True)

    def died(self, instance_id: str, why: str) -> None:
        """Note that the process of an instance has ended. If the instance was still starting, that has failed."""
        if (death := self._deaths.get(instance_id)) is not None and not death.done():
            death.set_result(why)

    async def scale(self, wanted: Mapping[Role, int]) -> AsyncGenerator[str, None]:
        """Change the numbers of instances of these roles. Yields lines about what is done and waited for; the change
        goes on if they are no longer read.

        Raises:
            InvalidRequest: such numbers are not possible; nothing is changed.
            RemoteError: a new instance has failed; has its reason.
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
        """Return the instances that were told to drain, and those that have left since; not those that are starting."""
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
            if each.instance_id in self._deaths:  # it is still starting
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
        """Forget a change that has ended, and log its result. Also called if it was cancelled before it began."""
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
            process.restarts.are_wanted = False  # until it has started once
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
        with contextlib.suppress(InvalidRequest):  # it was told to leave earlier, and has left
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
    """Return the deployment with these numbers of instances: without drained ones and the newest ones, or with more
    that are like the first of their role. New ones do not reuse a name or a rank of those that are still leaving.

    Raises:
        InvalidRequest: such a deployment is not possible; the message says why.
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
    """Make one more instance of a role. The GPUs of the instances `there`, and the names and ranks of those `known`,
    are in use."""
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
    """Say how many instances of each role a deployment has, in the words of `hbserve scale`: "prefill=3 decode=2"."""
    roles = [each.instance_type for each in config.named_instances]
    return " ".join(f"{role}={roles.count(role)}" for role in dict.fromkeys(roles))
