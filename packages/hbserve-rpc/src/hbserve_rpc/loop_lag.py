"""Lag of an event loop: while it is busy with one thing, everything else that it serves waits."""

import asyncio

from hbserve_rpc.counts import Histogram

PAUSE_S = 0.25
"""Pause between two measurements: long enough for them to cost nothing."""
BOUNDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
"""Bounds of the histogram, in seconds."""


class LoopLag:
    """Histogram of how late the event loop that ran `start` is, filled until `stop`."""

    def __init__(self) -> None:
        self.histogram = Histogram.over(BOUNDS)
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(PAUSE_S, self._look)

    def _look(self) -> None:
        assert self._handle is not None, "it was started"
        loop = asyncio.get_running_loop()
        self.histogram.observe(max(0.0, loop.time() - self._handle.when()))
        self.start()

    def stop(self) -> None:
        """Stop measuring. May be called twice, and without `start`."""
        if self._handle is not None:
            self._handle.cancel()
