"""The end of what a DisaggregatedLLM has started, also where it was collected and nobody called `stop`."""

import asyncio
import contextlib
import os
import weakref
from collections.abc import Callable

from hbserve.processes.launcher import LocalInstances
from hbserve_scheduler import CpuScheduler


def weakly(method: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """The same as long as its object lives, then nothing: what goes on in an event loop must not keep the object."""
    reference = weakref.WeakMethod(method)

    def call(instance_id: str, why: str) -> None:
        if (found := reference()) is not None:
            found(instance_id, why)

    return call


async def end_both(scheduler: CpuScheduler | None, instances: LocalInstances | None) -> None:
    """Stop first the scheduler, for which an instance's end would be a failure; then the processes in any case."""
    try:
        if scheduler is not None:
            await scheduler.stop()
    finally:
        if instances is not None:
            await instances.stop()


def end_dropped(loop: asyncio.AbstractEventLoop, pid: int, scheduler: CpuScheduler, instances: LocalInstances) -> None:
    """End what a DisaggregatedLLM has left that was collected, in whatever thread."""

    def begin() -> None:
        task = loop.create_task(end_both(scheduler, instances))
        task.add_done_callback(lambda task: instances.kill() if task.cancelled() else None)

    if os.getpid() != pid:  # what a process has started, no fork of it ends
        return
    if loop.is_running():
        with contextlib.suppress(RuntimeError):  # it has just been closed
            loop.call_soon_threadsafe(begin)
            return
    instances.kill()
