"""End of a process that serves: when it begins, and when it is to be over."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Ending:
    """Why and how a server is to end: at the first signal when its answers have ended, at a second one at once."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.at_once = asyncio.Event()
        self.deaths: list[str] = []
        """Ends of processes without which it cannot serve, in words."""

    def tell(self) -> None:
        (self.at_once if self.begun.is_set() else self.begun).set()

    def tell_at_once(self) -> None:
        self.begun.set()
        self.at_once.set()

    def by_death(self, name: str, why: str) -> None:
        self.deaths.append(f"{name}: {why}")
        self.begun.set()


async def unless(stop: asyncio.Event, job: Coroutine[Any, Any, None]) -> None:
    """Run a job to its end, or until `stop`."""
    tasks = [asyncio.create_task(job), asyncio.create_task(_wait(stop))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def together(*jobs: Coroutine[Any, Any, None]) -> None:
    """Run jobs at once. What the first one raises ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
