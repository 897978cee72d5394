"""Requests between two attempts. They come before those that wait, which would otherwise take every free place."""

import asyncio
from collections import deque
from collections.abc import Callable

from hbserve_scheduler.fleet import Fleet
from hbserve_scheduler.placement import Placement
from hbserve_scheduler.request import ScheduledRequest


class Retries:
    def __init__(self, fleet: Fleet, on_change: Callable[[], None]) -> None:
        self._fleet = fleet
        self._on_change = on_change
        self._waiting: deque[tuple[ScheduledRequest, asyncio.Future[Placement]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def place(self) -> None:
        """Give places, first come first served. To be called when there may be room."""
        while self._waiting:
            entry, place = self._waiting[0]
            wanted = entry.num_tokens, entry.failed_on, entry.computed_on, entry.request.params.n
            placement = self._fleet.place(*wanted)
            if placement is None:
                return
            self._waiting.popleft()
            place.set_result(placement)

    async def wait_for_place(self, entry: ScheduledRequest, timeout_s: float) -> Placement | None:
        """A place away from the instances that failed, if there are others; None if there is none in time."""
        place: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, place))
        self._on_change()
        try:
            await asyncio.wait([place], timeout=timeout_s)
        except asyncio.CancelledError:
            if place.done():
                place.result().end()
            raise
        finally:
            if not place.done():
                self._waiting.remove((entry, place))
        return place.result() if place.done() else None
