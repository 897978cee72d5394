"""Threads with deep stacks. Nobody waits for their end, because what they compute cannot be interrupted."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_STACK_BYTES = 256 << 20
"""Stack size of each thread. The compiler of grammars recurses along chains of references, and the longest chains that
MAX_GRAMMAR_BYTES allows need up to 64 MiB. Only the part of a stack that is used takes memory."""
_of_stack_size = threading.Lock()
_Jobs = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Workers:
    """Pool of `count` threads, started at the first job. They end when nothing refers to this object any more."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._jobs: _Jobs = SimpleQueue()
        self._lock = threading.Lock()
        self._has_begun = False

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Run a job in one of the threads, after those submitted before it have begun."""
        if not self._has_begun:
            self._begin()
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def _begin(self) -> None:
        with self._lock, _of_stack_size:
            if self._has_begun:
                return
            before = threading.stack_size(_STACK_BYTES)
            try:
                for number in range(self._count):
                    threading.Thread(
                        target=_run, args=(self._jobs,), name=f"{self._name}-{number}", daemon=True
                    ).start()
            finally:
                threading.stack_size(before)
            weakref.finalize(self, _end, self._jobs, self._count)
            self._has_begun = True


def _run(jobs: _Jobs) -> None:
    while (item := jobs.get()) is not None:
        future, job = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # belongs to whoever waits
                future.set_exception(error)
        del item, future, job  # what they refer to must not live until the next one


def _end(jobs: _Jobs, count: int) -> None:
    for _ in range(count):
        jobs.put(None)
