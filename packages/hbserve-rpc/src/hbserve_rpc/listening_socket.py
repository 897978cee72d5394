"""A listening HTTP socket that refuses connections when the process may open no more files."""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from typing import Any

from hbserve_rpc.own_process import NO_FILE_LEFT

logger = logging.getLogger(__name__)

FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
FULL_TOLD_S = 30.0
"""Shortest time between two log lines about refused connections."""
LINGER_S = 2.0
"""Longest time that a refused client may go on sending."""
_MOST_HEAD_BYTES = 1 << 20


class ListeningSocket(socket.socket):
    """Listening socket that refuses connections for which there are not enough files. asyncio would fail to accept
    them, thousands of times a second with many clients, and log a traceback each time; the clients would wait."""

    def __init__(self, bound: socket.socket | int, *, is_plain: bool = True, files_left: int = 0) -> None:
        """Take over a socket, or its descriptor.

        is_plain: whether a refused client can be told so by unencrypted HTTP; otherwise its connection is just closed.
        files_left: number of files, of those that the process may open, that stay reserved for everything else than
            this socket's connections.
        """
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        super().__init__(fileno=bound if isinstance(bound, int) else bound.detach())
        self._is_plain = is_plain
        self._files_left = files_left
        self._told_s = -FULL_TOLD_S
        self._leaving: dict[socket.socket, asyncio.TimerHandle] = {}
        """Timers of refused connections whose clients may still be sending."""

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno not in NO_FILE_LEFT or self._spare is None:
                raise
            self._close_spare()  # which frees a descriptor for the connection that is to be refused
            connection, _ = super().accept()
            self._refuse(connection)
            connection.close()
            with contextlib.suppress(OSError):  # another thread was quicker: then asyncio logs the next failure
                self._spare = os.open(os.devnull, os.O_RDONLY)
        else:
            most = self._most_files()
            # The system gives the lowest free number, so the number says how many files are open.
            if most == resource.RLIM_INFINITY or connection.fileno() < most - self._files_left:
                return connection, address
            self._refuse(connection)
            self._linger(connection)
        raise BlockingIOError

    def close(self) -> None:
        self._close_spare()
        for each in list(self._leaving):
            self._leave(each)
        super().close()

    @staticmethod
    def _most_files() -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def _close_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _refuse(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            if self._is_plain:
                connection.send(FULL)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(_MOST_HEAD_BYTES)  # unread data would reset the connection before the answer is read
        if time.monotonic() - self._told_s >= FULL_TOLD_S:
            self._told_s = time.monotonic()
            logger.warning("connections are refused: this process may open %d files (ulimit -n)", self._most_files())

    def _linger(self, connection: socket.socket) -> None:
        """Discard what the client sends until it has its answer. Otherwise that would reset the connection, too."""
        while len(self._leaving) >= max(1, self._files_left // 2):
            self._leave(next(iter(self._leaving)))
        loop = asyncio.get_running_loop()
        self._leaving[connection] = loop.call_later(LINGER_S, self._leave, connection)
        loop.add_reader(connection, self._read_on, connection)

    def _read_on(self, connection: socket.socket) -> None:
        is_open = False
        with contextlib.suppress(ConnectionError):
            is_open = bool(connection.recv(_MOST_HEAD_BYTES))
        if not is_open:
            self._leave(connection)

    def _leave(self, connection: socket.socket) -> None:
        if (timer := self._leaving.pop(connection, None)) is not None:
            timer.cancel()
            asyncio.get_running_loop().remove_reader(connection)
            connection.close()
