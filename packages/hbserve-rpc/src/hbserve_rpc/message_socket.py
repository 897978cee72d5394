"""A ZeroMQ socket in an event loop: sending never waits, and each message that arrives is passed to a function.

pyzmq's own `zmq.asyncio` makes futures for sending and receiving, and takes a turn of the event loop for each, which is
half of the time of a round trip.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from hbserve_rpc import wire
from hbserve_rpc.plain_values import one_line

MESSAGES_PER_TURN = 64
"""Number of messages after which the rest of the event loop has its turn."""
COPIED_BYTES = 64 << 10
"""Size from which on bodies are handed to ZeroMQ without a copy."""
COMPLAINT_PAUSE_S = 10.0
"""Shortest time between two log lines about what anybody can send."""
LAST_WORDS_MS = 50
"""Longest time that closing a socket waits for its last messages to leave, over connections that exist."""
WATCHED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_NUMBERS = itertools.count()
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""pyzmq's constants as plain numbers: its enumerations take longer than the calls that they are passed to."""


class SharedContext:
    """A ZeroMQ context, with its two threads, that exists while somebody has sockets in it. Any thread may use it.

    All clients of a process share one, so that a thousand of them need no more threads than one does. A server has one
    of its own, in which its doorkeeper decides who may connect: see `doorkeeper.py`.
    """

    def __init__(self) -> None:
        # Reentrant, because a socket that nobody closed is garbage-collected in any thread, perhaps during `enter`.
        self._lock = threading.RLock()
        self._users: set[object] = set()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._pid = 0

    def enter(self, user: object) -> "zmq.Context[zmq.Socket[bytes]]":
        with self._lock:
            if self._pid != os.getpid():  # a fork has none of the threads, and must not end its parent's context
                self._users, self._context, self._pid = set(), None, os.getpid()
            self._users.add(user)
            if self._context is None:
                self._context = zmq.Context()
                self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))  # the default is 1023
            return self._context

    def leave(self, user: object) -> None:
        """Leave the context, after closing one's sockets. The last user to leave waits until all messages are sent."""
        with self._lock:
            self._users.discard(user)
            if self._users or self._context is None or self._pid != os.getpid():
                return
            context, self._context = self._context, None
        context.term()


CLIENTS = SharedContext()
"""The context of all clients of this process."""


