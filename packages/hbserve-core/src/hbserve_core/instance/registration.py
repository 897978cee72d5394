"""Registration of an instance with schedulers: it tells them its address again and again for as long as it runs."""

import asyncio
import logging
from collections.abc import Sequence

from hbserve_rpc import HBServeRpcError, Keys, RpcClient
from hbserve_rpc.members import SCHEDULER_JOIN, JoinRequest

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""Pause between two registrations. A scheduler that was started again may not know the instance for this long."""
TIMEOUT_S = 10.0


async def keep_registered(instance_id: str, address: str, schedulers: Sequence[str], keys: Keys | None = None) -> None:
    """Register the instance at `address` with each scheduler at these `host:port`, until this is cancelled. If a
    registration fails it is tried again; each reason is logged once."""
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
                level = logging.WARNING  # other versions or keys may keep it from ever serving; nothing else says so
                now = f"{instance_id} cannot be registered; still trying: {error}"
            if now != last:
                logger.log(level, "%s", now)
                last = now
            await asyncio.sleep(INTERVAL_S)
