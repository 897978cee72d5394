"""Rank 0's view of the process of another rank, which it has started. See worker_protocol.py."""

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from hbserve_core.errors import RankFailed
from hbserve_core.ranks.worker_protocol import END_TIMEOUT_S, RankReport, RankSettings, RankState
from hbserve_rpc.own_process import signal_name

START_TIMEOUT_S = 120.0
"""Longest time until its first report, before which it imports torch."""
LOADING_SILENCE_S = 60.0
"""Longest silence while it loads: a library may keep the interpreter to itself for a while."""
SILENCE_S = 2.0
"""Longest silence while it serves; it is never silent for that long."""
GRACE_S = 1.0
"""Additional time after that silence until the rank counts as lost. If all processes were stopped together, each of
them wakes to the silence of the others; a rank that is not lost is heard within this time."""
_EXIT_STATUS_TIMEOUT_S = 1.0
_STATES: tuple[RankState, ...] = ("joining", "loading", "ready")


@dataclass(frozen=True)
class ExitCause:
    """Cause of a rank's end."""

    cause: str
    is_consequence: bool = False
    """Whether it ended because another rank had."""


class WorkerProcess:
    """Process of a rank, which a thread listens to until it has ended or is lost."""

    def __init__(self, settings: RankSettings, on_end: Callable[[ExitCause], None]) -> None:
        """Start the process. on_end: called once, in the listening thread, unless `close` has ended the process."""
        threads = str(settings.config.num_threads)
        self._popen = subprocess.Popen(
            # -P: files in the current folder must not be imported as libraries.
            [sys.executable, "-P", "-m", "hbserve_core.ranks.worker_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if sys.__stderr__ is not None else subprocess.DEVNULL,
            # Ctrl-C is meant for rank 0, which then ends the others.
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            bufsize=0,
        )
        self._name = f"rank {settings.rank} of {settings.config.tensor_parallel_size} (pid {self._popen.pid})"
        self._on_end = on_end
        self._state: RankState | None = None
        self.transfer_address = ""
        """Address at which it serves the transfers of its pool, once it is ready; "" if it has none."""
        self._changed = threading.Condition()
        self._closing = self._lost = False
        self._settings = settings
        self._thread = threading.Thread(target=self._listen, name=f"rank-{settings.rank}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send_settings(self) -> None:
        """Let the rank begin. Raises RankFailed if it has already ended."""
        self._write(msgspec.json.encode(self._settings) + b"\n")

    def send(self, message: bytes) -> None:
        """Send a message. Raises RankFailed if the rank no longer reads."""
        self._write(len(message).to_bytes(4, "big") + message)

    def _write(self, data: bytes) -> None:
        assert self._popen.stdin is not None
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._popen.stdin.write(rest) :]
        except (OSError, ValueError) as error:  # ValueError: closed
            raise RankFailed(f"{self._name} no longer listens: {error}") from error

    def wait_for(self, state: RankState, timeout_s: float) -> None:
        """Wait until the rank has reached `state`.

        Raises:
            RankFailed: the rank has ended, or was too slow.
        """
        wanted = _STATES[_STATES.index(state) :]
        with self._changed:
            there = self._changed.wait_for(lambda: self._state in wanted or self._lost, timeout_s)
            if self._lost:
                raise RankFailed(f"{self._name} is lost")
            if not there:
                raise RankFailed(f"{self._name} is not {state} after {timeout_s:.0f} s")

    def kill(self) -> None:
        """End the process at once, even if it is frozen. `on_end` is called."""
        self._popen.kill()

    def begin_close(self) -> None:
        """Ask the rank to end; call `close` next."""
        self._closing = True
        with contextlib.suppress(OSError):
            assert self._popen.stdin is not None
            self._popen.stdin.close()

    def close(self) -> None:
        """End the process, by force if it takes long, and leave nothing of it behind."""
        self.begin_close()
        try:
            self._popen.wait(END_TIMEOUT_S + 1)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._thread.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    # ---- in the thread -------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        exit_cause = self._follow_reports()
        with self._changed:
            self._lost = True
            self._changed.notify_all()
        if not self._closing:
            self._on_end(exit_cause)

    def _follow_reports(self) -> ExitCause:
        assert self._popen.stdout is not None
        fd, unfinished, begin_s = self._popen.stdout.fileno(), b"", time.monotonic()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while poll.poll(1e3 * self._most_silence_s()) or poll.poll(1e3 * GRACE_S):
            if not (data := os.read(fd, 1 << 16)):
                return ExitCause(f"{self._name} {self._exit_status()}")
            *lines, unfinished = (unfinished + data).split(b"\n")
            for line in lines:
                report = msgspec.json.decode(line, type=RankReport)
                if report.state == "failed":
                    return ExitCause(f"{self._name} failed: {report.error}", report.is_consequence)
                with self._changed:
                    self._state, self.transfer_address = report.state, report.transfer_address
                    self._changed.notify_all()
        if self._state is None:
            return ExitCause(f"{self._name} has not begun within {time.monotonic() - begin_s:.0f} s")
        return ExitCause(f"{self._name} is frozen: it has said nothing for {self._most_silence_s() + GRACE_S:.0f} s")

    def _most_silence_s(self) -> float:
        if self._state is None:
            return START_TIMEOUT_S
        return SILENCE_S if self._state == "ready" else LOADING_SILENCE_S

    def _exit_status(self) -> str:
        try:
            status = self._popen.wait(_EXIT_STATUS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "has ended"
        return f"was ended by {signal_name(-status)}" if status < 0 else f"ended with exit status {status}"
