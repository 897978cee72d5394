"""A scheduler's connection to a modelled instance, in the same event loop: no socket, and no real time."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from hbserve.simulator.instance import ModelledInstance
from hbserve.simulator.sessions import Decoding, Generating, Prefilling, Reporting
from hbserve.simulator.stream import Session, Stream
from hbserve_rpc import PeerDied, PeerLost, RpcTimeout
from hbserve_rpc.messages import CONNECT, DECODE, DESCRIBE, END_CHOICE, GENERATE, GRANT, PREFILL, Empty
from hbserve_rpc.reports import REPORTS

SESSIONS: dict[str, Callable[[ModelledInstance, Any, Stream[Any]], Session]] = {
    DECODE.name: Decoding,
    PREFILL.name: Prefilling,
    GENERATE.name: Generating,
    REPORTS.name: Reporting,
}


class Host:
    """The place where a modelled instance runs. The instance may be killed and started again."""

    def __init__(self, start: Callable[[], ModelledInstance]) -> None:
        self._start = start
        self.instance: ModelledInstance | None = start()
        self.lives: list[ModelledInstance] = [self.instance]
        self.clients: set[SimulatedClient] = set()
        self._changed = asyncio.Event()

    def kill(self) -> None:
        """Kill the instance as `kill -9` of its process would: all connected clients know at once."""
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
    """An InstanceClient of a modelled instance."""

    problem = ""

    def __init__(self, hosts: Mapping[str, Host], address: str, **_: float) -> None:
        self._host = hosts[address.partition(":")[0]]
        self._open: dict[Stream[Any], None] = {}
        self._loop = asyncio.get_running_loop()
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
        if method is CONNECT:
            return Empty()
        return instance.info() if method is DESCRIBE else instance.figures()

    def notify(self, method: Any, request: Any) -> None:
        instance = self._host.instance
        if instance is None or method is END_CHOICE:  # ignored: a choice that goes on for a while costs only few tokens
            return
        assert method is GRANT, method
        instance.grant(request, instance.loop.time() + instance.profile.message_s)

    def stream(self, method: Any, request: Any) -> Stream[Any]:
        stream: Stream[Any] = Stream(self._loop, self._forget)
        instance = self._host.instance
        if instance is None:
            stream.fail(PeerLost("it is not there"))
        else:
            self._open[stream] = None
            stream.session = SESSIONS[method.name](instance, request, stream)
        return stream

    def _forget(self, stream: Stream[Any]) -> None:
        self._open.pop(stream, None)
