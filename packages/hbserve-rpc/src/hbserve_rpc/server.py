"""The serving side of hbserve_rpc."""

import asyncio
import contextlib
import errno
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import zmq

from hbserve_rpc import wire
from hbserve_rpc.address import check_host, format_address, look_up
from hbserve_rpc.errors import AddressInUse, HBServeRpcError, InvalidRequest
from hbserve_rpc.message_socket import Complaints, MessageSocket
from hbserve_rpc.methods import Method, Notification, StreamMethod

logger = logging.getLogger(__name__)

MOST_CLIENTS = 1 << 14
"""That a server knows at a time; a client that goes without a word is known until it has been silent."""

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R")


@dataclass
class _Work:
    """A call, notification or stream that is under way for one client."""

    task: asyncio.Task[None]
    credit: asyncio.Semaphore


@dataclass
class _Client:
    heartbeat_timeout_s: float
    last_heard_s: float
    work: dict[int, _Work] = field(default_factory=dict)
    items: list[tuple[int, int, msgspec.Raw]] = field(default_factory=list)
    """Of its streams, until this turn of the loop ends."""
    after_items: list[tuple[wire.FromServer, bytes]] = field(default_factory=list)
    """What waits for these to be sent first: their streams' ends, for example."""

    def give_credit(self, counts: Sequence[tuple[int, int]]) -> None:
        for id_, count in counts:
            if work := self.work.get(id_):
                for _ in range(min(count, wire.CREDIT)):
                    work.credit.release()


