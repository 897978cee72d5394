"""Waits of tests for what they need, up to a deadline."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any


async def until(condition: Callable[..., Any], deadline_s: float = 60.0) -> None:
    """Wait until `condition()`, awaited if it is awaitable, is true. Raises TimeoutError at the deadline."""
    async with asyncio.timeout(deadline_s):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def reading(stream: Any) -> AsyncIterator["asyncio.Future[list[Any]]"]:
    """Read a stream to its end while the context runs, and leave the stream with the context. Yields a future of all
    its events."""

    async def read() -> list[Any]:
        return [event async for event in stream]

    async with stream:
        events = asyncio.ensure_future(read())
        try:
            yield events
        finally:
            events.cancel()
            await asyncio.gather(events, return_exceptions=True)
