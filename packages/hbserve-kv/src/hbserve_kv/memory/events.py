"""CUDA streams in our own threads, and a watch that tells when CUDA events have happened, without blocking on one."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

INTERVAL_S = 1e-4
"""Seconds between two polls. The control messages of a transfer take ten times as long."""
LINGER_S = 0.5
"""How long the polling thread stays when nothing is left. Starting one holds its starter until the new thread has had
its turn of the interpreter: in the event loop of a busy instance, longer than polling takes."""
GPU_PART_BYTES = 1 << 30
"""`max_part_bytes` of transports that move GPU memory. To queue a part and hear of its end takes two switches of
thread, in which more than 64 MiB could move."""
COPY_PRIORITY = -1
"""Priority of CUDA streams that move blocks; lower is more urgent, and the computation's is 0. So a copy kernel gets
the next multiprocessors that are free, and not those that a large matrix product leaves when its last tiles have
begun."""


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Make `stream` current, as `torch.cuda.stream` does, and its device that of the thread, which must be our own.

    A thread starts on the first GPU, and torch's own context manager would return to that one. CUDA would then make a
    context there, which takes 0.15 s in the middle of a transfer, and half a gigabyte of a GPU that belongs to another
    instance.
    """
    import torch

    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield


class EventWatch:
    """Polls events until they have happened, in one thread for all, which exists while there are any, and a moment
    longer.

    Nothing blocks inside CUDA on one event, because another may happen first: if there are two transfers to one peer,
    the one whose step ends later must not delay the other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: list[tuple[Any, Any, asyncio.Future[float]]] = []
        self._is_running = False

    def until(self, event: Any, since: Any = None) -> asyncio.Future[float]:
        """Return a future of the running loop that is done when `event` has happened. Its result is the seconds since
        the event `since`, if given (then both need timing), else 0. It fails with what the device raises."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.tell(future, event, since)
        return future

    def tell(self, future: asyncio.Future[float], event: Any, since: Any = None) -> None:
        """Do the same as `until` for an existing future. May be called in any thread."""
        if self._has_settled(event, since, future):
            return
        with self._changed:
            self._watched.append((event, since, future))
            if self._is_running:
                self._changed.notify()
                return
            self._is_running = True
        threading.Thread(target=self._look, name="kv-events", daemon=True).start()

    @staticmethod
    def has_happened(event: Any) -> bool:
        """Whether the event has happened; False if its device has failed, which `until` reports."""
        try:
            return bool(event.query())
        except RuntimeError:
            return False

    def _look(self) -> None:
        while True:
            with self._changed:
                if not self._watched and not self._changed.wait(LINGER_S) and not self._watched:
                    self._is_running = False
                    return
                watched = list(self._watched)
            settled = [each for each in watched if self._has_settled(*each)]
            with self._changed:
                for each in settled:
                    self._watched.remove(each)
                is_over = not self._watched
            if not is_over:
                time.sleep(INTERVAL_S)

    @staticmethod
    def _has_settled(event: Any, since: Any, future: asyncio.Future[float]) -> bool:
        error, time_s = None, 0.0
        try:
            if not event.query():
                return False
            if since is not None:
                time_s = since.elapsed_time(event) / 1e3
        except Exception as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            future.get_loop().call_soon_threadsafe(_settle, future, time_s, error)
        return True


def _settle(future: asyncio.Future[float], time_s: float, error: Exception | None) -> None:
    if future.done():  # whoever waited was cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(time_s)
