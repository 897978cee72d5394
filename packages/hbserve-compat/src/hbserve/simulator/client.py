"""A scheduler's connection to a modelled instance, in the same event loop: no socket, and no real time."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from hbserve.simulator.instance import ModelledInstance
from hbserve_rpc import PeerDied, PeerLost, RpcTimeout
from hbserve_rpc.messages import CONNECT, DECODE, DESCRIBE, END_CHOICE, GENERATE, GRANT, PREFILL, STATS
from hbserve_rpc.reports import REPORTS

CALLS = {DESCRIBE.name: "describe", STATS.name: "stats", CONNECT.name: "connect"}
STREAMS = {DECODE.name: "decode", PREFILL.name: "prefill", GENERATE.name: "generate", REPORTS.name: "reports"}


class Host:
    """Where an instance runs: it may die, and another life of it may be started."""

    def __init__(self, start: Callable[[], ModelledInstance]) -> None:
        self._start = start
        self.instance: ModelledInstance | None = start()
        self.lives: list[ModelledInstance] = [self.instance]
        self.clients: set[SimulatedClient] = set()
        self._changed = asyncio.Event()

    def kill(self) -> None:
        """As `kill -9` of its process: whoever has dialled it knows at once."""
        if self.instance is None:
            return
        self.instance.engine.stop()
        self.instance = None
        self._changed.clear()
        for client in self.clients:
            client.lost(PeerDied("it was killed"))

    def restart(self) -> None:
        if self.instance is None:
            self.instance = self._start()
            self.lives.append(self.instance)
            self._changed.set()

    async def alive(self) -> ModelledInstance:
        while self.instance is None:
            await self._changed.wait()
        return self.instance


class SimulatedClient:
    """An InstanceClient."""

    problem = ""

    def __init__(self, hosts: Mapping[str, Host], address: str, **_: float) -> None:
        self._host = hosts[address.partition(":")[0]]
        self._open: dict[SimulatedStream, None] = {}
        self.on_lost: Callable[[PeerLost], None] = lambda why: None
        self.on_doubt: Callable[[str], None] = lambda why: None

    async def start(self) -> None:
        self._host.clients.add(self)

    async def close(self, why: str = "this client was closed", *, error: type[PeerLost] = PeerLost) -> None:
        self._host.clients.discard(self)
        self._fail(error(why))

    def lost(self, error: PeerLost) -> None:
        self._fail(error)
        self.on_lost(error)

    def _fail(self, error: PeerLost) -> None:
        streams, self._open = self._open, {}
        for stream in streams:
            stream.fail(error)

    async def call(self, method: Any, request: Any, *, timeout_s: float) -> Any:
        instance = self._host.instance
        if instance is None:
            try:
                async with asyncio.timeout(timeout_s):
                    instance = await self._host.alive()
            except TimeoutError:
                raise RpcTimeout(f"no answer to {method.name} within {timeout_s:g} s") from None
        return await getattr(instance, CALLS[method.name])(request)

    def notify(self, method: Any, request: Any) -> None:
        instance = self._host.instance
        if instance is None or method is END_CHOICE:  # a choice that goes on a while costs a few tokens
            return
        assert method is GRANT, method
        future = instance.grant(request)
        asyncio.get_running_loop().call_later(instance.profile.message_s, _run, future)

    def stream(self, method: Any, request: Any) -> "SimulatedStream":
        stream = SimulatedStream(self, self._host.instance, STREAMS[method.name], request)
        self._open[stream] = None
        return stream

    def forget(self, stream: "SimulatedStream") -> None:
        self._open.pop(stream, None)


def _run(handler: Any) -> None:
    """A handler that waits for nothing."""
    try:
        handler.send(None)
    except StopIteration:
        return
    raise AssertionError("a notification waits for nothing")


class SimulatedStream:
    """An InstanceStream: what the instance's handler yields, until one of both has ended."""

    def __init__(self, client: SimulatedClient, instance: ModelledInstance | None, name: str, request: Any) -> None:
        self._client = client
        self._items: AsyncGenerator[Any, None] | None = getattr(instance, name)(request) if instance else None
        self._error: PeerLost | None = None if instance else PeerLost("it is not there")
        self._reading: asyncio.Task[Any] | None = None

    def fail(self, error: PeerLost) -> None:
        self._error = error
        if self._reading is not None:
            self._reading.cancel()

    def __aiter__(self) -> "SimulatedStream":
        return self

    async def __anext__(self) -> Any:
        if self._error is not None:
            raise self._error
        assert self._items is not None
        self._reading = asyncio.current_task()
        try:
            return await self._items.__anext__()
        except asyncio.CancelledError:
            assert self._reading is not None
            if self._error is None or self._reading.uncancel() > 0:  # the scheduler has cancelled it too
                raise
            raise self._error from None
        finally:
            self._reading = None

    async def __aenter__(self) -> "SimulatedStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.forget(self)
        if self._items is not None:
            await self._items.aclose()
