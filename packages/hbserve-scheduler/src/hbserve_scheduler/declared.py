"""Instances that a deployment's file declares: by id and address, or behind DNS names that are looked up."""

import asyncio
from collections.abc import Callable

from hbserve_rpc import InvalidRequest, format_address
from hbserve_rpc.members import Member, Reloaded
from hbserve_rpc.messages import Role
from hbserve_scheduler.config import DeploymentConfig
from hbserve_scheduler.discovery import Discovery, DnsName
from hbserve_scheduler.errors import ConfigError
from hbserve_scheduler.membership import Membership


class DeclaredInstances:
    """Instances declared in a file. They join at the start, and those that have changed join anew when the file is read
    again. Instances that a command has added or sent away since then are left as they are.
    """

    def __init__(
        self,
        members: Membership,
        config: DeploymentConfig,
        load: Callable[[], DeploymentConfig] | None,
        *,
        starts_its_own: bool = False,
    ) -> None:
        """Prepare to declare the instances of `config`. load: reads the file again; None: there is no file.

        starts_its_own: whether this process starts the instances that have an id, so that only the others join here.
        """
        self._members = members
        self._config = config
        self._load = load
        self._starts_its_own = starts_its_own
        self._discoveries: list[Discovery] = []

    async def start(self) -> None:
        if not self._starts_its_own:
            for each in _named(self._config).values():
                await self._members.add(each)
        self._discover(self._config)

    async def close(self) -> None:
        await asyncio.gather(*(each.close() for each in self._discoveries))

    async def reload(self) -> Reloaded:
        """Read the file again, and have instances join and leave accordingly.

        Raises:
            InvalidRequest: the file is wrong, in which case nothing has changed; or there is no file.
        """
        if self._load is None:
            raise InvalidRequest("this deployment has no file")
        try:
            config = self._load()
        except ConfigError as error:
            raise InvalidRequest(str(error)) from error
        before, self._config = self._config, config
        others = [name for name in config.__struct_fields__ if name != "gpu_instances"]
        restart = [name for name in others if getattr(before, name) != getattr(config, name)]
        was, named = _named(before), _named(config)
        changed = [name for name in was if was[name] != named.get(name)]
        new = [name for name in named if was.get(name) != named[name]]
        if self._starts_its_own:
            restart += ["gpu_instances"] if changed or new else []
            changed, new = [], []
        for name in changed:
            if name in named:  # it has another role, or another address
                await self._members.remove(name)
            elif self._members.has(name):
                self._members.leave(name)
        for name in new:
            await self._members.add(named[name])
        leaving = [name for name in changed if name not in named] + await self._undiscover(config)
        self._discover(config)
        return Reloaded(new, leaving, restart)

    async def _undiscover(self, config: DeploymentConfig) -> list[str]:
        """Stop looking up names that are no longer declared. Return the ids of the instances that leave by that."""
        wanted = _discovered(config)
        gone = [each for each in self._discoveries if (each.role, each.name) not in wanted]
        self._discoveries = [each for each in self._discoveries if each not in gone]
        await asyncio.gather(*(each.close() for each in gone))
        return [name for each in gone for name in each.leave()]

    def _discover(self, config: DeploymentConfig) -> None:
        known = {(each.role, each.name) for each in self._discoveries}
        for role, name in _discovered(config):
            if (role, name) not in known:
                self._discoveries.append(Discovery(self._members, role, name))
                self._discoveries[-1].start()


def _named(config: DeploymentConfig) -> dict[str, Member]:
    return {
        each.instance_id: Member(each.instance_id, each.instance_type, format_address(each.host, each.port))
        for each in config.named_instances
    }


def _discovered(config: DeploymentConfig) -> list[tuple[Role, DnsName]]:
    return [(each.instance_type, DnsName.of(each.discover)) for each in config.gpu_instances if each.discover]
