"""Registration of an instance with schedulers: it says where it is, now and then, for as long as it is there."""

import asyncio
import logging
from collections.abc import Sequence

from hbserve_rpc import HBServeRpcError, Keys, RpcClient
from hbserve_rpc.members import SCHEDULER_JOIN, JoinRequest

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""Pause between two registrations: for so long a scheduler that was started again may know nothing of the instance."""
TIMEOUT_S = 10.0


async def keep_registered(instance_id: str, address: str, schedulers: Sequence[str], keys: Keys | None = None) -> None:
    """Have each scheduler at these `host:port` use the instance at `address`, until this is cancelled. One that cannot
    be told is told again; what it says against it is in the log, once."""
    async with asyncio.TaskGroup() as group:
        for scheduler in schedulers:
            group.create_task(_keep(instance_id, address, scheduler, keys))


async def _keep(instance_id: str, address: str, scheduler: str, keys: Keys | None) -> None:
    last = ""
    async with RpcClient(scheduler, keys=keys, server="scheduler") as client:
        while True:
            level = logging.INFO
            try:
                await client.call(SCHEDULER_JOIN, JoinRequest(address), timeout_s=TIMEOUT_S)
                now = f"{instance_id} is registered with the scheduler at {scheduler}"
            except HBServeRpcError as error:
                level = logging.WARNING  # it may never serve, for another version or keys: nobody else says so here
                now = f"{instance_id} cannot be registered; still trying: {error}"
            if now != last:
                logger.log(level, "%s", now)
                last = now
            await asyncio.sleep(INTERVAL_S)
