"""Processes of this host, as /proc shows them."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hbserve_rpc import own_process
from hbserve_testing.forkserver import TITLE

T = TypeVar("T")


def run_in_order(job: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, of a program that ends in order at SIGTERM, SIGHUP and Ctrl-C: one that they end at once leaves
    what it has started."""
    try:
        return asyncio.run(own_process.until_signalled(job))
    except own_process.Signalled as ended:
        sys.exit(128 + ended.number)


@contextmanager
def ending_as_by_ctrl_c() -> Iterator[None]:
    """The same for a program without an event loop: within, SIGTERM and SIGHUP are a KeyboardInterrupt."""
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
    """What this process writes beyond that raises an OSError without a name, as on a full disk. Python keeps no
    compiled modules meanwhile: it would not notice that they are cut."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    keeps_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = keeps_none


def state_of(pid: int) -> str:
    """R, S, T and so on; Z: it has ended, and nobody has asked how; "": there is none."""
    try:
        return _stat(pid)[0]
    except OSError:
        return ""


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until a child has stopped: the signal reaches each of its threads only when that next runs, and
    until then it may still answer."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def alive(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def children_of(pid: int) -> list[int]:
    """Those that live, but forkservers, which are none of a program's own."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [each for each in found if _parent_of(each) == pid and alive(each) and command_of(each) != [TITLE]]


def processor_time_s(pid: int) -> float:
    """What it has computed until now, without its children: other than its age, no load changes it much."""
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _parent_of(pid: int) -> int:
    try:
        return int(_stat(pid)[1])
    except OSError:
        return 0


def _stat(pid: int) -> list[str]:
    """Its fields from the state on; the name before may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
