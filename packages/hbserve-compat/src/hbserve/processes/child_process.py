"""A program of this workspace as a child process: its settings, its address, its log, its restarts and its end."""

import asyncio
import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from hbserve_rpc.own_process import signal_name
from hbserve_scheduler import InstanceFailed

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""How long a process may take to bind its address; it imports torch before that."""
STOP_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 5.0
"""How long a process may take to end if there is no event loop to wait in."""
MOST_RESTARTS = 5
"""Most restarts in a row, each after a life shorter than STEADY_S."""
FIRST_RESTART_S, LONGEST_RESTART_S = 0.5, 30.0
"""Bounds of the pause before a restart: it doubles from the first to the longest."""
STEADY_S = 60.0
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) ([\w.]+): (.*)", re.DOTALL)
"""A line of the log, in the format in which every process of this workspace writes it to stderr."""
OF_EVERY_START = re.compile(
    r"WARNING: Logging before InitGoogleLogging\(\) is written to STDERR|E\d{4} .*\] Local segment descriptor not found"
)
"""Lines that Mooncake (0.3.13) writes whenever one of its engines is made; users take them for a cause of failures."""


class Restarts:
    """The policy by which a dead process is started again: after ever longer pauses, and only so often in a row."""

    def __init__(self) -> None:
        self.are_wanted = True
        """Whether the process is started again when it dies; if not, its death is only reported."""
        self.number = 0
        """Number of restarts in a row."""
        self._began_s = time.monotonic()

    def began(self) -> None:
        """Note that the process has been started."""
        self._began_s = time.monotonic()

    def pause_s(self) -> float | None:
        """Count a restart, and return the pause before it. None: the process has died too often."""
        if time.monotonic() - self._began_s >= STEADY_S:
            self.number = 0
        if self.number >= MOST_RESTARTS:
            return None
        self.number += 1
        return float(min(FIRST_RESTART_S * 2 ** (self.number - 1), LONGEST_RESTART_S))


class ChildProcess:
    """A program of this workspace that this process starts and ends. May be started again after its death.

    The program reads its settings from stdin, as one line of JSON, writes the address at which it serves to stdout, in
    another one, and ends by SIGTERM or when stdin ends.
    """

    waits_for = "its process starts"

    def __init__(
        self,
        name: str,
        module: str,
        settings: Callable[[], bytes],
        environment: Mapping[str, str],
        on_death: Callable[[str, str], None],
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start nothing yet. `settings` returns JSON without a line break, and is called at each start; `pass_fds` are
        file descriptors that the program inherits, under the same numbers."""
        self.name = name
        self.address = ""
        self.restarts = Restarts()
        self._module = module
        self._settings = settings
        self._environment = environment
        self._on_death = on_death
        self._start_timeout_s = start_timeout_s
        self._pass_fds = pass_fds
        self._last_lines: deque[str] = deque(maxlen=5)
        self._process: asyncio.subprocess.Process | None = None
        self._killing: weakref.finalize[Any, Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        """Start the process and wait until it serves.

        Raises:
            InstanceFailed: the system makes no process, or the process ended (has its last words), or was too slow.
        """
        self.restarts.began()
        self._last_lines.clear()
        if self._killing is not None:  # the finalizer of its previous life
            self._killing.detach()
        try:
            self._process = await self._launch()
        except OSError as error:  # too many processes or files, or no memory: a later try may succeed
            raise InstanceFailed(f"{self.name} did not start: {error}") from error
        # For when `stop` is not called: the object is collected, its event loop has ended, or the interpreter ends.
        self._killing = weakref.finalize(self, _end_unattended, self._process, os.getpid())
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._tasks = [asyncio.create_task(self._pass_stderr_on())]
        stdin.write(self._settings() + b"\n")
        self.address = await self._read_address(stdout)
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _launch(self) -> asyncio.subprocess.Process:
        # -P: else a file in the current folder, such as random.py, would be imported instead of a library.
        command = [sys.executable, "-P", "-m", self._module]
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Ctrl-C reaches only this process, which ends its children in order. They also end when their stdin does.
            start_new_session=True,
            env=self._environment,
            pass_fds=self._pass_fds,
        )

    async def _read_address(self, stdout: asyncio.StreamReader) -> str:
        assert self._process is not None
        line = b""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                line = await stdout.readline()
                if line:
                    return str(json.loads(line)["address"])
                status = await self._process.wait()
                await asyncio.gather(*self._tasks)
            problem = f"did not start: {self._why(status)}"
        except TimeoutError:
            problem = f"did not serve within {self._start_timeout_s:.0f} s"
        except (ValueError, KeyError, TypeError):
            problem = f"began with {line!r} instead of its address"
        _send(self._process, signal.SIGKILL)
        await self._process.wait()
        raise InstanceFailed(f"{self.name} {problem}")

    async def stop(self) -> None:
        """End the process by SIGTERM, and by SIGKILL if it is too slow or this is cancelled. Leaves nothing behind."""
        self._stopping = True
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()  # a second request, for one that got SIGTERM before and takes its time
            _send(self._process, signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                logger.warning("%s did not end within %.0f s; killed", self.name, STOP_TIMEOUT_S)
                _send(self._process, signal.SIGKILL)
                await self._process.wait()
            except BaseException:
                _send(self._process, signal.SIGKILL)
                raise
            if self._killing is not None:
                self._killing.detach()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self) -> None:
        """Send SIGTERM, and wait, however long, until the process has ended by itself."""
        self._stopping = True
        if self._process is not None:
            _send(self._process, signal.SIGTERM)
            await self._process.wait()

    def kill(self) -> None:
        """Do as `stop` when the process's event loop does not run any more."""
        if self._killing is not None:
            self._killing()

    @property
    def pid(self) -> int | None:
        """Process id; None: the process was not started."""
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
                continue  # says why the process ends; whoever is told of its end is told that too
            self._tell(text)

    def _tell(self, text: str) -> None:
        """Pass a line of the child's stderr on. A log line goes through the logging of this process, with its format
        and levels; a known meaningless line too, at level DEBUG; any other, such as a traceback's, goes to stderr."""
        if (found := LOG_LINE.fullmatch(text)) is not None:
            level, name, message = found.groups()
            message = message.removeprefix(f"{self.name}: ")  # the name is added below
            logging.getLogger(name).log(logging.getLevelNamesMapping()[level], "[%s] %s", self.name, message)
        elif OF_EVERY_START.fullmatch(text):
            logger.debug("[%s] %s", self.name, text)
        else:
            # There may be no stderr, or no reader of it. We must read on, else the child blocks on a full pipe.
            with contextlib.suppress(Exception):
                sys.stderr.write(f"[{self.name}] {text}\n")

    async def _watch(self) -> None:
        assert self._process is not None
        status = await self._process.wait()
        if not self._stopping:
            await asyncio.gather(self._tasks[0])
            self._on_death(self.name, f"its process has ended ({self._why(status)})")

    def _why(self, status: int) -> str:
        if status == -signal.SIGKILL:  # the process could not say why: its last lines are about something else
            return "signal SIGKILL, from somebody or from the system when memory ran out"
        how = f"signal {signal_name(-status)}" if status < 0 else f"exit status {status}"
        most, _ = resource.getrlimit(resource.RLIMIT_AS)  # the child inherits it; torch alone needs some GiB
        limit = "" if most == resource.RLIM_INFINITY else f" (`ulimit -v` leaves it {most / 2**30:.1f} GiB)"
        return f"{how}: {self._last_lines[-1]}{limit}" if self._last_lines else f"{how}{limit}"


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        process.send_signal(number)


