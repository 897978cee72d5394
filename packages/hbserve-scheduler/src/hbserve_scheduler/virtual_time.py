"""An event loop whose time jumps to the next timer: hours of a deployment in seconds, and the same in every run.

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(simulate())

All of the scheduler's times are of its loop, so that CpuScheduler runs in it as it is. What comes from outside, like an
answer over a socket or from a thread, has no time there: nothing waits for it, and there are no sockets.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any, TypeVarTuple

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
        self._later: list[tuple[float, int, _Callback]] = []
        """A heap, by time and then in the order in which they came."""
        self._numbers = itertools.count()

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
        if when > self._now_s:
            heapq.heappush(self._later, (when, next(self._numbers), handle))
        else:
            self._soon.append(handle)
        return handle

    def _run_once(self) -> None:
        """All that is to happen now, in the order in which it was asked for; before it a jump, if that is nothing."""
        soon = self._soon
        if not soon:
            self._jump()
        while soon:
            handle = soon.popleft()
            callback = handle.callback
            if callback is None:
                continue
            try:
                handle.context.run(callback, *handle.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": f"{callback!r} failed", "exception": error})
            if self._stopping:  # type: ignore[attr-defined]  # BaseEventLoop's
                return

    def _jump(self) -> None:
        """Raises RuntimeError: all wait for each other, and there is no timer that would end it."""
        later = self._later
        while later and later[0][2].callback is None:
            heapq.heappop(later)
        if not later:
            raise RuntimeError("virtual time: everything waits, and nothing is left that could happen")
        self._now_s = later[0][0]
        while later and later[0][0] == self._now_s:
            self._soon.append(heapq.heappop(later)[2])


class _Callback:
    """What call_soon and call_at return, as asyncio.TimerHandle."""

    __slots__ = ("args", "callback", "context", "when_s")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None, when_s: float
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = copy_context() if context is None else context
        self.when_s = when_s

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.when_s
