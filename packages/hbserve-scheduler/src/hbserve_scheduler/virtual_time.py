"""An event loop whose time jumps to the next timer. It runs hours of a deployment in seconds, each time the same way.

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(simulate())

All times of the scheduler are those of its loop, so CpuScheduler runs in this loop unchanged. Events from outside, such
as an answer over a socket or from a thread, have no time in it: nothing waits for them, and there are no sockets.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from functools import partial
from heapq import heappop, heappush
from typing import Any, TypeVarTuple

import msgspec

Ts = TypeVarTuple("Ts")


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Event loop in which only waiting takes time, and work takes none. Its time begins at 0 s.

    asyncio's own loop with a selector that jumps would work too, but it took most of a simulation's time: it makes
    handles and compares timers in Python, and looks at the selector in every turn. BaseEventLoop calls `_run_once`
    until `_stopping`, in all versions of Python that we support.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._soon: deque[_Callback] = deque()
        self._later: dict[float, list[_Callback]] = {}
        """Timers by time; those of the same time are in order. In a fleet thousands are due together."""
        self._times: list[float] = []
        """Heap of these times."""
        # These replace methods written in Python, which would be called for each task and future.
        self.get_debug: Callable[[], bool] = bool
        self.create_future: Callable[[], asyncio.Future[Any]] = partial(asyncio.Future, loop=self)
        self.create_task: Callable[..., asyncio.Task[Any]] = partial(asyncio.Task, loop=self)

    def time(self) -> float:
        return self._now_s

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None) -> Any:
        handle = _Callback(callback, args, context, self._now_s)
        self._soon.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Any:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Any:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Any:
        handle = _Callback(callback, args, context, when)
        if when <= self._now_s:
            self._soon.append(handle)
        elif (due := self._later.get(when)) is not None:
            due.append(handle)
        else:
            self._later[when] = [handle]
            heappush(self._times, when)
        return handle

    def _run_once(self) -> None:
        """Run all callbacks until the loop is stopped: those due now, in the order in which they were scheduled, then
        those of the next timer, to which the time jumps, and so on.

        Raises RuntimeError if everything waits for something else, and there is no timer that would end it.
        """
        soon, next_one = self._soon, self._soon.popleft
        while not self._stopping:  # type: ignore[attr-defined]  # BaseEventLoop's
            if not soon:
                if not self._times:
                    raise RuntimeError("virtual time: everything waits, and nothing is left that could happen")
                self._now_s = heappop(self._times)
                soon.extend(self._later.pop(self._now_s))
            handle = next_one()
            if (callback := handle.callback) is None:
                continue
            try:
                if (context := handle.context) is None:
                    callback(*handle.args)
                else:
                    context.run(callback, *handle.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": f"Exception in callback {callback!r}", "exception": error})


class _Callback(msgspec.Struct, eq=False):
    """Handle that call_soon and call_at return, like asyncio.TimerHandle. It is made without running Python code."""

    callback: Callable[..., object] | None
    """Function to call; None if it was cancelled."""
    args: tuple[Any, ...]
    context: Context | None
    """Context of a task. Without one the callback runs in the loop's context; asyncio would copy the caller's."""
    at_s: float

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.at_s
