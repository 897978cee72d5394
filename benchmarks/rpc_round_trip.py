"""One RPC between two processes beside the same two messages over pyzmq's asyncio sockets.

    python benchmarks/rpc_round_trip.py

"limit": two threads that do nothing but wait in ZeroMQ. "idle": the server has slept for 10 ms before each call, as
that of a KV transfer has; its processor must wake up first.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable
from time import perf_counter

import zmq
import zmq.asyncio

from hbserve_rpc import Method, RpcClient, RpcServer
from hbserve_rpc.messages import Empty

CALL = Method("bench.call", Empty, Empty)
IDLE_S = 0.01


async def serve_rpc() -> None:
    async def answer(request: Empty) -> Empty:
        return request

    server = RpcServer()
    server.serve(CALL, answer)
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()


async def serve_asyncio() -> None:
    socket = zmq.asyncio.Context().socket(zmq.ROUTER)
    print(f"127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", flush=True)
    while True:
        await socket.send_multipart(await socket.recv_multipart())


async def serve_blocking() -> None:
    socket = zmq.Context().socket(zmq.ROUTER)
    print(f"127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", flush=True)
    while True:
        socket.send_multipart(socket.recv_multipart())


async def rounds(call: Callable[[], Awaitable[object]], count: int) -> tuple[float, float]:
    """Median ms of a call when both sides are awake, and when the server is idle."""
    for _ in range(20):
        await call()
    medians = []
    for pause_s, repeats in ((0.0, count), (IDLE_S, count // 10)):
        times = []
        for _ in range(repeats):
            until_s = perf_counter() + pause_s
            while perf_counter() < until_s:
                pass
            began_s = perf_counter()
            await call()
            times.append(perf_counter() - began_s)
        medians.append(1e3 * statistics.median(times))
    return medians[0], medians[1]


async def call_rpc(address: str, count: int) -> tuple[float, float]:
    async with RpcClient(address) as client:
        return await rounds(lambda: client.call(CALL, Empty(), timeout_s=10), count)


async def call_asyncio(address: str, count: int) -> tuple[float, float]:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://{address}")

        async def call() -> None:
            await socket.send_multipart([b"head", b"body"])
            await socket.recv_multipart()

        return await rounds(call, count)


async def call_blocking(address: str, count: int) -> tuple[float, float]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://{address}")

        async def call() -> None:
            socket.send_multipart([b"head", b"body"])
            socket.recv_multipart()

        return await rounds(call, count)


KINDS = {
    "hbserve_rpc": (serve_rpc, call_rpc),
    "zmq.asyncio": (serve_asyncio, call_asyncio),
    "limit": (serve_blocking, call_blocking),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(KINDS[arguments.serve][0]())
        return
    print("ms (median)      awake     idle   ratio to hbserve_rpc")
    ours: tuple[float, float] | None = None
    for kind, (_, call) in KINDS.items():
        process = subprocess.Popen([sys.executable, __file__, "--serve", kind], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = asyncio.run(call(process.stdout.readline().strip(), arguments.count))
        finally:
            process.kill()
            process.communicate()
        ours = ours or found
        print(f"{kind:12s} {found[0]:9.3f} {found[1]:8.3f}   {found[0] / ours[0]:.2f}, {found[1] / ours[1]:.2f}")


if __name__ == "__main__":
    main()
