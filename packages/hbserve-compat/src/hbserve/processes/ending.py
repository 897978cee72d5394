"""The end of a serving process: when it begins, and when it must not wait any longer."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Ending:
    """Why and how a server ends: a first signal lets its answers end before that, a second one ends it at once."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.at_once = asyncio.Event()
        self.deaths: list[str] = []
        """Reasons, in words, for the ends of processes without which the server cannot serve."""

    def tell(self) -> None:
        (self.at_once if self.begun.is_set() else self.begun).set()

    def tell_at_once(self) -> None:
        self.begun.set()
        self.at_once.set()

    def by_death(self, name: str, why: str) -> None:
        self.deaths.append(f"{name}: {why}")
        self.begun.set()


async def unless(stop: asyncio.Event, job: Coroutine[Any, Any, None]) -> None:
    """Run a job to its end, or until `stop` is set."""
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
    """Run jobs at the same time. The first exception cancels the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
