"""The log of HBServe's own processes: lines on stderr that never wait for their reader."""

import logging
import os
import select
import sys
from collections import deque
from typing import TextIO

PIECE_BYTES = 4096
"""Number of bytes that a writable pipe takes without waiting, as Linux guarantees, and a terminal as well."""
MOST_PIECES = 2000
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: str, line: str = LINE) -> None:
    """Log to stderr. To be called once, by the process that has this stderr. If logging is set up already, it stays as
    it is. line: a format of `logging`."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=level, format=line, handlers=[UnblockedHandler(sys.stderr)])


class UnblockedHandler(logging.StreamHandler[TextIO]):
    """Handler that writes lines when they can be written, and keeps some until then.

    Otherwise Ctrl-S in a terminal, a pager, or a log collector that hangs would stop the event loop at its next line,
    and so every answer; and also the heartbeats, so that other processes give this one up.
    """

    def __init__(self, stream: TextIO) -> None:
        """Make a handler for a stream that has a file descriptor."""
        super().__init__(stream)
        self._room = select.poll()
        self._room.register(stream.fileno(), select.POLLOUT)
        self._pieces: deque[bytes] = deque()
        self._num_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._write()
        if self._num_lost and not self._pieces:
            self._tell_lost()
        if len(self._pieces) < MOST_PIECES:
            self._keep(line)
        else:
            self._num_lost += 1
        self._write()

    def _tell_lost(self) -> None:
        num_lost, self._num_lost = self._num_lost, 0
        self._keep(f"{num_lost} lines of this log are lost: they could not be written")
        self._write()
        if self._num_lost:  # this line could not be written either
            self._num_lost = num_lost

    def flush(self) -> None:
        """Write as much of the waiting lines as can be written now."""
        self.acquire()
        try:
            self._write()
        finally:
            self.release()

    def _keep(self, line: str) -> None:
        content = f"{line}{self.terminator}".encode(errors="backslashreplace")
        self._pieces.extend(content[i : i + PIECE_BYTES] for i in range(0, len(content), PIECE_BYTES))

    def _write(self) -> None:
        while self._pieces and self._room.poll(0):
            piece = self._pieces.popleft()
            try:
                num_written = os.write(self.stream.fileno(), piece)
            except BlockingIOError:  # a process that shares the descriptor has made it non-blocking
                num_written = 0
            except OSError:  # there is no reader any more, or no room on the disk
                self._num_lost += 1 + len(self._pieces)
                self._pieces.clear()
                return
            if num_written < len(piece):
                self._pieces.appendleft(piece[num_written:])
                return
