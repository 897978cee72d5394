"""A Ray actor that starts one instance's process on its node, and reports its end."""

import asyncio
from typing import Any

from hbserve.processes.launcher import InstanceProcess


class InstanceActor:
    """The actor, which runs in a Ray worker. The process is the same that `hbserve serve` starts without Ray. If this
    worker or the driver is lost, the end of its stdin ends it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Take the settings of an InstanceConfig, except its place: the instance runs on this node, at a port that the
        system chooses, on the GPUs that Ray shows to this worker."""
        from ray.util import get_node_ip_address

        host = get_node_ip_address()
        kv_transfer = settings["kv_transfer"] | {"host": host, "port": 0}
        own = settings | {"host": host, "port": 0, "gpu_id": None, "kv_transfer": kv_transfer}
        self._process = InstanceProcess(own, self._on_death)
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def _on_death(self, name: str, why: str) -> None:
        self._death.set_result(why)

    async def start(self) -> str:
        """Start the process, and return its address when it serves. Raises InstanceFailed."""
        await self._process.start()
        return self._process.address

    async def death(self) -> str:
        """Wait until the process has ended by itself, and say why."""
        return await asyncio.shield(self._death)

    async def stop(self) -> None:
        """End the process in order. Leaves nothing behind."""
        await self._process.stop()
