"""Notices of what a start waits for, given from two seconds after its beginning until it has what it needs."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from hbserve.processes.child_process import Startable
from hbserve_scheduler import CpuScheduler

FIRST_S, LOOK_S, AGAIN_S = 2.0, 0.5, 10.0
"""Times of the first notice, between two looks, and after which a notice is repeated that has not changed."""


def missing(processes: Iterable[Startable], scheduler: CpuScheduler) -> list[str]:
    """List what a start waits for: processes that do not serve yet, or else instances that are not ready."""
    starting = [f"{each.name}: {each.waits_for}" for each in processes if not each.address]
    handles = scheduler.fleet.handles.values()
    return starting or [each.describe_problem() for each in handles if each.status != "ready"]


@asynccontextmanager
async def telling(what: Callable[[], list[str]], tell: Callable[[str], object]) -> AsyncIterator[None]:
    """Report from time to time, during the block, what a start waits for. `what` finds it, and `tell` reports it."""
    task = asyncio.create_task(_tell(what, tell))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def telling_at_terminal(what: Callable[[], list[str]]) -> AsyncIterator[None]:
    """Report on stderr what a start waits for, if stderr is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    async with telling(what, lambda notice: sys.stderr.write(f"hbserve: {notice}\n")):
        yield


async def _tell(what: Callable[[], list[str]], tell: Callable[[str], object]) -> None:
    loop, last, told_s = asyncio.get_running_loop(), "", 0.0
    await asyncio.sleep(FIRST_S)
    while True:
        found = "; ".join(what())
        if found and (found != last or loop.time() - told_s >= AGAIN_S):
            tell(f"waiting for {found}")
            last, told_s = found, loop.time()
        await asyncio.sleep(LOOK_S)
