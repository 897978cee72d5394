"""The log of HBServe's own processes: lines on stderr, which wait for nobody who reads them."""

import logging
import os
import select
import sys
from collections import deque
from typing import TextIO

PIECE_BYTES = 4096
"""What a pipe that is writable at all takes without waiting; Linux guarantees it, and so much for a terminal too."""
MOST_PIECES = 2000
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: str, line: str = LINE) -> None:
    """To be called once, by the process that has this stderr. `line`: as logging formats it. Where logging is set up
    already, it stays."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=level, format=line, handlers=[UnblockedHandler(sys.stderr)])


class UnblockedHandler(logging.StreamHandler[TextIO]):
    """Writes lines when they can be written, and keeps some until then.

    Ctrl-S in a terminal, a pager, or a collector of logs that hangs would otherwise stop the event loop at its next
    line, and so every answer; and the heartbeats, so that other processes give up this one.
    """

    def __init__(self, stream: TextIO) -> None:
        """stream: one of a descriptor."""
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
        if self._num_lost:  # nor could this one
            self._num_lost = num_lost

    def flush(self) -> None:
        """Of what waits, what can be written now."""
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
            except BlockingIOError:  # whoever shares it has made it so
                num_written = 0
            except OSError:  # there is no reader any more, nor room on the disk
                self._num_lost += 1 + len(self._pieces)
                self._pieces.clear()
                return
            if num_written < len(piece):
                self._pieces.appendleft(piece[num_written:])
                return
