"""Processes that transfer KV and stop at a chosen point of it, for a test to kill or freeze them there.

Points of a transfer, in the process that stops:
    connecting          its transport connects
    before kv.begin     it is about to send that message of `hbserve_kv.protocol.messages`, or to handle it; so with the
                        others
    after kv.begin      it has got the answer, or is about to send it
    in mid-part         half of a part has moved

They are forked from one server that has imported everything, so another process costs a few milliseconds.
"""

import asyncio
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from hbserve_kv import (
    KVTransferConfig,
    KVTransferManager,
    Link,
    Outcome,
    Part,
    PostedReceive,
    TransferFailed,
    Transport,
)
from hbserve_kv.testing import is_empty
from hbserve_kv.transports.ipc import IpcTransport
from hbserve_kv.transports.mooncake.transport import MooncakeTransport
from hbserve_kv.transports.nccl import RECEIVER, SENDER, NcclTransport
from hbserve_rpc import RpcClient, RpcServer, RpcStream
from hbserve_testing.namespaces import enter, set_namespace

DEADLINE_S = 60.0
BLOCK_WORDS = (256 << 10) // 8
"""256 KiB: four blocks are one message of Gloo, so that half of a part is as many whole messages."""
NUM_BLOCKS = 8
"""Blocks of a transfer, which are one part."""
BACKWARDS = list(reversed(range(NUM_BLOCKS)))
"""No two are neighbours, or Gloo would send all in one message."""
IS_FREE = -1
"""What a process fills its blocks with when they are its own again. Later writes of others would show."""
LOADED = [
    "torch",
    "hbserve_kv.testing",
    *(f"hbserve_kv.transports.{name}" for name in ("nccl", "ipc", "mooncake.transport")),
]
"""What the server has imported of which processes here are forks."""