def kill_children(pids: Sequence[int]) -> None:
    """End child processes without an event loop. Those that have ended, or are not our children, are skipped."""
    for number, timeout_s in ((signal.SIGTERM, KILL_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
        for pid in filter(_is_running, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline_s = time.monotonic() + timeout_s
        while any(map(_is_running, pids)) and time.monotonic() < deadline_s:
            time.sleep(0.01)


def _end_unattended(process: asyncio.subprocess.Process, parent: int) -> None:
    if os.getpid() != parent:  # in a fork, whose event loop shares its selector with the parent's: touch nothing
        return
    kill_children([process.pid])
    transport: Any = process._transport  # type: ignore[attr-defined]
    try:
        transport.close()
    except RuntimeError:  # the loop has ended, which would close the pipes in a later iteration, and reap the process
        for pipe in map(transport.get_pipe_transport, range(3)):
            if not pipe.get_extra_info("pipe").closed:
                with contextlib.suppress(RuntimeError):  # it also calls the ended loop
                    pipe._call_connection_lost(None)
        transport.get_extra_info("subprocess").poll()


def _is_running(pid: int) -> bool:
    """Whether this is a child of this process that has not ended. Does not reap it: others may wait for its end."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


class Startable(Protocol):
    """What ChildProcesses needs of a process, here or on another host. ChildProcess describes the members."""

    name: str
    address: str
    """Address at which the process serves; empty until it has been started."""
    restarts: Restarts
    waits_for: str
    """What a start that is under way waits for, in words."""

    @property
    def pid(self) -> int | None: ...

    async def start(self) -> None: ...

    async def drain(self) -> None: ...

    async def stop(self) -> None: ...

    def kill(self) -> None: ...


P = TypeVar("P", bound=Startable)


class ChildProcesses(Generic[P]):
    """All processes of one kind. Those that die after `restart_the_dead` was called are started again."""

    def __init__(
        self, make: Iterable[Callable[[Callable[[str, str], None]], P]], on_death: Callable[[str, str], None]
    ) -> None:
        """`make` has a function for each process, which makes it, given the callback for its death. `on_death` is
        called with the name of one that has died, and why, also if it is started again.
        """
        self.processes = [each(self._died) for each in make]
        """The processes, which may also be started and stopped one by one: see `remove`."""
        self._on_death = on_death
        self._on_given_up: Callable[[str, str], None] | None = None
        self._on_restart: Callable[[P], Awaitable[None]] | None = None
        self._restarting: dict[str, asyncio.Task[None]] = {}

    def restart_the_dead(
        self,
        on_given_up: Callable[[str, str], None],
        on_restart: Callable[[P], Awaitable[None]] | None = None,
    ) -> None:
        """Restart processes that die from now on, once they have served. Until then, a death is only reported.

        on_given_up: called, like `on_death`, when one dies again and again, and is not started any more.
        on_restart: called with one that was started again, perhaps at another address.
        """
        self._on_given_up = on_given_up
        self._on_restart = on_restart

    def _died(self, name: str, why: str) -> None:
        self._on_death(name, why)
        process = next(each for each in self.processes if each.name == name)
        if self._on_given_up is not None and process.restarts.are_wanted:
            self._restarting[name] = task = asyncio.create_task(self._restart(process, why, self._on_given_up))
            task.add_done_callback(lambda _: self._restarting.pop(name, None))

    async def _restart(self, process: P, why: str, on_given_up: Callable[[str, str], None]) -> None:
        name = process.name
        while (pause_s := process.restarts.pause_s()) is not None:
            number = f"restart {process.restarts.number} of at most {MOST_RESTARTS} in a row"
            logger.warning("%s: %s; %s, in %.1f s", name, why, number, pause_s)
            await asyncio.sleep(pause_s)
            try:
                await process.start()
            except InstanceFailed as error:
                why = str(error)
            else:
                logger.warning("%s was started again", name)
                if self._on_restart is not None:
                    await self._on_restart(process)
                return
        on_given_up(name, f"{why}; it was started {MOST_RESTARTS} times again, and is given up")

    async def start(self) -> None:
        """Start all at the same time. Raises InstanceFailed; `stop` must be called after that too."""
        results = await asyncio.gather(*(process.start() for process in self.processes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def drain(self) -> None:
        """Tell all processes to end, and wait until they have ended by themselves."""
        self._on_given_up = None
        await self._end_restarts(list(self._restarting))
        await asyncio.gather(*(process.drain() for process in self.processes))

    async def stop(self) -> None:
        self._on_given_up = None
        await self._end_restarts(list(self._restarting))
        await asyncio.gather(*(process.stop() for process in self.processes))

    async def let_go(self, process: P) -> None:
        """Do not start a process again, whether it has died already or dies later."""
        process.restarts.are_wanted = False
        await self._end_restarts([process.name])

    async def remove(self, process: P) -> None:
        """Stop a process, and forget it."""
        await self.let_go(process)
        await process.stop()
        self.processes.remove(process)

    async def _end_restarts(self, names: Iterable[str]) -> None:
        restarting = [self._restarting[name] for name in names if name in self._restarting]
        for task in restarting:
            task.cancel()
        await asyncio.gather(*restarting, return_exceptions=True)

    def kill(self) -> None:
        """Do as `stop` when the event loop that started them does not run any more. Waits for their end."""
        kill_children([process.pid for process in self.processes if process.pid is not None])
        for process in self.processes:
            process.kill()
