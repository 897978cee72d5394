"""A Popen, and a multiprocessing, whose Python programs are forks of a forkserver: see forkserver.py."""

import contextlib
import ctypes
import inspect
import multiprocessing.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from hbserve_testing.forkserver import NUM_THREADS, SAFE_PATH, SEARCHED, UNBUFFERED, Program, ask, server_command

_PR_SET_CHILD_SUBREAPER = 36
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_ONLY_COLD = ("executable", "preexec_fn", "pass_fds", "shell", "gid", "gids", "uid", "startupinfo")
"""Arguments of Popen that a forkserver does not support."""
_ELSEWHERE = ["ip", "netns", "exec"]
"""Words before a namespace and a program. A fork enters the namespace itself, so no process is needed in between."""
_TRACKER = "multiprocessing.resource_tracker"
"""Module of multiprocessing's tracker, which starts cold: it is small, and lives as long as its starter."""
_READ_AT_START = ("PYTHON", "LD_", "OMP_", "MKL_", "KMP_", "CUDA_")
"""Prefixes of variables that an interpreter, or a library in it, reads once: with a changed one, a process starts cold.
Triton's are not among them, because no fork has loaded it."""
_MAY_DIFFER = (NUM_THREADS, "OMP_WAIT_POLICY", SEARCHED)
"""Variables of these that may differ all the same. A fork tells torch the number of threads, has no threads yet that
could wait in one way or another, and looks for modules that are not loaded yet where its own PYTHONPATH says."""


class WarmStarts:
    """A switch that makes programs start from a forkserver while it is on: the Python programs of `subprocess.Popen`,
    and so of asyncio, and the processes of multiprocessing and its own forkserver."""

    def __init__(self, connection: socket.socket | None = None) -> None:
        """`connection` leads to the forkserver of this process. Without it, one starts at the first switching on."""
        self._is_on = connection is not None
        self._connection = connection
        self._environment = dict(os.environ)
        """Environment with which the forkserver was started."""
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._cold = subprocess.Popen._execute_child  # type: ignore[attr-defined]
        self._signature = inspect.signature(self._cold)
        self._cold_spawn = multiprocessing.util.spawnv_passfds

    @staticmethod
    def of_this_process() -> "WarmStarts":
        """Return the installed object, as there is one in a program that was started warm itself; otherwise a new one,
        which is not installed."""
        installed: WarmStarts | None = getattr(subprocess.Popen._execute_child, "warm_starts", None)  # type: ignore[attr-defined]
        return installed or WarmStarts()

    def install(self) -> None:
        """Replace the functions that start processes, for the life of this process."""
        warm = self

        def execute_child(popen: Any, *arguments: Any) -> None:
            given = warm._signature.bind(popen, *arguments).arguments
            program = warm._program_of(given)
            if program is None:
                warm._cold(popen, *arguments)
            else:
                warm._start(popen, program, given)

        execute_child.warm_starts = self  # type: ignore[attr-defined]
        subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]

        def spawn(path: Any, arguments: Sequence[Any], passed: Sequence[Any]) -> int:
            needs_torch = not any(_TRACKER in os.fsdecode(word) for word in arguments)
            program = warm._program(arguments, passed=passed) if needs_torch else None
            return warm._cold_spawn(path, arguments, passed) if program is None else warm._ask(program, [0, 1, 2])

        multiprocessing.util.spawnv_passfds = spawn  # type: ignore[assignment]

    def switch(self, is_on: bool) -> None:
        """Switch warm starts on or off. They need Linux: on other systems all programs start cold."""
        if is_on and self._connection is None and sys.platform == "linux":
            self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fd, self._environment = theirs.fileno(), dict(os.environ)
            self._server = subprocess.Popen(server_command(fd), pass_fds=[fd], stdin=subprocess.DEVNULL)
            theirs.close()
            assert self._connection.recv(64) == b"ready", "the forkserver has not begun"
        self._is_on = is_on and self._connection is not None

    def close(self) -> None:
        self._is_on = False
        if self._connection is not None:
            self._connection.close()
        if self._server is not None:
            self._server.wait(60)

    def _program_of(self, given: Mapping[str, Any]) -> Program | None:
        """Return the program for Popen's arguments; None if it has to start cold."""
        if isinstance(given["args"], str | bytes | os.PathLike) or any(given[name] for name in _ONLY_COLD):
            return None
        return self._program(given["args"], given["env"], given["cwd"], given["start_new_session"])

    def _program(
        self,
        command: Sequence[Any],
        env: Mapping[Any, Any] | None = None,
        folder: Any = None,
        new_session: bool = False,
        passed: Sequence[int] = (),
    ) -> Program | None:
        """Return the program for a command; None if only a cold start does what is asked for."""
        if not self._is_on:
            return None
        words = list(map(os.fsdecode, command))
        namespace = words[3] if words[:3] == _ELSEWHERE else ""
        interpreter, *arguments = words[4 if namespace else 0 :]
        options = list(takewhile((UNBUFFERED, SAFE_PATH).__contains__, arguments))
        arguments = arguments[len(options) :]
        what = arguments[0] if arguments and interpreter == sys.executable else "-"
        environment = dict(os.environ if env is None else env)
        is_another = _read_once(environment) != _read_once(self._environment)
        if is_another or (what[0] == "-" and what not in ("-m", "-c")):
            return None
        place = os.path.abspath(os.fsdecode(folder or "."))
        return Program(options, arguments, place, environment, new_session, namespace, sorted(passed))

    def _start(self, popen: Any, program: Program, given: Mapping[str, Any]) -> None:
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        popen.pid = self._ask(program, [own if end == -1 else end for own, end in enumerate(ends)])
        popen._child_created = True
        popen._close_pipe_fds(*(given[name] for name in _PIPES))

    def _ask(self, program: Program, streams: list[int]) -> int:
        assert self._connection is not None
        with self._lock, _adopting():
            return ask(self._connection, program, streams)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Make this process the parent of what its descendants leave behind, within the context, which lasts no longer than
    a fork takes."""
    _set_subreaper(True)
    try:
        yield
    finally:
        _set_subreaper(False)


def _set_subreaper(is_one: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(is_one), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _read_once(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in _MAY_DIFFER
    }