class MessageSocket:
    """One ZeroMQ socket. It belongs to the event loop that ran `open`."""

    _sockets: "list[zmq.Socket[bytes]]"
    """The socket and its monitor, both of which must be closed before the context ends."""

    def __init__(
        self,
        kind: int,
        options: Mapping[int, int | bytes],
        on_message: Callable[[list[bytes]], None],
        context: SharedContext,
    ) -> None:
        self._kind = kind
        # A sender must never wait, not even for a deadline or a frozen peer: see `send`.
        self._options = {zmq.LINGER: 0, zmq.SNDHWM: 0, zmq.MAXMSGSIZE: wire.MOST_FRAME_BYTES, **options}
        self._on_message = on_message
        self._context = context
        self._first: zmq.Frame
        """First frame of the message that is being passed on."""
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
        self,
        attach: Callable[["zmq.Socket[bytes]"], object],
        options: Mapping[int, int | bytes] | None = None,
        on_event: Callable[[int], None] | None = None,
    ) -> None:
        """Open the socket. `attach` connects or binds it, and sets further options; if it raises, the socket is closed.

        on_event: called for each of the events WATCHED. It is meant for a socket that connects to one peer.
        """
        self._loop = asyncio.get_running_loop()
        user, self._sockets = object(), []
        # This also closes a socket that is garbage-collected while open, as after a failed test: a context that ends
        # waits for its sockets for ever.
        self._end = weakref.finalize(self, _end, self._context, user, self._sockets)
        self._end.atexit = False
        try:
            self._socket = self._context.enter(user).socket(self._kind)
            self._sockets.append(self._socket)
            for option, value in (self._options | dict(options or {})).items():
                self._socket.setsockopt(option, value)
            if on_event is not None:
                self._watch(on_event)
            attach(self._socket)
            self._loop.add_reader(self._socket.FD, self._read)
            self._is_reading = True
        except BaseException:
            self.close()
            raise

    def _watch(self, on_event: Callable[[int], None]) -> None:
        """Watch the socket's events. Must be called before it connects, because ZeroMQ's thread connects at once, and
        reports a refusal only once."""
        # The name is our own: pyzmq's has the socket's file number, which may just have been another socket's.
        self._monitor = self._socket.get_monitor_socket(WATCHED, f"inproc://monitor.{next(_NUMBERS)}")
        self._sockets.append(self._monitor)
        self._loop.add_reader(self._monitor.FD, self._read_events, on_event)
        self._loop.call_soon(self._read_events, on_event)  # else the descriptor may never signal: see `_look_again`

    def _read_events(self, on_event: Callable[[int], None]) -> None:
        while self._is_reading and self._monitor is not None and _has_message(self._monitor):
            # pyzmq's `parse_monitor_message` is not used: it makes an enumeration member, which is never freed, of each
            # value, and a connection's value is the number of its file.
            on_event(int.from_bytes(self._monitor.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder))

    def connect_again(self, address: str, options: Mapping[int, int | bytes]) -> None:
        """Connect with other options, because the connection cannot be made with the present ones. Messages that were
        sent over it are lost."""
        with contextlib.suppress(zmq.ZMQError):  # ZeroMQ has given it up itself
            self._socket.disconnect(address)
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._socket.connect(address)
        self._look_again()

    def say_last(self, frames: Sequence[bytes]) -> None:
        """Send a last message before `close`, which waits a moment for it to leave. Only a connected peer gets it."""
        self._socket.setsockopt(zmq.LINGER, LAST_WORDS_MS)
        self.send(frames)

    def stop_reading(self) -> None:
        """Stop passing on messages that arrive. Messages that were sent may leave until `close`."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket.FD)
            if self._monitor is not None:
                self._loop.remove_reader(self._monitor.FD)
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def close(self) -> None:
        """Close at once; messages that have not left yet are dropped. May be called twice."""
        self.stop_reading()
        if self._end is not None:
            self._end()

    def send(self, frames: Sequence[bytes]) -> int:
        """Queue a message without waiting. Return 0, or the number of the error for which it was not queued.

        EAGAIN: the queue to the receiver is full, which happens only with SNDHWM set. EHOSTUNREACH: the receiver is not
        connected, which only a ROUTER with ROUTER_MANDATORY reports; other sockets drop the message.
        """
        try:
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE)
            self._socket.send(frames[-1], _NOBLOCK, copy=len(frames[-1]) < COPIED_BYTES)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return error.errno
        finally:
            self._look_again()
        return 0

    def _look_again(self) -> None:
        """Schedule another read if there is a message: the descriptor signals each message only once, and any call of
        the socket clears the signal, not only one that reads."""
        if self._is_reading and self._again is None and _has_message(self._socket):
            self._again = self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._again = None
        try:
            for _ in range(MESSAGES_PER_TURN):
                if not self._is_reading or not _has_message(self._socket):
                    return
                self._on_message(self._receive())
        finally:
            self._look_again()

    def _receive(self) -> list[bytes]:
        """Return one message. `recv_multipart` would ask the socket after each frame whether there is another."""
        self._first = frame = self._socket.recv(_NOBLOCK, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(_NOBLOCK, copy=False)
            frames.append(frame.bytes)
        return frames

    def said_by_connection(self, what: str) -> str:
        """Return a property of the connection over which the current message came: "Peer-Address", or "User-Id", which
        is the party that the doorkeeper gave it. "" if there is none."""
        try:
            return str(self._first.get(what))
        except zmq.ZMQError:
            return ""


def _has_message(socket: "zmq.Socket[bytes]") -> bool:
    events: Any = socket.getsockopt(_EVENTS)  # an int, unlike what the stubs say
    return bool(events & _POLLIN)


def _end(context: SharedContext, user: object, sockets: "Sequence[zmq.Socket[bytes]]") -> None:
    for socket in sockets:
        # Otherwise the end of its connection may be reported to a monitor that is closed already. ZeroMQ's thread,
        # which all sockets of the context share, would wait for somebody to take the report.
        socket.disable_monitor()
        socket.close()
    context.leave(user)


class Complaints:
    """Logger of warnings about what may happen arbitrarily often: the first at once, then few, each with a count."""

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
        self._logger.warning("%s", one_line(text % arguments if arguments else text) + more)
