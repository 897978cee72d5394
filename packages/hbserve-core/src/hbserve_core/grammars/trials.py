"""Trials of grammars in a separate process, where one that takes too long can be ended. A thread cannot be.

The process is started for the first grammar, reads the tokenizer, and forks once for each trial. So trials do not wait
for each other, and one that is killed, or overflows its stack, affects nothing else. The process ends with this one,
however this one ends: the socket between them closes.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence as Ids
from pathlib import Path

import msgspec

from hbserve_rpc import Overloaded, StructuredOutputsParams

CPU_LIMIT_S = 1.0
"""Processor time that one grammar may take to be compiled and for its first mask. Usual grammars take 1 to 20 ms, and
an object of 2500 properties 0.4 s. It is not elapsed time, so a busy machine refuses no more than another."""
BEGUN, ENDED = b"b", b"e"
"""Messages that a trial sends."""
_PATIENCE_S = 60.0
"""Longest wait for a trial, including the start of the process. Only a frozen process takes longer."""


class TrialSettings(msgspec.Struct, frozen=True):
    """Settings that the process is started with."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]
    cpu_limit_s: float


class Trials:
    """Client of the trial process. Its methods may be called from any thread, and block it. The process ends when
    nothing refers to this object any more."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Ids[int]) -> None:
        """tokenizer: path of a tokenizer.json that can be read."""
        self._settings = TrialSettings(str(tokenizer), vocab_size, list(eos_token_ids), CPU_LIMIT_S)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._end: weakref.finalize[..., Trials] | None = None

    def problem_of(self, wanted: StructuredOutputsParams) -> str:
        """Return why a grammar must not be compiled here, which is that it takes too long, or "" if it compiles in time
        or is found invalid in time.

        Raises Overloaded if the result is unknown because the process has ended twice. Another request may succeed.
        """
        for _ in range(2):
            said = self._try(wanted)
            if said == BEGUN:
                limit_s = self._settings.cpu_limit_s
                return f"structured_outputs.{wanted.kind}: takes more than {limit_s:g} s to compile"
            if said:
                return ""
        raise Overloaded("structured_outputs: the process that tests grammars has ended")

    def _try(self, wanted: StructuredOutputsParams) -> bytes:
        """Run a trial and return what it sent before it ended: nothing if the process has ended before the trial
        began."""
        own, theirs = socket.socketpair()
        with own:
            with theirs:
                process = self._hand_over(theirs)
            own.settimeout(_PATIENCE_S)
            said = b""
            with contextlib.suppress(OSError):  # a timeout, or the other end is gone
                own.sendall(msgspec.msgpack.encode(wanted))
                own.shutdown(socket.SHUT_WR)
                while len(said) < 2 and (more := own.recv(2)):
                    said += more
        if not said:
            self._give_up(process)
        return said

    def _hand_over(self, trial: socket.socket) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            assert self._connection is not None
            with contextlib.suppress(OSError):  # the process has just ended, which will be noticed
                socket.send_fds(self._connection, [BEGUN], [trial.fileno()])
            return self._process

    def _start(self) -> None:
        if self._end is not None:
            self._end()
        settings = msgspec.json.encode(self._settings).decode()
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: files in the current folder must not be imported as libraries.
                [sys.executable, "-P", "-m", "hbserve_core.grammars.trials_main", settings],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=None if sys.__stderr__ is not None else subprocess.DEVNULL,
                start_new_session=True,  # it kills its own group; Ctrl-C is meant for this process
            )
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def _give_up(self, process: "subprocess.Popen[bytes]") -> None:
        with self._lock:
            if process is self._process and self._end is not None:
                self._end()


def _end(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    connection.close()
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
