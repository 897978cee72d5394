"""An event loop whose time jumps to the next timer: hours of a deployment in seconds, and the same in every run.

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(simulate())

All of the scheduler's times are of its loop, so that CpuScheduler runs in it as it is. What comes from outside, like an
answer over a socket or from a thread, has no time there: nothing waits for it, and there are no sockets.
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
    """Begins at 0 s. Work takes no time in it, only waiting does.

    asyncio's own loop with a selector that jumps would do, but most of a simulation was that loop: it makes handles and
    compares timers in Python, and looks at the selector in every turn. `_run_once` is what BaseEventLoop calls until
    `_stopping`, in all versions of Python that we run on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._soon: deque[_Callback] = deque()
        self._later: dict[float, list[_Callback]] = {}
        """By time, those of the same time in the order in which they came: in a fleet thousands are due together."""
        self._times: list[float] = []
        """A heap of these times."""
        # In place of methods in Python, which would be called for each task and future.
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
        """All that is to happen until the loop is stopped: what is to happen now, in the order in which it was asked
        for, then a jump to the next timer, and so on.

        Raises RuntimeError: all wait for each other, and there is no timer that would end it.
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
    """What call_soon and call_at return, as asyncio.TimerHandle: made without a line of Python."""

    callback: Callable[..., object] | None
    """None: it was cancelled."""
    args: tuple[Any, ...]
    context: Context | None
    """A task's own. Without one it runs in the loop's, where asyncio would copy that of whoever has asked for it."""
    at_s: float

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.at_s
