"""Processes of this host, as /proc shows them."""

import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from hbserve_rpc import own_process
from hbserve_testing.forkserver import TITLE

T = TypeVar("T")


def run_in_order(job: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine like `asyncio.run`, and end in order at SIGTERM, SIGHUP and Ctrl-C. A program that these end at
    once leaves behind what it has started."""
    try:
        return asyncio.run(own_process.until_signalled(job))
    except own_process.Signalled as ended:
        sys.exit(128 + ended.number)


@contextmanager
def ending_as_by_ctrl_c() -> Iterator[None]:
    """Do the same as `run_in_order` for a program without an event loop: within the context, SIGTERM and SIGHUP raise
    KeyboardInterrupt."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        with own_process.keeping_interrupts():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    """Limit the length of files that this process writes. A longer write raises an OSError without a file name, as on a
    full disk. Python keeps no compiled modules meanwhile, because it would not notice that they are cut."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    keeps_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = keeps_none


def state_of(pid: int) -> str:
    """Return the state of a process: R, S, T and so on. Z: it has ended, and nobody has waited for it. "": there is no
    such process."""
    try:
        return _stat(pid)[0]
    except OSError:
        return ""


def freeze(pid: int) -> None:
    """Send SIGSTOP to a process, and wait until it has stopped. The signal reaches each of its threads only when that
    thread next runs; until then the process may still answer."""
    os.kill(pid, signal.SIGSTOP)
    while set(_states_of_threads(pid)) - {"T", "Z", "X"}:
        time.sleep(0.001)


def strike(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process. After SIGSTOP wait until it has stopped, as `freeze` does."""
    if number == signal.SIGSTOP:
        freeze(pid)
    else:
        os.kill(pid, number)


def _states_of_threads(pid: int) -> Iterator[str]:
    """Yield the state of each thread: see `state_of`. Yields nothing for a process that does not exist."""
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # it has ended
            yield (thread / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]


def alive(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def children_of(pid: int) -> list[int]:
    """Return the living children of a process, without forkservers, which the program itself has not started."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [each for each in found if _parent_of(each) == pid and alive(each) and command_of(each) != [TITLE]]


def processor_time_s(pid: int) -> float:
    """Return the processor time of a process until now, without its children. Unlike its age, this hardly depends on
    the load of the machine."""
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _parent_of(pid: int) -> int:
    try:
        return int(_stat(pid)[1])
    except OSError:
        return 0


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on. The name before them may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