class RpcServer:
    """Serves methods on one address. Belongs to the event loop that ran `start`.

    Handlers run as tasks of that loop. A stream's handler is an async generator; it is closed (its `finally` blocks
    run) when the client closes the stream, or was silent for its heartbeat timeout.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, epoch: str | None = None, heartbeat_timeout_s: float = 10.0
    ) -> None:
        """`host`: an IP address, without brackets, or a name, of which it serves on one address; 0.0.0.0 or :: is all.

        Raises:
            InvalidAddress: (a ValueError) it is neither.
        """
        check_host(host)
        self.host = host
        self.port = port
        self.epoch = epoch or uuid.uuid4().hex
        self._complaints = Complaints(logger)
        self.dropped_frames = 0
        """Messages that were undecodable, or from a client that is not known."""
        self.failed_notifications = 0
        """Notifications that were not of a served method, were undecodable, or whose handler raised."""
        self._check_interval_s = min(1.0, heartbeat_timeout_s / 4)
        self._handlers: dict[str, tuple[Any, Callable[[Any], Any]]] = {}
        self._notified: dict[str, tuple[Any, Callable[[Any], Any]]] = {}
        self._streams: dict[str, tuple[Any, Callable[[Any], AsyncIterator[Any]]]] = {}
        self._clients: dict[bytes, _Client] = {}
        self._dropping: asyncio.Task[None] | None = None
        # What is queued for a client is bounded by the streams' credit.
        options: dict[int, int | bytes] = {zmq.ROUTER_HANDOVER: 1, zmq.MAXMSGSIZE: wire.MOST_FRAME_BYTES}
        self._socket = MessageSocket(zmq.ROUTER, options, self._receive)

    def serve(self, method: Method[Q, R], handler: Callable[[Q], Awaitable[R]]) -> None:
        """Answer `method` with what `handler` returns; its exception reaches the caller."""
        self._handlers[method.name] = (msgspec.msgpack.Decoder(method.request), handler)

    def serve_notification(self, method: Notification[Q], handler: Callable[[Q], Awaitable[None]]) -> None:
        """Run `handler` for each; what it raises is logged and counted, because nobody waits for it."""
        self._notified[method.name] = (msgspec.msgpack.Decoder(method.request), handler)

    def serve_stream(self, method: StreamMethod[Q, R], handler: Callable[[Q], AsyncIterator[R]]) -> None:
        """Answer `method` with the items of the async generator that `handler` returns."""
        self._streams[method.name] = (msgspec.msgpack.Decoder(method.request), handler)

    @property
    def address(self) -> str:
        """`host:port` that clients connect to. With a wildcard they need an address of this machine instead."""
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
        self._socket.open(lambda socket: self._bind(socket, host), {zmq.IPV6: ":" in host})
        self._dropping = asyncio.create_task(self._drop_silent_clients())

    def _bind(self, socket: "zmq.Socket[bytes]", host: str) -> None:
        try:
            socket.bind(f"tcp://{format_address(host, self.port)}")
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"{self.address} is in use by another process; choose another port, or 0") from error
            raise OSError(error.errno, f"cannot serve on {self.address}: {error}") from error
        self.port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    async def stop(self) -> None:
        """End every call, notification and stream, and leave no task or socket behind. May be called twice.

        Clients hear so at once.
        """
        self._socket.stop_reading()
        for identity in self._clients:
            self._socket.say_last([identity, wire.encode(wire.Goodbye(epoch=self.epoch)), b""])
        running = [work.task for client in self._clients.values() for work in client.work.values()]
        running += [self._dropping] if self._dropping is not None else []
        self._dropping = None
        for task in running:
            task.cancel()
        try:
            await asyncio.gather(*running, return_exceptions=True)
        finally:
            # Also if whoever stops it is cancelled: a context that is collected with an open socket waits for ever.
            self._clients.clear()
            self._socket.close()

    def _send(self, identity: bytes, envelope: wire.FromServer, body: bytes = b"") -> None:
        client = self._clients.get(identity)
        if client is not None and client.items:
            client.after_items.append((envelope, body))
        else:
            self._socket.send([identity, wire.encode(envelope), body])

    def _add_item(self, identity: bytes, id_: int, number: int, item: bytes) -> None:
        """Send it with those of other streams that this turn of the loop brings."""
        client = self._clients.get(identity)
        if client is None:  # it was given up, and its streams are about to hear so
            return
        if not client.items:
            asyncio.get_running_loop().call_soon(self._send_items, identity)
        client.items.append((id_, number, msgspec.Raw(item)))

    def _send_items(self, identity: bytes) -> None:
        client = self._clients.get(identity)
        if client is not None and self._socket.is_open:
            items, client.items = client.items, []
            self._socket.send([identity, wire.encode(wire.Items(self.epoch, items)), b""])
            waiting, client.after_items = client.after_items, []
            for envelope, body in waiting:
                self._socket.send([identity, wire.encode(envelope), body])

    def _receive(self, frames: list[bytes]) -> None:
        try:
            identity, head, body = frames
            envelope = wire.decode_from_client(head)
        except (ValueError, msgspec.DecodeError):
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
                self._begin(identity, client, id_, self._run_call(identity, envelope, body))
            case wire.Notify(id=id_):
                self._begin(identity, client, id_, self._run_notification(envelope, body))
            case wire.Open(id=id_):
                credit = asyncio.Semaphore(wire.CREDIT)
                self._begin(identity, client, id_, self._run_stream(identity, envelope, body, credit), credit)
            case wire.Credits(counts=counts):
                client.give_credit(counts)
            case wire.Goodbye():
                self._forget(identity)
            case wire.Close(id=id_):
                if work := client.work.get(id_):
                    work.task.cancel()

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        if hello.version != wire.PROTOCOL_VERSION:
            self._send(identity, wire.Refused(wire.PROTOCOL_VERSION, self.epoch))
            return
        if identity not in self._clients and len(self._clients) >= MOST_CLIENTS:
            self.dropped_frames += 1
            self._complaints.add("refused a client: there are %d already", MOST_CLIENTS)
            return
        if identity not in self._clients:
            self._clients[identity] = _Client(hello.heartbeat_timeout_s, time.monotonic())
        self._send(identity, wire.Welcome(wire.PROTOCOL_VERSION, self.epoch))

    def _begin(
        self, identity: bytes, client: _Client, id_: int, job: Any, credit: asyncio.Semaphore | None = None
    ) -> None:
        task = asyncio.create_task(job)
        client.work[id_] = _Work(task, credit or asyncio.Semaphore(0))
        task.add_done_callback(lambda _: client.work.pop(id_, None))

    def _decode(self, table: dict[str, tuple[Any, Any]], method: str, body: bytes) -> tuple[Any, Any]:
        if method not in table:
            raise InvalidRequest(f"{self.address} does not serve {method!r}; it serves {sorted(table)}")
        decoder, handler = table[method]
        try:
            return handler, decoder.decode(body)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"{method}: {error}") from error

    async def _run_call(self, identity: bytes, call: wire.Call, body: bytes) -> None:
        try:
            handler, request = self._decode(self._handlers, call.method, body)
            reply = wire.encode_body(await handler(request), f"the reply to {call.method}")
        except (Exception, asyncio.CancelledError) as error:  # the top of a handler: what it raised is the caller's
            self._fail(identity, call.id, call.method, error)
        else:
            self._send(identity, wire.Reply(self.epoch, call.id), reply)

    async def _run_notification(self, notify: wire.Notify, body: bytes) -> None:
        try:
            handler, request = self._decode(self._notified, notify.method, body)
            await handler(request)
        except (Exception, asyncio.CancelledError) as error:  # as above, but there is no caller
            _reraise_if_stopped(error)
            self.failed_notifications += 1
            refused = isinstance(error, HBServeRpcError)
            if refused:  # what any client can cause
                self._complaints.add("notification %s failed: %s", notify.method, error)
            else:
                logger.error("notification %s failed", notify.method, exc_info=error)

    async def _run_stream(self, identity: bytes, open_: wire.Open, body: bytes, credit: asyncio.Semaphore) -> None:
        try:
            handler, request = self._decode(self._streams, open_.method, body)
            async with contextlib.aclosing(handler(request)) as items:
                number = 0
                async for item in items:
                    await credit.acquire()
                    self._add_item(identity, open_.id, number, wire.encode_body(item, f"an item of {open_.method}"))
                    number += 1
        except (Exception, asyncio.CancelledError) as error:  # as above
            self._fail(identity, open_.id, open_.method, error)
        else:
            self._send(identity, wire.End(self.epoch, open_.id))

    def _fail(self, identity: bytes, id_: int, method: str, error: BaseException) -> None:
        _reraise_if_stopped(error)
        if not isinstance(error, HBServeRpcError):
            logger.error("%s failed", method, exc_info=error)
        code, message = wire.describe_error(error)
        self._send(identity, wire.Failed(self.epoch, id_, code, message))

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
                    if client.work:
                        logger.info("a client was silent for %.1f s; its work ends", now_s - client.last_heard_s)
                    self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        """A client is gone: nobody wants what is under way for it."""
        for work in self._clients.pop(identity).work.values():
            work.task.cancel()


def _reraise_if_stopped(error: BaseException) -> None:
    """Raise a cancellation by Close, a silent client or `stop`; another came from what the handler waited for."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
