"""A program of this workspace as a child process: its settings, its address, its words, its death and its end."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hbserve_scheduler import InstanceFailed

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Until a process has bound its address: it imports torch before."""
STOP_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 5.0
"""As STOP_TIMEOUT_S, where no event loop is there to wait in."""


class ChildProcess:
    """A program of this workspace that this process has started, and ends.

    It reads its settings from stdin, as one line of JSON, says in one on stdout at which address it serves, and ends by
    SIGTERM, or when stdin ends.
    """

    def __init__(
        self,
        name: str,
        module: str,
        settings: bytes,
        environment: Mapping[str, str],
        on_death: Callable[[str, str], None],
        *,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """`settings`: JSON, without a line break."""
        self.name = name
        self.address = ""
        self._module = module
        self._settings = settings
        self._environment = environment
        self._on_death = on_death
        self._start_timeout_s = start_timeout_s
        self._last_lines: deque[str] = deque(maxlen=5)
        self._process: asyncio.subprocess.Process | None = None
        self._killing: weakref.finalize[Any, Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        """Start it and wait until its address is bound.

        Raises:
            InstanceFailed: it ended first, with its own words, or was too slow.
        """
        self._process = await asyncio.create_subprocess_exec(
            # Not `-m` alone: a file of the caller's folder, random.py for example, would be imported as a library.
            sys.executable,
            "-P",
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # A Ctrl-C is for us; we end the children in order. They also end when their stdin does.
            start_new_session=True,
            env=self._environment,
        )
        # If nobody stops it: the object is collected, its event loop has ended, or the interpreter ends.
        self._killing = weakref.finalize(self, _end_unattended, self._process, os.getpid())
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._tasks.append(asyncio.create_task(self._pass_stderr_on()))
        stdin.write(self._settings + b"\n")
        try:
            async with asyncio.timeout(self._start_timeout_s):
                line = await stdout.readline()
        except TimeoutError:
            raise InstanceFailed(f"{self.name} does not serve within {self._start_timeout_s:.0f} s") from None
        if not line:
            await self._process.wait()
            await asyncio.gather(*self._tasks)
            raise InstanceFailed(f"{self.name} did not start: {self._why()}")
        try:
            self.address = json.loads(line)["address"]
        except (ValueError, KeyError):
            raise InstanceFailed(f"{self.name} began with {line!r} instead of its address") from None
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """End it: politely, then by force, at once if this is cancelled. Leaves nothing behind."""
        self._stopping = True
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()  # a second word for one that has heard SIGTERM before, and takes its time
            self._tell_to_end(self._process)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                logger.warning("%s did not end within %.0f s; killed", self.name, STOP_TIMEOUT_S)
                self._process.kill()
                await self._process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                raise
            if self._killing is not None:
                self._killing.detach()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self) -> None:
        """SIGTERM, and then time: wait until it has ended by itself."""
        self._stopping = True
        if self._process is not None:
            self._tell_to_end(self._process)
            await self._process.wait()

    @staticmethod
    def _tell_to_end(process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """`stop` where its event loop does not run any more."""
        if self._killing is not None:
            self._killing()

    @property
    def pid(self) -> int | None:
        """None: it was not started."""
        return None if self._process is None else self._process.pid

    async def _pass_stderr_on(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:  # longer than the reader's limit; the child must not block on a full pipe for it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            if text.startswith(f"{self.name}: "):
                continue  # why it ends, in its own words: whoever hears of the end hears that too
            _tell(f"[{self.name}] {text}\n")

    async def _watch(self) -> None:
        assert self._process is not None
        await self._process.wait()
        if not self._stopping:
            await asyncio.gather(self._tasks[0])
            self._on_death(self.name, f"its process has ended ({self._why()})")

    def _why(self) -> str:
        assert self._process is not None
        status = self._process.returncode or 0
        if status == -signal.SIGKILL:  # it could say nothing itself: its last words are about something else
            return "signal SIGKILL, from somebody or from the system when memory ran out"
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{how}: {self._last_lines[-1]}" if self._last_lines else how


def _tell(line: str) -> None:
    # There may be no stderr, its reader may be gone, or it is an object of the caller's, perhaps closed by now. Reading
    # goes on: a child must not block on a full pipe.
    with contextlib.suppress(Exception):
        sys.stderr.write(line)


def kill_children(pids: Sequence[int]) -> None:
    """End child processes without an event loop. One that has ended, or is another process's child, is passed over."""
    for number, timeout_s in ((signal.SIGTERM, KILL_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
        for pid in filter(_is_running, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline_s = time.monotonic() + timeout_s
        while any(map(_is_running, pids)) and time.monotonic() < deadline_s:
            time.sleep(0.01)


def _end_unattended(process: asyncio.subprocess.Process, parent: int) -> None:
    if os.getpid() != parent:  # a fork, whose event loop shares its selector with that of the parent: touch nothing
        return
    kill_children([process.pid])
    # asyncio cannot close the pipes by itself any more if its event loop has ended, and would say so.
    with contextlib.suppress(RuntimeError):
        process._transport.close()  # type: ignore[attr-defined]


def _is_running(pid: int) -> bool:
    """Whether it is a child of this process that has not ended. Whoever waits for its end is left to hear of it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
