"""The stream of events of one request that its client reads."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

from hbserve_rpc.messages import ClientEvent, RequestFinished, TokenEvent
from hbserve_rpc.rpc_stream import whenever_told
from hbserve_scheduler.request import ScheduledRequest


class TurnEnd:
    """Functions to call at the end of this turn of the event loop. One callback calls them all, because asyncio takes
    longer to schedule a callback than most of them take to run."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def call(self, tell: Callable[[], None]) -> None:
        """Call `tell` at the end of this turn. It must not raise."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._call_all)
        self._due.append(tell)

    def _call_all(self) -> None:
        due, self._due = self._due, []
        for tell in due:
            tell()


class EventStream(AsyncIterator[ClientEvent]):
    """Stream of TokenEvents, and then a RequestFinished for each choice or the error that ended the request. `aclose`
    before the end aborts the request."""

    def __init__(self, entry: ScheduledRequest, abandon: Callable[[ScheduledRequest], None], turn_end: TurnEnd) -> None:
        self._entry = entry
        self._abandon = abandon
        self._turn_end = turn_end
        self._ended = False
        self._num_choices = entry.request.params.n

    async def __anext__(self) -> ClientEvent:
        if self._ended:
            raise StopAsyncIteration
        while not self._entry.events:
            self._entry.reader = asyncio.get_running_loop().create_future()
            await self._entry.reader
        return self._next()

    def _next(self) -> ClientEvent:
        event = self._entry.take()
        if isinstance(event, TokenEvent):  # the common case
            return event
        if isinstance(event, RequestFinished):
            self._num_choices -= 1
            self._ended = self._num_choices == 0
            return event
        self._ended = True
        raise event

    async def each(self, take: Callable[[ClientEvent], object]) -> bool:
        """Pass every event to `take`, until `take` returns True or there are no more. Return whether there may be more.

        No task is woken for an event. The events of one turn of the event loop are passed on at its end, all tokens in
        one event: a process that falls behind reads several engine steps in one turn, and should hand them on only
        once. What `take` raises is raised here.
        """

        def give() -> bool:
            while self._entry.events and not self._ended:
                if take(self._next()):
                    return True
            return self._ended

        if not self._ended:
            await whenever_told(give, self._listen)
        return not self._ended

    def _listen(self, tell: Callable[[], None] | None) -> None:
        self._entry.on_event = None if tell is None else partial(self._turn_end.call, tell)

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._abandon(self._entry)
