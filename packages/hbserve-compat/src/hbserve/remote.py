"""The scheduler of a running deployment, for the commands that take `--connect`."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hbserve_rpc import InvalidAddress, load_keys
from hbserve_rpc.messages import ServiceInfo
from hbserve_scheduler import ConfigError, RemoteScheduler

FIND_SCHEDULER_S = 30.0
TELL_AFTER_S = 3.0


@asynccontextmanager
async def remote_scheduler(
    address: str, keys: Path | None = None
) -> AsyncIterator[tuple[RemoteScheduler, ServiceInfo]]:
    """Connect to a scheduler for the time of the block. `keys` is a folder with a client's keys, if the scheduler needs
    them.

    Raises:
        ConfigError: the address is not valid.
        KeysError: (a ValueError) the keys cannot be used.
        NotReady: nothing answers there in time, or the scheduler does not accept this side.
    """
    known = load_keys(keys, "client") if keys is not None else None
    try:
        scheduler = RemoteScheduler(address, keys=known)
    except InvalidAddress as error:
        raise ConfigError(f"--connect={error}") from None
    await scheduler.start()
    try:
        yield scheduler, await _find(scheduler)
    finally:
        await scheduler.stop()


async def _find(scheduler: RemoteScheduler) -> ServiceInfo:
    """Wait for the scheduler, which may still be starting, and tell the user what takes so long."""
    notice = f"waiting for a scheduler at {scheduler.address}, up to {FIND_SCHEDULER_S:.0f} s\n"
    telling = asyncio.get_running_loop().call_later(TELL_AFTER_S, sys.stderr.write, notice)
    try:
        return await scheduler.find(FIND_SCHEDULER_S)
    finally:
        telling.cancel()
