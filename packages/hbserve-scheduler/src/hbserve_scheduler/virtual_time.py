"""An event loop whose time jumps to the next timer: hours of a deployment in seconds, and the same in every run.

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(simulate())

All of the scheduler's times are of its loop, so that CpuScheduler runs in it as it is. What comes from outside, like an
answer over a socket or from a thread, has no time there: nothing waits for it.
"""

import asyncio
import selectors
from typing import Any

TURNS_BETWEEN_LOOKS = 64
"""Of the loop: only signals come from outside, and to look for them takes as long as much of a turn."""
NOTHING: list[Any] = []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Begins at 0 s. Work takes no time in it, only waiting does."""

    def __init__(self) -> None:
        self._selector = _JumpingSelector()
        super().__init__(self._selector)

    def time(self) -> float:
        return self._selector.now_s


class _JumpingSelector(selectors.DefaultSelector):
    """Lets time pass instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._turns = 0

    def select(self, timeout: float | None = None) -> Any:
        """Raises RuntimeError: all wait for each other, and there is no timer that would end it."""
        self._turns += 1
        if self._turns % TURNS_BETWEEN_LOOKS == 0 or timeout is None:
            ready = super().select(0)
            if ready:
                return ready
        if timeout is None:
            raise RuntimeError("virtual time: everything waits, and nothing is left that could happen")
        if timeout > 0:
            self.now_s += timeout
        return NOTHING
