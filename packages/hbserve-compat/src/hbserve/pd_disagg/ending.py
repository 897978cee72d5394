"""The end of what a DisaggregatedLLM has started, also if it was garbage-collected without a call of `stop`."""

import asyncio
import contextlib
import os
import weakref
from collections.abc import Callable

from hbserve.processes.launcher import LocalInstances
from hbserve_scheduler import CpuScheduler


def weakly(method: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """Return a callback that calls a method while its object lives, and then does nothing. So what runs in an event
    loop does not keep the object alive."""
    reference = weakref.WeakMethod(method)

    def call(instance_id: str, why: str) -> None:
        if (found := reference()) is not None:
            found(instance_id, why)

    return call


async def end_both(scheduler: CpuScheduler | None, instances: LocalInstances | None) -> None:
    """Stop the scheduler, and then the processes in any case. The scheduler comes first because it would take the end
    of an instance for a failure."""
    try:
        if scheduler is not None:
            await scheduler.stop()
    finally:
        if instances is not None:
            await instances.stop()


def end_dropped(loop: asyncio.AbstractEventLoop, pid: int, scheduler: CpuScheduler, instances: LocalInstances) -> None:
    """End what a garbage-collected DisaggregatedLLM has left. May be called in any thread."""

    def begin() -> None:
        task = loop.create_task(end_both(scheduler, instances))
        task.add_done_callback(lambda task: instances.kill() if task.cancelled() else None)

    if os.getpid() != pid:  # a fork does not end what its parent has started
        return
    if loop.is_running():
        with contextlib.suppress(RuntimeError):  # the loop has just been closed
            loop.call_soon_threadsafe(begin)
            return
    instances.kill()