def start_process(target: Callable[..., None], *arguments: Any) -> multiprocessing.context.ForkServerProcess:
    """A fork of the server, which runs this until this process ends. Only one that begins the server tells it what to
    import: without a word from here each fork would import it, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def pattern(name: str) -> torch.Tensor:
    """(NUM_BLOCKS, BLOCK_WORDS): in each transfer and place another number."""
    return torch.arange(NUM_BLOCKS * BLOCK_WORDS).view(NUM_BLOCKS, BLOCK_WORDS) + (zlib.crc32(name.encode()) << 24)


def make_pool(num_transfers: int) -> torch.Tensor:
    """(num_transfers * NUM_BLOCKS, BLOCK_WORDS)"""
    return torch.full((num_transfers * NUM_BLOCKS, BLOCK_WORDS), IS_FREE, dtype=torch.int64)


def make_manager(
    rank: int, backend: str, pool: torch.Tensor, timeout_s: float, expiry_s: float, host: str = "127.0.0.1"
) -> KVTransferManager:
    config = KVTransferConfig(backend=backend, buffer_size=0, timeout_s=timeout_s, expiry_s=expiry_s, host=host)
    return KVTransferManager(rank=rank, pool=pool, fingerprint={"model": "m"}, config=config, name=name_of(rank))


def name_of(rank: int) -> str:
    """To which a receiver may grant a transfer."""
    return f"instance {rank}"


async def send(
    manager: KVTransferManager, pool: torch.Tensor, name: str, blocks: Sequence[int], grant: bytes, *, abort: bool,
    opened: Callable[[], Awaitable[None]] | None = None,
) -> str:  # fmt: skip
    """Send `pattern(name)`. Returns how it ended, once the blocks are not read any more; they are overwritten then."""
    pool[blocks] = pattern(name)
    try:
        transfer = await manager.open_send(name, grant)
    except TransferFailed as error:
        ended = f"refused: {error}"
    else:
        if opened is not None:
            await opened()
        transfer.push(blocks, 0)
        outcome = await transfer.abort("not wanted") if abort else (await transfer.commit()).outcome
        if outcome is Outcome.UNKNOWN:
            await transfer.drained()
        ended = outcome.name
    pool[blocks] = IS_FREE
    return ended


class Halt:
    """One point at which this process stands still until `go` is set."""

    def __init__(self, point: str, reached: Callable[[], object]) -> None:
        self.go = threading.Event()
        self._point = point
        self._reached = reached

    def is_at(self, point: str) -> bool:
        return point == self._point

    def here(self, point: str) -> None:
        """Blocks; in a thread of its own."""
        if self.is_at(point):
            self._point = ""
            self._reached()
            assert self.go.wait(DEADLINE_S), f"left waiting {point}"

    async def at(self, point: str) -> None:
        if self.is_at(point):
            await asyncio.to_thread(self.here, point)


def halting_run(find: Callable[[Part | None], Halt | None]) -> Callable[..., Any]:
    """`Link.run`, in which all blocking I/O of all transports happens, with the halt that `find` has for a part."""
    run = Link.run

    async def halting(self: Link, blocking: Callable[..., Any], *arguments: Any) -> Any:
        part = next((each for each in arguments if isinstance(each, Part)), None)
        halt = find(part)
        if part is None or halt is None or not halt.is_at("in mid-part"):
            return await run(self, blocking, *arguments)

        def in_two(*arguments: Any) -> None:
            for half in (slice(NUM_BLOCKS // 2), slice(NUM_BLOCKS // 2, None)):
                ids, targets = part.block_ids[half], part.target_block_ids[half]
                one = dataclasses.replace(part, block_ids=ids, target_block_ids=targets)
                blocking(*(one if each is part else each for each in arguments))
                halt.here("in mid-part")

        return await run(self, in_two, *arguments)

    return halting


def _halting_connect(connect: Any, halt: Halt) -> Any:
    async def halting(self: Transport, link: Link) -> None:
        await halt.at("connecting")
        await connect(self, link)

    return halting


def install(halt: Halt) -> None:
    """Into the process that calls it, for its life."""
    for transport in (IpcTransport, MooncakeTransport, NcclTransport):
        transport.connect = _halting_connect(transport.connect, halt)  # type: ignore[method-assign]
    call, begin_stream = RpcClient.call, RpcStream.__anext__
    serve, serve_stream = RpcServer.serve, RpcServer.serve_stream

    async def halting_call(self: RpcClient, method: Any, request: Any, *, timeout_s: float) -> Any:
        await halt.at(f"before {method.name}")
        reply = await call(self, method, request, timeout_s=timeout_s)
        await halt.at(f"after {method.name}")
        return reply

    async def halting_stream(self: RpcStream[Any]) -> Any:
        await halt.at(f"before {self.method}")
        return await begin_stream(self)

    def halting_serve(self: RpcServer, method: Any, handler: Any) -> None:
        async def handle(request: Any) -> Any:
            await halt.at(f"before {method.name}")
            reply = await handler(request)
            await halt.at(f"after {method.name}")
            return reply

        serve(self, method, handle)

    def halting_serve_stream(self: RpcServer, method: Any, handler: Any) -> None:
        async def handle(request: Any) -> Any:
            await halt.at(f"before {method.name}")
            async with contextlib.aclosing(handler(request)) as items:
                async for item in items:
                    yield item

        serve_stream(self, method, handle)

    RpcClient.call, RpcStream.__anext__ = halting_call, halting_stream  # type: ignore[method-assign]
    RpcServer.serve, RpcServer.serve_stream = halting_serve, halting_serve_stream  # type: ignore[method-assign]
    Link.run = halting_run(lambda _: halt)  # type: ignore[method-assign]


class _Process:
    """What the process does: one manager, told by its control pipe what to send and to receive."""

    def __init__(self, control: Connection, point: str) -> None:
        self._control = control
        self._halt = Halt(point, lambda: self._say("reached"))
        self._commands: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self._posted: dict[str, PostedReceive] = {}
        self._tasks: list[asyncio.Task[None]] = []
        install(self._halt)

    def _say(self, what: str, *details: Any) -> None:
        self._control.send((what, details))

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(EOFError):
            while True:
                command = self._control.recv()
                if command[0] == "go":
                    self._halt.go.set()
                else:
                    loop.call_soon_threadsafe(self._commands.put_nowait, command)
        os._exit(1)  # the test is gone

    async def run(self, rank: int, backend: str, timeout_s: float, expiry_s: float, host: str) -> None:
        self._pool = make_pool(1)
        self._manager = make_manager(rank, backend, self._pool, timeout_s, expiry_s, host)
        await self._manager.start()
        self._say("address", self._manager.address)
        threading.Thread(target=self._listen, args=[asyncio.get_running_loop()], daemon=True).start()
        while (command := await self._commands.get())[0] != "close":
            self._tasks.append(asyncio.create_task(getattr(self, command[0])(*command[1:])))
        await asyncio.gather(*self._tasks)
        async with asyncio.timeout(DEADLINE_S):
            while not is_empty(self._manager):
                await asyncio.sleep(0.01)
        await self._manager.close()
        self._say("closed", bool((self._pool == IS_FREE).all()))

    async def send(self, name: str, grant: bytes, abort: bool) -> None:
        self._say("ended", await send(self._manager, self._pool, name, BACKWARDS, grant, abort=abort))

    async def receive(self, name: str) -> None:
        posted = self._posted[name] = self._manager.post_receive(name, BACKWARDS)
        self._say("grant", posted.grant)
        result = await posted.wait()
        if result.outcome is Outcome.UNKNOWN:
            self._say("unknown")
            await posted.drained()
        is_right = result.outcome is not Outcome.COMPLETED or torch.equal(self._pool[BACKWARDS], pattern(name))
        self._pool.fill_(IS_FREE)
        self._say("ended", result.outcome.name if is_right else "corrupt")

    async def offer(self, name: str, lease_s: float) -> None:
        self._pool[BACKWARDS] = pattern(name)
        offer = self._manager.offer(name, lease_s=lease_s)
        offer.push(BACKWARDS)
        offer.commit()
        self._say("offered", self._manager.epoch)
        await self._until_over(offer)

    async def claim(self, name: str, address: str, epoch: str, is_fetched: bool) -> None:
        claim = self._manager.claim(name, address, epoch)
        if not is_fetched:
            self._say("kept", await claim.kept())
            await claim.task
            self._say("ended", "left")
            return
        posted = claim.fetch(BACKWARDS)
        self._posted[name] = posted
        await self._until_over(posted)

    async def _until_over(self, each: Any) -> None:
        result = await each.wait()
        if result.outcome is Outcome.UNKNOWN:
            self._say("unknown")
            await each.drained()
        self._pool.fill_(IS_FREE)
        self._say("ended", result.outcome.name)

    async def cancel(self, name: str) -> None:
        await self._posted[name].cancel("not wanted")


def make_gloo(store: str, rank: int) -> Any:
    """A group of two without a link, which waits for longer than a test may take."""
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=2 * DEADLINE_S)
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(torch.distributed.FileStore(store, 2), rank, 2, options)


def receive_by_gloo(control: Connection, store: str, num_bytes: int) -> None:
    """One message. Says when it is wanted."""
    work = make_gloo(store, RECEIVER).recv([torch.empty(num_bytes, dtype=torch.uint8)], SENDER, 0)
    control.send("wanted")
    work.wait()


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a network namespace. Processes of `Victim` are of the one outside, unless they are told."""
    multiprocessing.set_forkserver_preload(LOADED)
    multiprocessing.forkserver.ensure_running()
    before = enter(namespace)
    try:
        yield
    finally:
        set_namespace(before)


def main(control: Connection, rank: int, backend: str, point: str, timeout_s: float, expiry_s: float, where: str,
         host: str) -> None:  # fmt: skip
    if where:
        enter(where)
    torch.set_num_threads(1)
    asyncio.run(_Process(control, point).run(rank, backend, timeout_s, expiry_s, host))
