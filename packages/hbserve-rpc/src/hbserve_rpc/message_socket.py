"""A ZeroMQ socket in an event loop: sending never waits, and what comes is handed to a function.

pyzmq's own `zmq.asyncio` makes futures for both, and a turn of the loop for each: half of the time of a round trip.
"""

import asyncio
import logging
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from hbserve_rpc import wire

MESSAGES_PER_TURN = 64
"""Others of the event loop have their turn after so many."""
COPIED_BYTES = 64 << 10
"""Longer bodies are handed to ZeroMQ as they are."""
COMPLAINT_PAUSE_S = 10.0
"""What anybody can send makes no more than a line in so long."""
LAST_WORDS_MS = 50
"""How long the end of a socket waits at most for what was sent last to leave, over connections that are there."""


class MessageSocket:
    """One socket with a context, and so a thread for its I/O, of its own. Belongs to the loop that ran `open`."""

    _sockets: "list[zmq.Socket[bytes]]"
    """It, and its monitor: all must be closed before the context ends."""

    def __init__(
        self, kind: int, options: Mapping[int, int | bytes], on_message: Callable[[list[bytes]], None]
    ) -> None:
        self._kind = kind
        # Whoever sends may not wait, not beyond a deadline and not for a peer that is frozen: see `send`.
        self._options = {zmq.LINGER: 0, zmq.SNDHWM: 0, zmq.MAXMSGSIZE: wire.MOST_FRAME_BYTES, **options}
        self._on_message = on_message
        self._socket: zmq.Socket[bytes]
        self._monitor: zmq.Socket[bytes] | None = None
        self._end: weakref.finalize[..., MessageSocket] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._again: asyncio.Handle | None = None
        self._is_reading = False

    @property
    def is_open(self) -> bool:
        return self._end is not None and self._end.alive

    def open(
        self, attach: Callable[["zmq.Socket[bytes]"], object], options: Mapping[int, int | bytes] | None = None
    ) -> None:
        """`attach` connects or binds it, with further options; what that raises closes it again."""
        self._loop = asyncio.get_running_loop()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = context.socket(self._kind)
        # Also for one that is collected unclosed, as after a test that failed: Python may then end the context before
        # the socket, and that waits for the socket for ever, in whatever thread it was.
        self._sockets = [self._socket]
        self._end = weakref.finalize(self, _end, context, self._sockets)
        self._end.atexit = False
        try:
            for option, value in (self._options | dict(options or {})).items():
                self._socket.setsockopt(option, value)
            attach(self._socket)
            self._loop.add_reader(self._socket.FD, self._read)
            self._is_reading = True
        except BaseException:
            self.close()
            raise

    def watch(self, on_connection: Callable[[bool], None]) -> None:
        """Tell whenever a connection is there, and whenever it has ended; of a socket that connects to one peer. After
        `open`, in the same turn of the loop: nothing is missed then."""
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._sockets.append(self._monitor)
        self._loop.add_reader(self._monitor.FD, self._read_events, on_connection)
        self._loop.call_soon(self._read_events, on_connection)  # else the descriptor may never tell: see `_look_again`

    def _read_events(self, on_connection: Callable[[bool], None]) -> None:
        while self._is_reading and self._monitor is not None and _has_message(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            on_connection(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def say_last(self, frames: Sequence[bytes]) -> None:
        """Send something before `close`, which waits a moment for it. Only to who is connected: no other hears it."""
        self._socket.setsockopt(zmq.LINGER, LAST_WORDS_MS)
        self.send(frames)

    def stop_reading(self) -> None:
        """What comes from now on is handed to nobody. What was sent has until `close` to leave."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket.FD)
            if self._monitor is not None:
                self._loop.remove_reader(self._monitor.FD)
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def close(self) -> None:
        """At once: what has not left yet does not. May be called twice."""
        self.stop_reading()
        if self._end is not None:
            self._end()

    def send(self, frames: Sequence[bytes]) -> int:
        """Queue a message without waiting. Returns 0, or why it was not queued.

        EAGAIN: the queue to its receiver is full, which it never is without SNDHWM. EHOSTUNREACH: its receiver is not
        connected, which only a ROUTER with ROUTER_MANDATORY says; others drop it.
        """
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames[-1]) < COPIED_BYTES)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return error.errno
        finally:
            self._look_again()
        return 0

    def _look_again(self) -> None:
        """The descriptor tells of a message once, and any call, not only one that reads, takes that away."""
        if self._is_reading and self._again is None and _has_message(self._socket):
            self._again = self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._again = None
        try:
            for _ in range(MESSAGES_PER_TURN):
                if not self._is_reading or not _has_message(self._socket):
                    return
                self._on_message(self._socket.recv_multipart(zmq.NOBLOCK))
        finally:
            self._look_again()


def _has_message(socket: "zmq.Socket[bytes]") -> bool:
    events: Any = socket.EVENTS  # an int, which the stubs do not say
    return bool(events & zmq.POLLIN)


def _end(context: "zmq.Context[zmq.Socket[bytes]]", sockets: "Sequence[zmq.Socket[bytes]]") -> None:
    for socket in sockets:
        socket.close()
    context.term()


class Complaints:
    """Lines in a log of what may happen as often as somebody likes: the first at once, then few, with their number."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said_s = -math.inf
        self._num_unsaid = 0

    def add(self, text: str, *arguments: object) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < COMPLAINT_PAUSE_S:
            self._num_unsaid += 1
            return
        more = f" ({self._num_unsaid} more such lines since the last one)" if self._num_unsaid else ""
        self._said_s, self._num_unsaid = now_s, 0
        self._logger.warning(text + more, *arguments)
