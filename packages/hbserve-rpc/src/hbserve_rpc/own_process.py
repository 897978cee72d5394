"""Set-up of HBServe's own processes (commands, instances, ranks), which corrects what they inherit.

A program that uses the packages as a library has its own process, in which nothing here is called.

What is inherited from a shell, a supervisor or a caller's thread may be unusual, and then breaks something far away: a
closed descriptor is given to the next socket, into which a C library then writes its warnings; a blocked signal never
ends anything; where SIGCHLD is ignored, nobody learns how a child has ended.
"""

import asyncio
import contextlib
import errno
import gc
import io
import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

MOST_FILES = 65536
"""Largest limit of open files to ask for, whatever the system allows: some libraries go through all possible files."""
SELDOM = 100
"""Number of collections of the middle generation until a full one may come, instead of 10. By then 700,000 more objects
were made than freed."""
NO_FILE_LEFT = (errno.EMFILE, errno.ENFILE)
"""Numbers of errors that mean that this process, or its system, may open no more files. No peer is to blame."""
RAISED_AGAIN_S = 0.05
"""Time after which a KeyboardInterrupt that Python has ignored is raised again."""
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signalled(BaseException):
    """A signal that has ended a job."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def signal_name(number: int) -> str:
    """Return the name of a signal. Python names only the first and the last real-time signal, but init systems and
    container runtimes send others."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN{number - signal.SIGRTMIN:+d}"


def set_up() -> None:
    """Bring the process into the state that it would have in a terminal. Must be called first, in the main thread."""
    _open_standard_streams()
    _lose_what_stderr_does_not_take()
    _name_stdout_in_errors()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*_ENDING, signal.SIGCHLD])
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    allow_many_files()


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end this process in order. Those of the terminal (Ctrl-C, and its closing) are left out
    if whoever started the process made it ignore them, as `nohup` does, and a script for jobs started with `&`."""
    return [each for each in _ENDING if each is signal.SIGTERM or signal.getsignal(each) is not signal.SIG_IGN]


def end_at_once_by_ctrl_c() -> None:
    """Make Ctrl-C end this process as an unhandled SIGTERM does: without a traceback, at any moment."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Around what takes long, cannot be interrupted and has nothing to undo, as importing torch: a signal that ends the
    process in order elsewhere ends it at once here. Must run in the main thread."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def freeze_heap() -> None:
    """Make the garbage collector skip all objects that exist now, which are mostly those of modules. Call it when
    everything is loaded: a full collection through torch's objects stops all threads for a tenth of a second or two, in
    the middle of a step or of an answer.

    It also makes later full collections rare. A thousand waiting requests are 200,000 objects; going through them takes
    as long, and would happen whenever there are a quarter more. Objects without cycles are freed without collections.
    """
    gc.collect()
    gc.freeze()
    young, old, oldest = gc.get_threshold()
    gc.set_threshold(young, old, max(oldest, SELDOM))


@contextlib.contextmanager
def on_ending_signals(tell: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Context in which each signal that would end the process calls `tell` in the running event loop instead. Must be
    entered in the main thread."""
    with on_signals(ending_signals(), tell):
        yield


@contextlib.contextmanager
def on_signals(numbers: list[signal.Signals], tell: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Context in which each of these signals calls `tell` in the running event loop. Must be in the main thread.

    Afterwards the signals do what they did before. An event loop's own `remove_signal_handler` makes SIGINT raise
    KeyboardInterrupt, whatever it did before, so that a Ctrl-C while the loop closes would show a traceback.
    """
    loop = asyncio.get_running_loop()

    def handle(number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(tell, signal.Signals(number))

    with _woken_by_signals(loop):
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Context in which each signal wakes the loop. Otherwise a signal that comes just before the loop waits, or that
    the system gives to another thread, would be handled only when the loop wakes: at its next timer, or never."""
    woken, waking = socket.socketpair()
    with woken, waking:
        woken.setblocking(False)
        waking.setblocking(False)
        loop.add_reader(woken, woken.recv, 4096)
        before = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
            loop.remove_reader(woken)


async def until_signalled(job: Coroutine[Any, Any, T]) -> T:
    """Run a job and return its result. A signal ends it in order, by a cancellation, which arrives where the job waits:
    an exception raised by the signal itself could come anywhere, even where Python ignores exceptions, or in a task for
    whose result nobody waits. Another signal while the job ends cancels it again, which ends it at once.

    Raises:
        Signalled: a signal has ended the job.
    """
    task = asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        if received:  # the event loop ends before its child processes do, which asyncio would warn about
            logging.getLogger("asyncio").setLevel(logging.ERROR)
        received.append(number)
        task.cancel()

    with on_ending_signals(end):
        try:
            return await job
        except asyncio.CancelledError:
            if not received:
                raise
            raise Signalled(received[0]) from None


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Context for code outside an event loop that a KeyboardInterrupt is to interrupt: if it is raised where Python
    ignores exceptions (in a `__del__`, a callback of a weak reference or of the garbage collector), it is raised again
    soon after. Must be entered in the main thread."""

    is_pending = False

    def see(ignored: "sys.UnraisableHookArgs") -> None:
        nonlocal is_pending
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            hook(ignored)
            return
        is_pending = True
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, RAISED_AGAIN_S)

    hook, sys.unraisablehook = sys.unraisablehook, see
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if is_pending:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _open_standard_streams() -> None:
    """Open closed standard streams to the null device. `sys.stdout` then stays None, because code that has an answer to
    write must say that it cannot."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(fd, True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process


class _LosingFile(io.FileIO):
    """File that accepts data even if it cannot be written, and loses it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _lose_what_stderr_does_not_take() -> None:
    """Make stderr lose what cannot be written. Its reader may have ended (`2>&1 | head`, a log collector), or its disk
    may be full: a notice that nobody can read must end nothing. The log loses lines by itself: see `stderr_log`."""
    before = sys.stderr
    if isinstance(before, io.TextIOWrapper) and before is sys.__stderr__:  # else somebody has replaced it
        binary = io.BufferedWriter(_LosingFile(before.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(binary, before.encoding, before.errors, line_buffering=True, write_through=True)


class _NamedStdout(io.FileIO):
    """File whose errors name stdout."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "stdout"
            raise


def _name_stdout_in_errors() -> None:
    """Make errors of writing to stdout, such as of a full disk, name it as they do any other file."""
    before = sys.stdout
    if isinstance(before, io.TextIOWrapper) and before is sys.__stdout__:  # else somebody has replaced it
        raw = _NamedStdout(before.fileno(), "w", closefd=False)
        binary = raw if before.write_through else io.BufferedWriter(raw)  # write_through: PYTHONUNBUFFERED
        sys.stdout = io.TextIOWrapper(
            binary,
            before.encoding,
            before.errors,
            line_buffering=before.line_buffering,
            write_through=before.write_through,
        )


def with_file_limit(text: str) -> str:
    """Return an error's text, even a library's. If it is about too many open files, add the limit and its remedy."""
    if re.search(r"Too many open files(?! in system)", text) is None or "`ulimit -n`" in text:
        return text
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"{text}: this process may open {most}; raise `ulimit -n`"


def allow_many_files() -> None:
    """Raise the limit of open files: each peer and client takes one. The usual limit, 1024, is low only for the sake of
    programs that call select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # if the system does not allow it, the limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
