"""Set-up of HBServe's own processes, against what they inherit: commands, instances, ranks.

Whoever uses the packages as a library has a process of his own, in which nothing here is called.

What comes from a shell, a supervisor or a caller's thread may be unusual, and each breaks something far away: a closed
descriptor is given to the next socket, into which a C library then writes its warnings; a signal that is blocked never
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
"""More are not asked for, whatever the system would give: some libraries go through all that are possible."""
SELDOM = 100
"""Collections of the middle generation until a full one may come, not 10: 700,000 objects more than were freed."""
NO_FILE_LEFT = (errno.EMFILE, errno.ENFILE)
"""Numbers of errors where this process, or its system, has no file left: the fault of nobody else."""
RAISED_AGAIN_S = 0.05
"""How soon a KeyboardInterrupt that Python has ignored comes again."""
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signalled(BaseException):
    """A signal has ended what was done."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def signal_name(number: int) -> str:
    """Also of one of real time, of which Python knows the first and the last only: init systems and runtimes of
    containers send some."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN{number - signal.SIGRTMIN:+d}"


def set_up() -> None:
    """Make the process as it would be in a terminal. To be called first, in the main thread."""
    _open_standard_streams()
    _lose_what_stderr_does_not_take()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*_ENDING, signal.SIGCHLD])
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _allow_many_files()


def ending_signals() -> list[signal.Signals]:
    """The signals that end this process in order: not those of the terminal (Ctrl-C, and its closing) that whoever
    started it has had ignored, as `nohup` does, and a script for what it starts with `&`."""
    return [each for each in _ENDING if each is signal.SIGTERM or signal.getsignal(each) is not signal.SIG_IGN]


def end_at_once_by_ctrl_c() -> None:
    """Ctrl-C ends this process as SIGTERM does wherever neither is handled: without a traceback, at any moment."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def freeze_heap() -> None:
    """Let the garbage collector look at no object again that exists now: those of modules, mostly. To be called when
    everything is loaded: a full collection through torch's objects stops all threads for a tenth of a second or two, in
    the middle of a step or of an answer.

    Later full collections are seldom: a thousand requests that wait are 200,000 objects, which would be looked through,
    in as long, whenever there are a quarter more. What has no cycle is freed without them.
    """
    gc.collect()
    gc.freeze()
    young, old, oldest = gc.get_threshold()
    gc.set_threshold(young, old, max(oldest, SELDOM))


@contextlib.contextmanager
def on_ending_signals(tell: Callable[[signal.Signals], object]) -> Iterator[None]:
    """While this is entered, each signal that ends the process calls `tell` in the running event loop instead. Must run
    in the main thread."""
    with on_signals(ending_signals(), tell):
        yield


@contextlib.contextmanager
def on_signals(numbers: list[signal.Signals], tell: Callable[[signal.Signals], object]) -> Iterator[None]:
    """The same for some signals.

    Afterwards they do what they did before. An event loop's own `remove_signal_handler` makes SIGINT a
    KeyboardInterrupt, whatever it was before: a Ctrl-C while the loop closes would be a traceback.
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
    """A signal that comes when the loop is just about to wait, or that the system gives to another thread, is handled
    only when the loop wakes: at its next timer, or never."""
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
    """What a job returns. A signal ends it in order, by a cancellation, which arrives wherever the job waits: an
    exception of the signal's own would come anywhere, also where Python ignores exceptions, or in a task for whose
    result nobody waits. Another signal, while it ends, at once.

    Raises:
        Signalled: a signal has ended it.
    """
    task = asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        if received:  # the event loop will have ended before its processes have, of which asyncio would complain
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
    """Around what is no event loop, and is interrupted by a KeyboardInterrupt: one that is raised where Python ignores
    exceptions (in a `__del__`, a callback of a weak reference or of the garbage collector) is raised again soon after.
    Must run in the main thread."""

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
    """Those that are closed lead nowhere from now on. `sys.stdout` stays None then: who has an answer to write must say
    that it cannot."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(fd, True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process


class _LosingFile(io.FileIO):
    """Takes what cannot be written, too."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _lose_what_stderr_does_not_take() -> None:
    """Its reader may have ended (`2>&1 | head`, a collector of logs), or its disk be full: a notice that nobody can
    read must end nothing. The log loses such lines by itself: see `stderr_log`."""
    before = sys.stderr
    if isinstance(before, io.TextIOWrapper) and before is sys.__stderr__:  # else whoever runs this has put it there
        binary = io.BufferedWriter(_LosingFile(before.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(binary, before.encoding, before.errors, line_buffering=True, write_through=True)


def with_file_limit(text: str) -> str:
    """What somebody says, a library too, and the limit with its cure if that was met."""
    if re.search(r"Too many open files(?! in system)", text) is None or "`ulimit -n`" in text:
        return text
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"{text}: this process may open {most}; raise `ulimit -n`"


def _allow_many_files() -> None:
    """Each peer and client is one. The usual limit, 1024, is kept low for programs that call select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # where the system does not let us, the limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
