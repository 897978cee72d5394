"""A ZeroMQ socket in an event loop: sending never waits, and what comes is handed to a function.

pyzmq's own `zmq.asyncio` makes futures for both, and a turn of the loop for each: half of the time of a round trip.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import threading
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
"""Plain numbers: pyzmq's enumerations take longer than what is asked with them."""


class SharedContext:
    """A ZeroMQ context, and its two threads, for as long as somebody has sockets in it. May be used by any thread.

    All clients of a process are in one, so that a thousand of them need no more threads than one does. A server has one
    of its own: within it is asked who may connect, see `doorkeeper.py`.
    """

    def __init__(self) -> None:
        # A socket that nobody closed is collected in whatever thread, perhaps in the middle of `enter`.
        self._lock = threading.RLock()
        self._users: set[object] = set()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._pid = 0

    def enter(self, user: object) -> "zmq.Context[zmq.Socket[bytes]]":
        with self._lock:
            if self._pid != os.getpid():  # a fork has none of the threads, and its parent's context is not its to end
                self._users, self._context, self._pid = set(), None, os.getpid()
            self._users.add(user)
            if self._context is None:
                self._context = zmq.Context()
                self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))  # 1023 are the default
            return self._context

    def leave(self, user: object) -> None:
        """Once its sockets are closed. The last to leave waits for what was said last."""
        with self._lock:
            self._users.discard(user)
            if self._users or self._context is None or self._pid != os.getpid():
                return
            context, self._context = self._context, None
        context.term()


CLIENTS = SharedContext()
"""Of this process."""


class MessageSocket:
    """One ZeroMQ socket. Belongs to the loop that ran `open`."""

    _sockets: "list[zmq.Socket[bytes]]"
    """It, and its monitor: all must be closed before the context ends."""

    def __init__(
        self,
        kind: int,
        options: Mapping[int, int | bytes],
        on_message: Callable[[list[bytes]], None],
        context: SharedContext,
    ) -> None:
        self._kind = kind
        # Whoever sends may not wait, not beyond a deadline and not for a peer that is frozen: see `send`.
        self._options = {zmq.LINGER: 0, zmq.SNDHWM: 0, zmq.MAXMSGSIZE: wire.MOST_FRAME_BYTES, **options}
        self._on_message = on_message
        self._context = context
        self._first: zmq.Frame
        """Of the message that is being handed over."""
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
        """`attach` connects or binds it, with further options; what that raises closes it again.

        on_event: told WATCHED whenever one happens; of a socket that connects to one peer.
        """
        self._loop = asyncio.get_running_loop()
        user, self._sockets = object(), []
        # Also for one that is collected unclosed, as after a test that failed: a context that ends waits for its
        # sockets, for ever.
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
        """Before it connects: ZeroMQ's own thread does that meanwhile, and a refusal is told once and tried no more."""
        # By a name of its own: pyzmq's has the socket's file number, which was another's until a moment ago.
        self._monitor = self._socket.get_monitor_socket(WATCHED, f"inproc://monitor.{next(_NUMBERS)}")
        self._sockets.append(self._monitor)
        self._loop.add_reader(self._monitor.FD, self._read_events, on_event)
        self._loop.call_soon(self._read_events, on_event)  # else the descriptor may never tell: see `_look_again`

    def _read_events(self, on_event: Callable[[int], None]) -> None:
        while self._is_reading and self._monitor is not None and _has_message(self._monitor):
            on_event(int(parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]))

    def connect_again(self, address: str, options: Mapping[int, int | bytes]) -> None:
        """With further options, instead of a connection that cannot be made so. What was sent by that one is lost."""
        with contextlib.suppress(zmq.ZMQError):  # ZeroMQ has given it up itself
            self._socket.disconnect(address)
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._socket.connect(address)
        self._look_again()

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
        """The descriptor tells of a message once, and any call, not only one that reads, takes that away."""
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
        """One message. Not by `recv_multipart`, which asks the socket after each frame whether there is another."""
        self._first = frame = self._socket.recv(_NOBLOCK, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(_NOBLOCK, copy=False)
            frames.append(frame.bytes)
        return frames

    def said_by_connection(self, what: str) -> str:
        """What ZeroMQ knows of the connection by which the message came that is being handed over: "Peer-Address", or
        "User-Id", which is what the doorkeeper called it. "" if nothing."""
        try:
            return str(self._first.get(what))
        except zmq.ZMQError:
            return ""


def _has_message(socket: "zmq.Socket[bytes]") -> bool:
    events: Any = socket.getsockopt(_EVENTS)  # an int, which the stubs do not say
    return bool(events & _POLLIN)


def _end(context: SharedContext, user: object, sockets: "Sequence[zmq.Socket[bytes]]") -> None:
    for socket in sockets:
        # Or the end of its connection may be told to a monitor that is closed, and ZeroMQ's thread waits for one that
        # takes it: the same thread for all that are in the context.
        socket.disable_monitor()
        socket.close()
    context.leave(user)


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
