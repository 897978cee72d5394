"""RpcClient: the calling side of hbserve_rpc, with one connection to a server and the calls that wait for answers."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from hbserve_rpc import wire
from hbserve_rpc.address import look_up, nobody_listens, parse_address
from hbserve_rpc.errors import HBServeRpcError, NotAllowed, PeerDied, PeerLost, ProtocolMismatch
from hbserve_rpc.keys import Keys, Party
from hbserve_rpc.message_socket import Complaints, MessageSocket
from hbserve_rpc.methods import Method, Notification, StreamMethod
from hbserve_rpc.rpc_stream import RpcStream
from hbserve_rpc.server_connection import ServerConnection
from hbserve_rpc.trace_context import TRACEPARENT

logger = logging.getLogger(__name__)

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R")

LOOK_UP_TIMEOUT_S = 2.0
LOOK_INTERVAL_S, LOOK_TIMEOUT_S = 0.1, 1.0
"""Pause between two looks for a server whose connection has ended, and longest time of one look."""
DOUBT_BEATS, DOUBT_PART = 2, 1 / 3
"""Number of heartbeats, and part of the timeout, for both of which a server must be silent to be in doubt."""


class RpcClient:
    """One connection to the server at `address` (`host:port`). It belongs to the event loop that ran `start`.

    The server may start later or be restarted: the client reconnects by itself. Every call and stream that waits for
    a server is lost when the server says goodbye; when the connection has ended and the server's host says that nothing
    listens there any more, or another life of the server answers; or when the server is silent for
    `heartbeat_timeout_s`, as a frozen or unreachable one is (heartbeats run beside the calls). A short break of the
    connection loses nothing. A call made after a loss waits for the next server.
    """

    def __init__(
        self,
        address: str,
        *,
        heartbeat_interval_s: float = 2.0,
        heartbeat_timeout_s: float = 10.0,
        keys: Keys | None = None,
        server: Party = "instance",
    ) -> None:
        """Make a client that is not connected yet.

        keys: those of this side. With them it only talks to a server that has a key of the party `server`.

        Raises:
            InvalidAddress: (a ValueError) `address` is not an address.
        """
        self._host, _ = parse_address(address)
        self.address = address
        self._complaints = Complaints(logger)
        self.dropped_frames = 0
        """Number of messages that were undecodable, of an earlier life of the server, or for a call that has ended."""
        self._interval_s, self._timeout_s = heartbeat_interval_s, heartbeat_timeout_s
        self._closed = False
        self._epoch: str | None = None
        self._last_heard_s = 0.0
        self._ids = itertools.count(1)
        self._waiting: dict[int, RpcStream[Any]] = {}
        self._credits: list[tuple[int, int]] = []
        """Stream ids and credits to send to the server at the end of this turn of the event loop."""
        self._heart: asyncio.Task[None] | None = None
        self._was_there, self._was_refused = False, ""
        """Whether the client was connected at the last change, and why the server refused it, if it did."""
        self._last_doubtful = 0
        """Largest id of a request that may have reached a life of the server that never said which one it is."""
        self._looking: asyncio.Task[None] | None = None
        """Task that finds out, after the connection has ended, whether the server is still there."""
        self.on_lost: Callable[[PeerLost], None] = lambda why: None
        """Callback for when the server is known to have ended, whether anything waits for it or not."""
        self._doubt_s = max(DOUBT_BEATS * heartbeat_interval_s, DOUBT_PART * heartbeat_timeout_s)
        self._is_in_doubt = False
        self.on_doubt: Callable[[str], None] = lambda why: None
        """Callback that gets a reason when the server is silent or its connection has ended, and "" when it is heard
        again, unless it was lost in between."""
        self._connection = ServerConnection(address, keys, server, self._receive, self._connection_changed)
        self.problem = ""
        """Reason why there may be no answer, as the end of a sentence; "" once something has answered."""

    @property
    def why_silent(self) -> str:
        """Reason why there is no answer: `problem`, or that there is no connection at all."""
        if self.problem or self._connection.is_there:
            return self.problem
        return "; there is no connection: nothing that speaks this protocol listens there"

    @property
    def _socket(self) -> MessageSocket:
        return self._connection.socket

    async def start(self) -> None:
        """Connect in the background, whether the server is there or not. This only waits for a name to be looked up."""
        self._closed = False
        uses_ipv6 = await self._uses_ipv6()
        if self._closed:  # closed meanwhile
            return
        self._connection.open(self._timeout_s, uses_ipv6=uses_ipv6)
        self._hello()
        self._heart = asyncio.create_task(self._heartbeat())

    async def _uses_ipv6(self) -> bool:
        """Return whether to connect by IPv6. ZeroMQ looks the name up at each attempt, but must be told beforehand if
        IPv6 is wanted, and then prefers it."""
        try:
            async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                return ":" in await look_up(self._host)
        except (OSError, TimeoutError) as error:  # not known yet: with IPv6 ZeroMQ takes an address of either kind
            self.problem = f"; the name {self._host!r} does not resolve: {error or 'no name server answers'}"
            return True

    async def close(self, why: str = "this client was closed", *, error: type[PeerLost] = PeerLost) -> None:
        """Fail everything under way with `error` (PeerLost or PeerDied), and leave no task or socket behind. May be
        called twice."""
        self._closed = True
        self._connection.stop()
        tasks = [task for task in (self._heart, self._looking) if task is not None]
        self._heart = self._looking = None
        if self._connection.is_there and self._socket.is_open:
            self._socket.say_last([wire.encode(wire.Goodbye(id=next(self._ids))), b""])
        try:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            # This happens even if the closing task is cancelled, because a context that is garbage-collected while it
            # has an open socket waits for ever.
            self._socket.close()
            self._fail_all(error(f"{self.address}: {why}"))

    async def __aenter__(self) -> "RpcClient":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float) -> R:
        """Call a method and return its answer.

        Raises:
            RpcTimeout: there was no answer within `timeout_s`. The server is told to stop working on the call.
            PeerLost: the server's heartbeats stopped, or it was restarted meanwhile.
            ProtocolMismatch: the server speaks another version.
            InvalidRequest, Overloaded, RequestTimeout, Unavailable, RemoteError: what the handler raised.
        """
        pending: RpcStream[R] = RpcStream(self, next(self._ids), method.name, method.reply, timeout_s)
        async with pending:
            self.begin(pending, wire.Call(pending.id, method.name), request)
            return await anext(pending)

    def notify(self, method: Notification[Q], request: Q) -> None:
        """Send a notification, which has no answer. Returns at once.

        The server begins to handle it after everything that this client sent before, and before everything that it
        sends later. Nothing tells whether it arrived or what came of it; but if a later call is answered, it was not
        lost.

        Raises:
            PeerLost: this client is not started, or is closed.
        """
        self._require_open()
        self.send(wire.Notify(next(self._ids), method.name), wire.encode_body(request, method.name))

    def stream(self, method: StreamMethod[Q, R], request: Q, *, timeout_s: float | None = None) -> "RpcStream[R]":
        """Return a stream that yields items as they arrive. Its iteration raises what `call` raises; `timeout_s` bounds
        the wait for each item.

        Leave it with `aclose()` or use it as an async context manager, so that the server stops.
        """
        stream: RpcStream[R] = RpcStream(self, next(self._ids), method.name, method.item, timeout_s)
        stream.opening = (wire.Open(stream.id, method.name, TRACEPARENT.get()), request)
        return stream

    def _require_open(self) -> None:
        if not self._socket.is_open:
            raise PeerLost(f"the client of {self.address} is not started")
        if self._connection.refusal:
            raise NotAllowed(f"{self.address} {self._connection.refusal}")

    def begin(self, pending: "RpcStream[Any]", envelope: wire.Call | wire.Open, request: msgspec.Struct) -> None:
        self._require_open()
        body = wire.encode_body(request, envelope.method)
        self._waiting[pending.id] = pending
        self.send(envelope, body)

    def send(self, envelope: wire.FromClient, body: bytes = b"") -> None:
        self._connection.send([wire.encode(envelope), body])

    def give_credit(self, id_: int, count: int) -> None:
        """Give the server credit, in one message with the credits of other streams in this turn of the event loop."""
        if not self._credits:
            asyncio.get_running_loop().call_soon(self._send_credits)
        self._credits.append((id_, count))

    def _send_credits(self) -> None:
        counts, self._credits = self._credits, []
        if self._socket.is_open:
            self.send(wire.Credits(next(self._ids), counts))

    def _hello(self) -> None:
        self.send(wire.Hello(wire.PROTOCOL_VERSION, min(self._timeout_s, wire.LONGEST_SILENCE_S), wire.OLDEST_VERSION))

    def forget(self, id_: int) -> bool:
        """Stop waiting for this id, and return whether the server might still be working on it."""
        return self._waiting.pop(id_, None) is not None and self._socket.is_open

    def _receive(self, frames: list[bytes]) -> None:
        try:
            head, body = frames
            envelope = wire.decode_from_server(head)
        except (ValueError, *wire.UNREADABLE):
            self.dropped_frames += 1
            self._complaints.add("dropped a message from %s that is not of this protocol", self.address)
            return
        self._last_heard_s = time.monotonic()
        if self._is_in_doubt:
            self._set_doubt("")
        self._handle(envelope, body)

    def _handle(self, envelope: wire.FromServer, body: bytes) -> None:
        match envelope:
            case wire.Refused(version=version):
                self._fail_all(ProtocolMismatch(wire.mismatch(version, self.address)))
            case wire.Welcome(epoch=epoch):
                self._welcomed(epoch)
            case wire.UnknownClient(epoch=epoch, id=last_lost):
                self._forgotten(epoch, last_lost)
            case wire.Pong():
                pass
            case wire.Goodbye(epoch=epoch) if epoch == self._epoch:
                self._lose(PeerLost(f"{self.address} has ended in order, or is being restarted"))
            case wire.Items(epoch=epoch, items=items):
                waiting = self._waiting if epoch == self._epoch else {}
                for id_, number, item in items:
                    if (pending := waiting.get(id_)) is None:
                        self.dropped_frames += 1
                    elif not pending.receive_item(number, item):
                        self.send(wire.Close(id_))
            case wire.Reply() | wire.End() | wire.Failed():
                if pending := self._pending(envelope.id, envelope.epoch):
                    pending.end(envelope, body)

    def _forgotten(self, epoch: str, last_lost: int) -> None:
        """Handle that the server does not know this client. A server also says so if it gave this client up as silent,
        for example because this process was frozen."""
        is_another = self._epoch not in (None, epoch)
        kind = PeerDied if is_another else PeerLost
        lost = kind(f"{self.address} was restarted, or gave this client up as silent")
        self._fail_all(lost, last_lost)
        if is_another:
            self.on_lost(lost)
        self._epoch = epoch
        self._hello()

    def _welcomed(self, epoch: str) -> None:
        if self._epoch not in (None, epoch):
            self._lose(PeerDied(f"{self.address} was restarted"))
        self._epoch, self.problem = epoch, ""

    def _pending(self, id_: int, epoch: str) -> "RpcStream[Any] | None":
        pending = self._waiting.get(id_) if epoch == self._epoch else None
        self.dropped_frames += pending is None
        return pending

    async def _heartbeat(self) -> None:
        checked_s = time.monotonic()
        while True:
            await asyncio.sleep(self._interval_s)
            if self._connection.is_there:
                self.send(wire.Ping(next(self._ids)))
            now_s = time.monotonic()
            own_pause_s = wire.own_pause(checked_s, now_s, self._interval_s)
            checked_s = now_s
            self._last_heard_s += own_pause_s
            if self._epoch is not None and now_s - self._last_heard_s > self._doubt_s:
                self._set_doubt(f"it was silent for {now_s - self._last_heard_s:.1f} s")
            for pending in list(self._waiting.values()):
                pending.since_s = max(self._last_heard_s, pending.since_s + own_pause_s)
                silent_s = now_s - pending.since_s
                if silent_s > self._timeout_s:
                    silent = f"was silent for {silent_s:.1f} s during {pending.method}{self.why_silent}"
                    pending.fail(PeerLost(f"{self.address} {silent}"))
                    self.send(wire.Close(pending.id))  # a frozen server reads it when it continues

    def _set_doubt(self, why: str) -> None:
        if bool(why) != self._is_in_doubt:
            self._is_in_doubt = bool(why)
            self.on_doubt(why)

    def _connection_changed(self) -> None:
        is_there, refusal = self._connection.is_there, self._connection.refusal
        was_there, was_refused = self._was_there, self._was_refused
        if not is_there and self._epoch is not None:
            self._set_doubt("its connection has ended")
        self._was_there, self._was_refused = is_there, refusal
        was_looking = self._looking is not None
        self._stop_looking()
        if refusal:
            if refusal != was_refused:
                self._lose(NotAllowed(f"{self.address} {refusal}"))
        elif not is_there:
            if was_there and self._epoch is None:
                self._last_doubtful = next(self._ids)
            if was_refused:
                self._hello()  # it is tried again
            else:
                self._looking = asyncio.create_task(self._look())
        elif was_looking:
            if self._epoch is None:
                lost = PeerLost(f"{self.address} was not connected for long enough to say who it is")
                self._fail_all(lost, self._last_doubtful)
            self._hello()  # the answer says whether it is the same life

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    async def _look(self) -> None:
        """Find out, after the connection has ended, whether the server has ended too.

        ZeroMQ tries to connect again, but does not report what the host answers.
        """
        while not await nobody_listens(self.address, LOOK_TIMEOUT_S):  # noqa: ASYNC110  another host does not tell
            await asyncio.sleep(LOOK_INTERVAL_S)
        self._lose(PeerDied(f"{self.address} has ended or is being restarted: nobody listens there"))
        self._epoch = None
        self._hello()  # before later requests, which wait for the next life

    def _lose(self, lost: PeerLost) -> None:
        self._is_in_doubt = False
        self._fail_all(lost)
        self.on_lost(lost)

    def _fail_all(self, error: HBServeRpcError, last_id: float = math.inf) -> None:
        for pending in list(self._waiting.values()):
            if pending.id <= last_id:
                pending.fail(error)
