"""Popen whose Python programs are forks of a forkserver: see forkserver.py."""

import contextlib
import ctypes
import inspect
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from hbserve_testing.forkserver import NUM_THREADS, SAFE_PATH, SEARCHED, UNBUFFERED, Program, ask, server_command

_PR_SET_CHILD_SUBREAPER = 36
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_ONLY_COLD = ("executable", "preexec_fn", "pass_fds", "shell", "gid", "gids", "uid", "startupinfo")
"""What of Popen's arguments a forkserver does not do."""
_ELSEWHERE = ["ip", "netns", "exec"]
"""Before a namespace and a program: it needs no process in between that would run it."""
_READ_AT_START = ("PYTHON", "LD_", "OMP_", "MKL_", "KMP_", "CUDA_")
"""Beginnings of variables that an interpreter, or a library in it, reads once: who changes one gets a cold process. Not
Triton's, which no fork has loaded."""
_MAY_DIFFER = (NUM_THREADS, "OMP_WAIT_POLICY", SEARCHED)
"""torch is told the number of threads, and a fork has none yet that could wait in one way or another; it looks for
modules that are not there yet where it is told to."""


class WarmStarts:
    """Makes `subprocess.Popen`, and so asyncio, start Python programs from a forkserver while `is_on`."""

    def __init__(self, connection: socket.socket | None = None) -> None:
        """`connection`: to the forkserver of this process. Without, it starts one when it is first switched on."""
        self._is_on = connection is not None
        self._connection = connection
        self._environment = dict(os.environ)
        """With which the forkserver was started."""
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._cold = subprocess.Popen._execute_child  # type: ignore[attr-defined]
        self._signature = inspect.signature(self._cold)

    @staticmethod
    def of_this_process() -> "WarmStarts":
        """Those that are installed, as in a program that was started warm itself; or else new ones, which are not."""
        installed: WarmStarts | None = getattr(subprocess.Popen._execute_child, "warm_starts", None)  # type: ignore[attr-defined]
        return installed or WarmStarts()

    def install(self) -> None:
        """For the life of this process."""
        warm = self

        def execute_child(popen: Any, *arguments: Any) -> None:
            given = warm._signature.bind(popen, *arguments).arguments
            program = warm._program(given) if warm._is_on else None
            if program is None:
                warm._cold(popen, *arguments)
            else:
                warm._start(popen, program, given)

        execute_child.warm_starts = self  # type: ignore[attr-defined]
        subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]

    def switch(self, is_on: bool) -> None:
        """Linux only: elsewhere all programs are cold."""
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

    def _program(self, given: Mapping[str, Any]) -> Program | None:
        """None: only a cold start can be what is asked for."""
        if isinstance(given["args"], str | bytes | os.PathLike) or any(given[name] for name in _ONLY_COLD):
            return None
        words = list(map(os.fsdecode, given["args"]))
        namespace = words[3] if words[:3] == _ELSEWHERE else ""
        interpreter, *arguments = words[4 if namespace else 0 :]
        options = list(takewhile((UNBUFFERED, SAFE_PATH).__contains__, arguments))
        arguments = arguments[len(options) :]
        what = arguments[0] if arguments and interpreter == sys.executable else "-"
        environment = dict(os.environ if given["env"] is None else given["env"])
        if (what[0] == "-" and what not in ("-m", "-c")) or _read_once(environment) != _read_once(self._environment):
            return None
        folder = os.path.abspath(os.fsdecode(given["cwd"] or "."))
        return Program(options, arguments, folder, environment, given["start_new_session"], namespace)

    def _start(self, popen: Any, program: Program, given: Mapping[str, Any]) -> None:
        assert self._connection is not None
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [own if end == -1 else end for own, end in enumerate(ends)]
        with self._lock, _adopting():
            popen.pid = ask(self._connection, program, streams)
        popen._child_created = True
        popen._close_pipe_fds(*(given[name] for name in _PIPES))


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """What a descendant of this process leaves behind becomes its child; no longer than a fork takes."""
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
