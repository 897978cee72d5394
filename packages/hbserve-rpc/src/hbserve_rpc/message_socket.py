"""A ZeroMQ socket in an event loop: sending never waits, and what comes is handed to a function.

pyzmq's own `zmq.asyncio` makes futures for both, and a turn of the loop for each: half of the time of a round trip.
"""

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

MESSAGES_PER_TURN = 64
"""Others of the event loop have their turn after so many."""
COPIED_BYTES = 64 << 10
"""Longer bodies are handed to ZeroMQ as they are."""


class MessageSocket:
    """One socket with a context, and so a thread for its I/O, of its own. Belongs to the loop that ran `open`."""

    def __init__(
        self, kind: int, options: Mapping[int, int | bytes], on_message: Callable[[list[bytes]], None]
    ) -> None:
        self._kind = kind
        # Whoever sends may not wait, not beyond a deadline and not for a peer that is frozen: see `send`.
        self._options = {zmq.LINGER: 0, zmq.SNDHWM: 0, **options}
        self._on_message = on_message
        self._socket: zmq.Socket[bytes]
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
        self._end = weakref.finalize(self, _end, context, self._socket)
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

    def stop_reading(self) -> None:
        """What comes from now on is handed to nobody. What was sent has until `close` to leave."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket.FD)
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
        if self._is_reading and self._again is None and self._has_message():
            self._again = self._loop.call_soon(self._read)

    def _has_message(self) -> bool:
        events: Any = self._socket.EVENTS  # an int, which the stubs do not say
        return bool(events & zmq.POLLIN)

    def _read(self) -> None:
        self._again = None
        try:
            for _ in range(MESSAGES_PER_TURN):
                if not self._is_reading or not self._has_message():
                    return
                self._on_message(self._socket.recv_multipart(zmq.NOBLOCK))
        finally:
            self._look_again()


def _end(context: "zmq.Context[zmq.Socket[bytes]]", socket: "zmq.Socket[bytes]") -> None:
    socket.close()
    context.term()
