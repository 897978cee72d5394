"""Time of an echo over hbserve_rpc, compared with the same over bare sockets: pyzmq and msgspec over the event loop's
add_reader.

    python benchmarks/rpc_round_trip.py

Client and server are a process each, and kinds take turns, so that other work on the machine is the same for all.

    one          one call at a time, the median and the 99th percentile
    idle         likewise, but the server has slept for 10 ms before each call, as that of a KV transfer has; its
                 processor must wake up first
    calls/s      64 calls are on their way

"bare" does the least that an RPC does: an id and a method with each message, typed structs, and a future for each call.
It has no deadline, heartbeat, bound or cancellation. "keyed" is hbserve_rpc with CURVE. "limit" is two threads that do
nothing but wait in ZeroMQ.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import perf_counter
from typing import Any

import msgspec
import zmq

from hbserve_rpc import Keys, Method, RpcClient, RpcServer, load_keys, make_keys
from hbserve_rpc.keys import save_keys
from hbserve_rpc.message_socket import SharedContext
from hbserve_rpc.messages import Empty

CALL: Method[Empty, Empty] = Method("bench.call", Empty, Empty)
IDLE_S = 0.01
ROUNDS = 5
IN_FLIGHT = 64
Call = Callable[[], Awaitable[object]]


class Envelope(msgspec.Struct, tag=True):
    id: int
    method: str


async def serve_rpc(keys: Keys | None = None) -> None:
    async def answer(request: Empty) -> Empty:
        return request

    server = RpcServer(keys=keys)
    server.serve(CALL, answer)
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()


@asynccontextmanager
async def call_rpc(address: str, keys: Keys | None = None) -> AsyncIterator[Call]:
    async with RpcClient(address, keys=keys) as client:
        yield lambda: client.call(CALL, Empty(), timeout_s=10)


def own_keys() -> Keys:
    """Load the keys, which are the same in both processes."""
    return load_keys(os.environ["BENCH_KEYS"], "instance")


class Bare:
    """A bare socket in the event loop."""

    def __init__(self, kind: int, on_message: Callable[[list[bytes]], None]) -> None:
        self.socket = SharedContext().enter(self).socket(kind)
        self._on_message = on_message

    def listen(self) -> None:
        asyncio.get_running_loop().add_reader(self.socket.FD, self._read)

    def send(self, frames: list[bytes]) -> None:
        self.socket.send_multipart(frames, zmq.NOBLOCK)
        if self._events() & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self._read)

    def _events(self) -> int:
        events: Any = self.socket.getsockopt(zmq.EVENTS)  # an int, which the stubs do not say
        return int(events)

    def _read(self) -> None:
        while self._events() & zmq.POLLIN:
            self._on_message(self.socket.recv_multipart(zmq.NOBLOCK))


async def serve_bare() -> None:
    envelope, body = msgspec.msgpack.Decoder(Envelope), msgspec.msgpack.Decoder(Empty)

    async def answer(request: Empty) -> Empty:
        return request

    async def run(identity: bytes, call: Envelope, request: Empty) -> None:
        reply = await answer(request)
        bare.send([identity, msgspec.msgpack.encode(Envelope(call.id, "")), msgspec.msgpack.encode(reply)])

    def receive(frames: list[bytes]) -> None:
        task = asyncio.ensure_future(run(frames[0], envelope.decode(frames[1]), body.decode(frames[2])))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    tasks: set[asyncio.Task[None]] = set()
    bare = Bare(zmq.ROUTER, receive)
    print(f"127.0.0.1:{bare.socket.bind_to_random_port('tcp://127.0.0.1')}", flush=True)
    bare.listen()
    await asyncio.Event().wait()


@asynccontextmanager
async def call_bare(address: str) -> AsyncIterator[Call]:
    envelope, body = msgspec.msgpack.Decoder(Envelope), msgspec.msgpack.Decoder(Empty)
    waiting: dict[int, asyncio.Future[Empty]] = {}
    ids, loop = itertools.count(), asyncio.get_running_loop()

    def receive(frames: list[bytes]) -> None:
        waiting.pop(envelope.decode(frames[0]).id).set_result(body.decode(frames[1]))

    async def call() -> Empty:
        future = waiting[(id_ := next(ids))] = loop.create_future()
        bare.send([msgspec.msgpack.encode(Envelope(id_, CALL.name)), msgspec.msgpack.encode(Empty())])
        return await future

    bare = Bare(zmq.DEALER, receive)
    bare.socket.connect(f"tcp://{address}")
    bare.listen()
    yield call
    asyncio.get_running_loop().remove_reader(bare.socket.FD)


async def serve_blocking() -> None:
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    print(f"127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", flush=True)
    while True:
        socket.send_multipart(socket.recv_multipart())


@asynccontextmanager
async def call_blocking(address: str) -> AsyncIterator[Call]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://{address}")

        async def call() -> None:
            socket.send_multipart([b"head", b"body"])
            socket.recv_multipart()

        yield call


KINDS: dict[str, tuple[Callable[[], Coroutine[Any, Any, None]], Callable[[str], AbstractAsyncContextManager[Call]]]] = {
    "bare": (serve_bare, call_bare),
    "hbserve_rpc": (serve_rpc, call_rpc),
    "keyed": (lambda: serve_rpc(own_keys()), lambda address: call_rpc(address, own_keys())),
    "limit": (serve_blocking, call_blocking),
}


async def one_at_a_time(call: Call, count: int, pause_s: float = 0.0) -> list[float]:
    """Make calls one after the other. Returns the milliseconds of each."""
    times = []
    for _ in range(count):
        until_s = perf_counter() + pause_s
        while perf_counter() < until_s:
            pass
        began_s = perf_counter()
        await call()
        times.append(1e3 * (perf_counter() - began_s))
    return times


async def many_at_a_time(call: Call, count: int) -> float:
    """Make calls of which many are in flight. Returns calls per second."""

    async def work() -> None:
        for _ in range(count // IN_FLIGHT):
            await call()

    began_s = perf_counter()
    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return count / (perf_counter() - began_s)


async def measure(kind: str, address: str, count: int) -> tuple[list[float], list[float], float]:
    async with KINDS[kind][1](address) as call:
        await one_at_a_time(call, 100)
        times = await one_at_a_time(call, count)
        return times, await one_at_a_time(call, max(1, count // 20), IDLE_S), await many_at_a_time(call, 4 * count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error("--count: expected 1 or more")
    if arguments.serve:
        asyncio.run(KINDS[arguments.serve][0]())
        return
    folder = tempfile.TemporaryDirectory()
    save_keys(make_keys(), folder.name)
    os.environ["BENCH_KEYS"] = folder.name
    processes = {
        kind: subprocess.Popen([sys.executable, __file__, "--serve", kind], stdout=subprocess.PIPE, text=True)
        for kind in KINDS
    }
    try:
        addresses = {kind: process.stdout.readline().strip() for kind, process in processes.items() if process.stdout}
        found: dict[str, list[tuple[list[float], list[float], float]]] = {kind: [] for kind in addresses}
        for _ in range(ROUNDS):
            for kind, address in addresses.items():
                found[kind].append(asyncio.run(measure(kind, address, arguments.count)))
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    show(found)


def show(found: dict[str, list[tuple[list[float], list[float], float]]]) -> None:
    """Print the table, with ratios to "bare"."""
    print("               one p50         one p99        idle p50        calls/s")
    base: list[float] = []
    for kind, rounds in found.items():
        one, idle = (sorted(itertools.chain.from_iterable(times)) for times in list(zip(*rounds, strict=True))[:2])
        numbers = [
            statistics.median(one),
            one[int(0.99 * len(one))],
            statistics.median(idle),
            statistics.median(each[2] for each in rounds),
        ]
        base = base or numbers
        print(
            f"{kind:12s}",
            *(f"{number:8.3f} {number / of:4.2f}x" for number, of in zip(numbers[:3], base, strict=False)),
            f"{numbers[3]:8.0f} {numbers[3] / base[3]:4.2f}x",
        )


if __name__ == "__main__":
    main()
