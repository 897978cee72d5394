"""A dedicated thread for an object that only one thread may use."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Job = Callable[[], Any]
Answers = SimpleQueue[tuple[Any, BaseException | None]]


class Ended(RuntimeError):
    def __init__(self) -> None:
        super().__init__("this LLM has ended: exit() was called")


def require_own_process(pid: int) -> None:
    """Raise RuntimeError unless this is process `pid`: a forked process has none of the threads of its parent."""
    if os.getpid() != pid:
        raise RuntimeError(
            f"this LLM belongs to process {pid}, and this is {os.getpid()}, forked from it: make one here"
        )


class OwnThread:
    """Runs the jobs of all threads one after another, in the order in which they came.

    Nothing interrupts a job: a signal's exception, such as KeyboardInterrupt, is raised in the thread that waits for
    the job, and the job goes on to its end.
    """

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self._jobs: SimpleQueue[tuple[Job, Answers] | None] = SimpleQueue()
        self._ending = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=_run, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def call(self, job: Callable[[], T]) -> T:
        """Run a job in the thread, and wait for what it returns or raises.

        Raises:
            Ended: no further job is taken.
            RuntimeError: the thread belongs to another process.
        """
        require_own_process(self._pid)
        answers: Answers = SimpleQueue()
        with self._ending:
            if self._ended:
                raise Ended()
            self._jobs.put((job, answers))
        result, error = answers.get()
        if error is not None:
            raise error
        done: T = result
        return done

    def end(self, last: Job) -> None:
        """Run a last job after those that wait, then end the thread, and wait for that. May be called twice."""
        if os.getpid() != self._pid:
            return
        with self._ending:
            if not self._ended:
                self._ended = True
                self._jobs.put((last, SimpleQueue()))
                self._jobs.put(None)
        if threading.current_thread() is not self._thread:  # else this thread collected the caller as garbage
            self._thread.join()


def _run(jobs: "SimpleQueue[tuple[Job, Answers] | None]") -> None:
    while (each := jobs.get()) is not None:
        job, answers = each
        try:
            answers.put((job(), None))
        except BaseException as error:  # is raised in the thread that waits for the answer
            answers.put((None, error))
        del each, job, answers  # so that an idle thread keeps nothing alive
