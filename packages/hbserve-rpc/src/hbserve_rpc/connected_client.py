"""A client as its server sees it: its work under way, and the messages on their way to it."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
import zmq

from hbserve_rpc import wire
from hbserve_rpc.address import is_loopback, is_own_address
from hbserve_rpc.keys import Party
from hbserve_rpc.message_socket import MessageSocket

MESSAGE_BYTES = 64 << 10
"""Approximate size of a message with items of streams. A larger item has a message of its own."""
RESEND_S = 0.002
"""Pause between attempts to hand ZeroMQ what it did not take. Nothing signals when it would take it."""


@dataclass(frozen=True)
class Peer:
    """The caller of a handler, as far as its connection identifies it."""

    connection: bytes
    """Id of the connection: the same in all calls of one client, and different for every other client."""
    party: Party | None
    """Party that the caller's key belongs to; None if the server has no keys."""
    address: str
    """IP address of the caller."""

    @cached_property
    def is_trusted(self) -> bool:
        """Whether the caller has a key, or is a process of this host. The result is cached, because every transfer asks
        for it. If the system cannot be asked, for lack of file descriptors, nobody is trusted."""
        if self.party is not None or self.address == "":
            return self.party is not None
        with contextlib.suppress(OSError):
            return is_loopback(self.address) or is_own_address(self.address)
        return False


_calling: ContextVar[Peer] = ContextVar("calling")


def calling_peer() -> Peer:
    """Return the caller of the running handler. Call it in the handler, or in a task that the handler has made."""
    return _calling.get()


@dataclass
class Work:
    """A call, notification or stream that is under way for a client."""

    task: asyncio.Task[None]
    credit: asyncio.Semaphore | None
    """Credit of a stream; None for a call or a notification."""


@dataclass
class ConnectedClient:
    """Work under way for one client, and messages on their way to it.

    ZeroMQ holds up to MOST_MESSAGES for the client. While it takes no more, streams wait, and other messages are kept
    here.
    """

    socket: MessageSocket
    peer: Peer
    epoch: str
    heartbeat_timeout_s: float
    last_heard_s: float
    work: dict[int, Work] = field(default_factory=dict)
    items: list[tuple[int, int, msgspec.Raw]] = field(default_factory=list)
    """Stream id, number and content of items that wait for the end of this turn of the event loop, or until there are
    enough of them for a message."""
    num_item_bytes: int = 0
    after_items: list[tuple[wire.FromServer, bytes]] = field(default_factory=list)
    """Messages that must be sent after `items`, for example the ends of their streams."""
    waiting: deque[list[bytes]] = field(default_factory=deque)
    """Messages that ZeroMQ does not take at the moment."""
    num_waiting_bytes: int = 0
    takes_more: asyncio.Event = field(default_factory=asyncio.Event)
    """Event that streams wait for while there are `waiting` messages."""

    def begin(self, id_: int, job: Coroutine[Any, Any, None], credit: asyncio.Semaphore | None) -> None:
        """Run a handler as a task."""
        _calling.set(self.peer)
        task = asyncio.create_task(job)
        self.work[id_] = Work(task, credit)
        task.add_done_callback(lambda _: self.work.pop(id_, None))

    def call_soon(self, job: Callable[[], None]) -> None:
        """Run a handler that does not wait, in its turn among the handlers given to `begin`."""
        _calling.set(self.peer)
        asyncio.get_running_loop().call_soon(job)

    def give_credit(self, counts: Sequence[tuple[int, int]]) -> None:
        for id_, count in counts:
            work = self.work.get(id_)
            if work is not None and work.credit is not None:
                for _ in range(min(count, wire.CREDIT)):
                    work.credit.release()

    def add_item(self, id_: int, number: int, item: bytes) -> None:
        """Send an item, in one message with items of other streams in this turn of the event loop."""
        if not self.items:
            asyncio.get_running_loop().call_soon(self.send_items)
        self.items.append((id_, number, msgspec.Raw(item)))
        self.num_item_bytes += len(item)
        if self.num_item_bytes >= MESSAGE_BYTES:
            self.send_items()

    def send_items(self) -> None:
        if not self.items:
            return
        items, self.items, self.num_item_bytes = self.items, [], 0
        self._post(wire.Items(self.epoch, items))
        after, self.after_items = self.after_items, []
        for envelope, body in after:
            self._post(envelope, body)

    def send(self, envelope: wire.FromServer, body: bytes) -> None:
        if self.items:
            self.after_items.append((envelope, body))
        else:
            self._post(envelope, body)

    def _post(self, envelope: wire.FromServer, body: bytes = b"") -> None:
        if not self.socket.is_open:
            return
        frames = [self.peer.connection, wire.encode(envelope), body]
        if self.waiting or self.socket.send(frames) == zmq.EAGAIN:
            if not self.waiting:
                self.takes_more.clear()
                asyncio.get_running_loop().call_later(RESEND_S, self._post_waiting)
            self.waiting.append(frames)
            self.num_waiting_bytes += sum(map(len, frames))

    def _post_waiting(self) -> None:
        while self.waiting and self.socket.is_open and self.socket.send(self.waiting[0]) != zmq.EAGAIN:
            self.num_waiting_bytes -= sum(map(len, self.waiting.popleft()))
        if not self.waiting:
            self.takes_more.set()
        elif self.socket.is_open:
            asyncio.get_running_loop().call_later(RESEND_S, self._post_waiting)

    def give_up(self) -> None:
        self.waiting.clear()
        for work in self.work.values():
            work.task.cancel()
