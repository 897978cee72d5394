"""Instances of a deployment on a Ray cluster, where Ray finds room to start and restart them."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

from hbserve.processes.child_process import STOP_TIMEOUT_S, Restarts
from hbserve.processes.launcher import Instances
from hbserve.ray_cluster.cluster import Place, Places
from hbserve.ray_cluster.instance_actor import InstanceActor
from hbserve_rpc.messages import Role
from hbserve_scheduler import DeploymentConfig, InstanceFailed, InstanceSection

logger = logging.getLogger(__name__)


class RayInstance:
    """One instance on some node. Each of its lives has a new actor. `ChildProcesses` restarts it, like processes of
    this host, and Ray does not."""

    pid = None
    """None: a process id of another host would be of no use here."""

    def __init__(self, settings: dict[str, Any], place: Place, on_death: Callable[[str, str], None]) -> None:
        self.name = self.instance_id = str(settings["instance_id"])
        self.role: Role = settings["role"]
        self.address = ""
        self.waits_for = "Ray looks for a node"
        self.restarts = Restarts()
        self._settings = settings
        self._place = place
        self._on_death = on_death
        self._actor: Any = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Wait for room, start the instance there, and wait until it serves.

        Raises:
            InstanceFailed: the instance ended first, or its node was lost meanwhile.
        """
        import ray
        from ray.exceptions import RayError

        self._end_actor()
        self.restarts.began()
        try:
            async for notice in self._place.wait(self.name):
                self.waits_for = notice
                logger.warning("%s: %s", self.name, notice)
            self.waits_for = "its process starts"
            self._actor = ray.remote(InstanceActor).options(**self._place.options(self.name)).remote(self._settings)
            self.address = await self._actor.start.remote()
        except RayError as error:
            self._end_actor()
            cause = getattr(error, "cause", None)
            raise InstanceFailed(str(cause) if isinstance(cause, InstanceFailed) else _in_words(error)) from None
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        from ray.exceptions import RayError

        try:
            why = await self._actor.death.remote()
        except RayError as error:
            why = _in_words(error)
        self._end_actor()
        self._on_death(self.name, why)

    async def drain(self) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the instance in order, or by force if that takes too long or its node does not answer."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._actor is None:
            return
        from ray.exceptions import RayError

        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._actor.stop.remote()
        self._end_actor()

    def _end_actor(self) -> None:
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None

    def kill(self) -> None:
        self._end_actor()


def _in_words(error: Exception) -> str:
    """Describe a Ray error by the first line of its message. The others have ids of nodes and workers."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"its Ray actor has ended ({type(error).__name__}: {first})"


class RayInstances(Instances[RayInstance]):
    """The instances of a deployment on the nodes of a cluster, each where there is room for it."""

    @cached_property
    def _places(self) -> Places:
        return Places()

    def _make(self, config: DeploymentConfig, instance: InstanceSection) -> RayInstance:
        # Ray gives each instance GPUs and cores that no other one shares.
        alone = {"num_local_instances": 1, "num_on_gpu": 1, "num_threads": config.engine_settings().num_threads or 1}
        return RayInstance(self._settings(config, instance) | alone, self._places.take(config, instance), self._died)

    async def remove(self, process: RayInstance) -> None:
        await super().remove(process)
        self._places.give_back(process.name)

    async def stop(self) -> None:
        await super().stop()
        for process in self.processes:
            self._places.give_back(process.name)
