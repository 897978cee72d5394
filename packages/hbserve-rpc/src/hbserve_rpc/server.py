"""RpcServer: the serving side of hbserve_rpc, with its clients and the handlers that run for them."""

import asyncio
import contextlib
import errno
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, TypeVar

import msgspec
import zmq

from hbserve_rpc import wire
from hbserve_rpc.address import check_host, format_address, look_up
from hbserve_rpc.connected_client import ConnectedClient, Peer
from hbserve_rpc.counts import RpcFaults
from hbserve_rpc.doorkeeper import Doorkeeper
from hbserve_rpc.errors import AddressInUse, HBServeRpcError, InvalidRequest, Overloaded
from hbserve_rpc.keys import PARTIES, Keys, Party
from hbserve_rpc.message_socket import Complaints, MessageSocket, SharedContext
from hbserve_rpc.methods import Method, Notification, StreamMethod
from hbserve_rpc.trace_context import TRACEPARENT

logger = logging.getLogger(__name__)

MOST_CLIENTS = 1 << 14
"""Largest number of clients that a server knows at a time. One that leaves without a goodbye counts until it has been
silent for its heartbeat timeout."""
MOST_MESSAGES = 64
"""Number of messages that ZeroMQ holds for a client that does not read them; its streams then wait."""
MOST_WAITING_BYTES = 16 << 20
"""Largest number of bytes kept for a client beyond these messages, because replies cannot wait as streams do. A client
with more asks without reading the answers, and is given up."""
MOST_WORK = 1 << 14
"""Largest number of calls, notifications and streams under way for one client; more are refused as overload."""
OPTIONS: dict[int, int | bytes] = {
    zmq.ROUTER_HANDOVER: 1,
    zmq.ROUTER_MANDATORY: 1,
    zmq.SNDHWM: MOST_MESSAGES,
    # Clients that connect and send nothing are disconnected, and so are hosts that have vanished. ZeroMQ's defaults for
    # these are 30 s and never.
    zmq.HANDSHAKE_IVL: 10_000,
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 60,
    zmq.TCP_KEEPALIVE_INTVL: 20,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
CLOSED_S = 0.2
"""Time within which a client that has lost its connection connects again, unless it has ended."""

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R")


class RpcServer:
    """Server of methods on one address. It belongs to the event loop that ran `start`.

    Handlers run as tasks of that loop, or directly in it if they are plain functions. A stream's handler is an async
    generator. It is closed (its `finally` blocks run) when the client closes the stream, or has been silent for its
    heartbeat timeout.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        epoch: str | None = None,
        heartbeat_timeout_s: float = 10.0,
        drops_closed: bool = False,
        keys: Keys | None = None,
        allows: Collection[Party] = PARTIES,
    ) -> None:
        """Make a server that does not serve yet.

        host: an IP address without brackets, or a name, of which one address is served; 0.0.0.0 or :: means all.
        drops_closed: whether the work of a client is ended once its connection has been closed for CLOSED_S, because
        its process has ended. The work of silent clients is always ended.
        keys: with them every connection is encrypted, and only holders of a key of one of the parties in `allows` are
        let in; `calling_peer` tells a handler which. Without keys, anybody who reaches the address is let in.

        Raises:
            InvalidAddress: (a ValueError) `host` is neither an address nor a name.
        """
        check_host(host)
        self.host = host
        self.port = port
        self.epoch = epoch or uuid.uuid4().hex
        self._complaints = Complaints(logger)
        self.dropped_frames = 0
        self.failed_notifications = 0
        self._check_interval_s = min(1.0, heartbeat_timeout_s / 4)
        self._handlers: dict[str, tuple[Any, Callable[[Any], Any]]] = {}
        self._notified: dict[str, tuple[Any, Callable[[Any], Any]]] = {}
        self._waiting: set[str] = set()
        """Names of notifications whose handlers may wait, and so run as tasks."""
        self._streams: dict[str, tuple[Any, Callable[[Any], AsyncIterator[Any]]]] = {}
        self._clients: dict[bytes, ConnectedClient] = {}
        self._drops_closed = drops_closed
        self._dropping: list[asyncio.Task[None]] = []
        options = OPTIONS | (keys.server_options() if keys else {})
        context = SharedContext()
        self._doorkeeper = Doorkeeper(keys, allows, context) if keys else None
        self._socket = MessageSocket(zmq.ROUTER, options, self._receive, context)

    def serve(self, method: Method[Q, R], handler: Callable[[Q], Awaitable[R]]) -> None:
        """Answer `method` with what `handler` returns. An exception of the handler reaches the caller."""
        self._handlers[method.name] = (msgspec.msgpack.Decoder(method.request), handler)

    def serve_notification(self, method: Notification[Q], handler: Callable[[Q], Awaitable[None] | None]) -> None:
        """Call `handler` for each notification: in its turn, or in a task if it is a coroutine function. Its exceptions
        are logged and counted, because nobody waits for it."""
        self._notified[method.name] = (msgspec.msgpack.Decoder(method.request), handler)
        if inspect.iscoroutinefunction(handler):
            self._waiting.add(method.name)

    def serve_stream(self, method: StreamMethod[Q, R], handler: Callable[[Q], AsyncIterator[R]]) -> None:
        """Answer `method` with the items of the async generator that `handler` returns."""
        self._streams[method.name] = (msgspec.msgpack.Decoder(method.request), handler)

    @property
    def faults(self) -> RpcFaults:
        """Counts of the messages so far that had no effect."""
        return RpcFaults(self.dropped_frames, self.failed_notifications)

    @property
    def address(self) -> str:
        """Address `host:port` that clients connect to. For a wildcard, they need an address of this machine instead."""
        return format_address(self.host, self.port)

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            AddressInUse: another socket has the address.
            OSError: the address cannot be bound for another reason, for example because this host does not have it.
        """
        try:
            host = await look_up(self.host)
        except OSError as error:
            raise OSError(error.errno, f"cannot serve on {self.address}: {error.strerror}") from error
        if self._doorkeeper is not None:
            self._doorkeeper.open()
        try:
            self._socket.open(lambda socket: self._bind(socket, host), {zmq.IPV6: ":" in host})
        except BaseException:
            self._close()
            raise
        self._dropping = [asyncio.create_task(self._drop_silent_clients())]
        if self._drops_closed:
            self._dropping.append(asyncio.create_task(self._drop_closed_clients()))

    def _bind(self, socket: "zmq.Socket[bytes]", host: str) -> None:
        try:
            socket.bind(f"tcp://{format_address(host, self.port)}")
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"{self.address} is in use by another process; choose another port, or 0") from error
            raise OSError(error.errno, f"cannot serve on {self.address}: {error}") from error
        self.port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    async def stop(self) -> None:
        """End every call, notification and stream, tell clients, and leave no task or socket behind. May be called
        twice."""
        self._socket.stop_reading()
        for identity in self._clients:
            self._socket.say_last([identity, wire.encode(wire.Goodbye(epoch=self.epoch)), b""])
        running = [work.task for client in self._clients.values() for work in client.work.values()]
        running += self._dropping
        self._dropping = []
        for task in running:
            task.cancel()
        try:
            await asyncio.gather(*running, return_exceptions=True)
        finally:
            # This happens even if the stopping task is cancelled, because a context that is garbage-collected while it
            # has an open socket waits for ever.
            self._clients.clear()
            self._close()

    def _close(self) -> None:
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._socket.close()

    def _send(self, identity: bytes, envelope: wire.FromServer, body: bytes = b"") -> None:
        client = self._clients.get(identity)
        if client is None:
            self._socket.send([identity, wire.encode(envelope), body])
            return
        client.send(envelope, body)
        if client.num_waiting_bytes > MOST_WAITING_BYTES:
            self._give_up(identity, f"has not read {client.num_waiting_bytes} bytes of answers")

    def _receive(self, frames: list[bytes]) -> None:
        try:
            identity, head, body = frames
            envelope = wire.decode_from_client(head)
        except (ValueError, *wire.UNREADABLE):
            self.dropped_frames += 1
            self._complaints.add("dropped a message of %d frames that is not of this protocol", len(frames))
            return
        self._handle(identity, envelope, body)

    def _handle(self, identity: bytes, envelope: wire.FromClient, body: bytes) -> None:
        if isinstance(envelope, wire.Hello):
            self._greet(identity, envelope)
            return
        client = self._clients.get(identity)
        if client is None:
            self.dropped_frames += 1
            self._send(identity, wire.UnknownClient(self.epoch, envelope.id))
            return
        client.last_heard_s = time.monotonic()
        match envelope:
            case wire.Ping():
                self._send(identity, wire.Pong(self.epoch))
            case wire.Call(id=id_):
                self._begin(client, id_, self._run_call(client, envelope, body))
            case wire.Notify(id=id_):
                if envelope.method in self._waiting:
                    self._begin(client, id_, self._run_notification(envelope, body))
                else:
                    client.call_soon(lambda: self._take_notification(client, envelope, body))
            case wire.Open(id=id_):
                credit = asyncio.Semaphore(wire.CREDIT)
                self._begin(client, id_, self._run_stream(client, envelope, body, credit), credit)
            case wire.Credits(counts=counts):
                client.give_credit(counts)
            case wire.Goodbye():
                self._give_up(identity, "has ended", logging.DEBUG)  # in order, and so did its work
            case wire.Close(id=id_):
                if work := client.work.get(id_):
                    work.task.cancel()

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        if not hello.is_understood():
            self._complaints.add("refused a client: %s", wire.mismatch(hello.version, "it"))
            self._send(identity, wire.Refused(wire.PROTOCOL_VERSION, self.epoch))
            return
        if identity not in self._clients and len(self._clients) >= MOST_CLIENTS:
            self.dropped_frames += 1
            self._complaints.add("refused a client: there are %d already", MOST_CLIENTS)
            return
        if identity not in self._clients:
            party: Any = self._socket.said_by_connection("User-Id") or None
            peer = Peer(identity, party, self._socket.said_by_connection("Peer-Address"))
            self._clients[identity] = ConnectedClient(
                self._socket, peer, self.epoch, hello.heartbeat_timeout_s, time.monotonic()
            )
        self._send(identity, wire.Welcome(wire.PROTOCOL_VERSION, self.epoch))

    def _begin(self, client: ConnectedClient, id_: int, job: Any, credit: asyncio.Semaphore | None = None) -> None:
        if id_ in client.work:  # our own client never does this: the answers could not be told apart
            job.close()
            self.dropped_frames += 1
            self._complaints.add("dropped a message of a client that has used its id already")
            return
        if len(client.work) >= MOST_WORK:
            job.close()
            self._fail(client, id_, "", Overloaded(f"{len(client.work)} calls and streams of one client"))
            return
        client.begin(id_, job, credit)

    def _decode(self, table: dict[str, tuple[Any, Any]], method: str, body: bytes) -> tuple[Any, Any]:
        if method not in table:
            raise InvalidRequest(f"{self.address} does not serve {method!r}; it serves {sorted(table)}")
        decoder, handler = table[method]
        try:
            return handler, decoder.decode(body)
        except wire.UNREADABLE as error:
            raise InvalidRequest(f"{method}: {error}") from error

    async def _run_call(self, client: ConnectedClient, call: wire.Call, body: bytes) -> None:
        try:
            handler, request = self._decode(self._handlers, call.method, body)
            reply = wire.encode_body(await handler(request), f"the reply to {call.method}")
        except (Exception, asyncio.CancelledError) as error:  # whatever the handler raised is for the caller
            self._fail(client, call.id, call.method, error)
        else:
            self._send(client.peer.connection, wire.Reply(self.epoch, call.id), reply)

    async def _run_notification(self, notify: wire.Notify, body: bytes) -> None:
        try:
            handler, request = self._decode(self._notified, notify.method, body)
            await handler(request)
        except (Exception, asyncio.CancelledError) as error:  # as above, but there is no caller
            _reraise_if_stopped(error)
            self._note_failed(notify.method, error)

    def _take_notification(self, client: ConnectedClient, notify: wire.Notify, body: bytes) -> None:
        """Run the handler of a notification without a task. A client that was given up meanwhile is ignored."""
        if self._clients.get(client.peer.connection) is not client:
            return
        try:
            handler, request = self._decode(self._notified, notify.method, body)
            handler(request)
        except Exception as error:  # as above
            self._note_failed(notify.method, error)

    def _note_failed(self, method: str, error: BaseException) -> None:
        self.failed_notifications += 1
        if isinstance(error, HBServeRpcError):  # which any client can cause
            self._complaints.add("notification %s failed: %s", method, error)
        else:
            logger.error("notification %s failed", method, exc_info=error)

    async def _run_stream(
        self, client: ConnectedClient, open_: wire.Open, body: bytes, credit: asyncio.Semaphore
    ) -> None:
        identity = client.peer.connection
        TRACEPARENT.set(open_.traceparent)  # for this task, and those that the handler makes
        try:
            handler, request = self._decode(self._streams, open_.method, body)
            async with contextlib.aclosing(handler(request)) as items:
                number = 0
                async for item in items:
                    await credit.acquire()
                    while client.waiting:
                        await client.takes_more.wait()
                    if self._clients.get(identity) is client:  # otherwise it was given up, and this is about to end
                        client.add_item(open_.id, number, wire.encode_body(item, f"an item of {open_.method}"))
                    number += 1
        except (Exception, asyncio.CancelledError) as error:  # as above
            self._fail(client, open_.id, open_.method, error)
        else:
            self._send(identity, wire.End(self.epoch, open_.id, number))

    def _fail(self, client: ConnectedClient, id_: int, method: str, error: BaseException) -> None:
        _reraise_if_stopped(error)
        if not isinstance(error, HBServeRpcError):
            logger.error("%s failed", method, exc_info=error)
        self._send(client.peer.connection, wire.describe_error(self.epoch, id_, error))

    async def _drop_silent_clients(self) -> None:
        checked_s = time.monotonic()
        while True:
            await asyncio.sleep(self._check_interval_s)
            now_s = time.monotonic()
            own_pause_s = wire.own_pause(checked_s, now_s, self._check_interval_s)
            checked_s = now_s
            for identity, client in list(self._clients.items()):
                client.last_heard_s = min(now_s, client.last_heard_s + own_pause_s)
                if now_s - client.last_heard_s > client.heartbeat_timeout_s:
                    self._give_up(identity, f"was silent for {now_s - client.last_heard_s:.1f} s")

    async def _drop_closed_clients(self) -> None:
        """Give up clients whose connection is closed. ZeroMQ does not report that, but sending fails then."""
        since_s: dict[bytes, float] = {}
        while True:
            await asyncio.sleep(CLOSED_S / 2)
            now_s, before = time.monotonic(), since_s
            since_s = {}
            probe = wire.encode(wire.Pong(self.epoch))
            for identity in [identity for identity, client in self._clients.items() if client.work]:
                if self._socket.send([identity, probe, b""]) != zmq.EHOSTUNREACH:
                    continue
                since_s[identity] = before.get(identity, now_s)
                if now_s - since_s[identity] >= CLOSED_S:
                    self._give_up(identity, "has gone")

    def _give_up(self, identity: bytes, why: str, level: int = logging.INFO) -> None:
        client = self._clients.pop(identity)
        if client.work:
            logger.log(level, "a client at %s %s; its work ends", client.peer.address or "an unknown address", why)
        client.give_up()


def _reraise_if_stopped(error: BaseException) -> None:
    """Raise a cancellation by Close, a silent client or `stop`. Others came from what the handler waited for."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
