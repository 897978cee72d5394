"""Tokens of many streams over one connection: one item for each stream at each step, as an engine gives them.

    python benchmarks/rpc_streams.py --streams 1 16 256

For the server and for the client, the table has tokens for each second of processor time. On one core this is the rate
that is possible, and other work on the machine does not change it. "limit" is the same bytes of a step in one ZeroMQ
message, with nobody to tell.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator

import zmq
from mock_instances import serve_until_killed, started

from hbserve_rpc import Method, RpcClient, RpcServer, StreamMethod
from hbserve_rpc.messages import Empty, TokenEvent
from hbserve_rpc.wire import encode

TOKENS: StreamMethod[Empty, TokenEvent] = StreamMethod("bench.tokens", Empty, TokenEvent)
STEP: Method[TokenEvent, TokenEvent] = Method("bench.step", TokenEvent, TokenEvent)
"""Call that asks for a number of steps. The reply has the processor time of the server, in nanoseconds."""
STEPS_A_CALL = 16


async def serve() -> None:
    has_stepped = asyncio.Event()
    number = 0

    async def tokens(_: Empty) -> AsyncIterator[TokenEvent]:
        index = 0
        while True:
            await has_stepped.wait()
            yield TokenEvent(index, [number])
            index += 1

    async def step(request: TokenEvent) -> TokenEvent:
        nonlocal has_stepped, number
        began_ns = time.process_time_ns()
        for _ in range(request.index):
            number += 1
            stepped, has_stepped = has_stepped, asyncio.Event()
            stepped.set()
            # As many turns as the loop needs for everything that this step causes: then the next one.
            for _ in range(3):
                await asyncio.sleep(0)
        return TokenEvent(time.process_time_ns() - began_ns, [])

    server = RpcServer()
    server.serve_stream(TOKENS, tokens)
    server.serve(STEP, step)
    await serve_until_killed(server)


async def measure(address: str, num_streams: int, num_steps: int) -> tuple[float, float]:
    """Return tokens for each second of processor time of the server, and of the client."""
    async with RpcClient(address) as client:

        async def take() -> None:
            async with client.stream(TOKENS, Empty()) as stream:
                for _ in range(num_steps):
                    await anext(stream)

        taking = [asyncio.create_task(take()) for _ in range(num_streams)]
        await asyncio.sleep(0)  # so that all streams are asked for before the first step is
        server_ns, began_s = 0, time.process_time()
        for _ in range(num_steps // STEPS_A_CALL):
            server_ns += (await client.call(STEP, TokenEvent(STEPS_A_CALL, []), timeout_s=60)).index
        await asyncio.gather(*taking)
        client_s = time.process_time() - began_s
    num_tokens = num_streams * num_steps
    return num_tokens / (server_ns / 1e9), num_tokens / client_s


def limit(num_streams: int, num_steps: int) -> float:
    """Return the limit: tokens for each second of processor time, sent and received in one thread."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as left, context.socket(zmq.PAIR) as right:
        right.connect(f"tcp://127.0.0.1:{left.bind_to_random_port('tcp://127.0.0.1')}")
        message = encode(TokenEvent(100, [100])) * num_streams
        began_s = time.process_time()
        for _ in range(num_steps):
            left.send(message)
            right.recv()
        return num_streams * num_steps / (time.process_time() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    print("streams   server, tokens/s of a core   client, tokens/s of a core   limit")
    for num_streams in arguments.streams:
        with started(__file__, "--serve") as (_, (address,)):
            server, client = asyncio.run(measure(address, num_streams, arguments.steps))
        print(f"{num_streams:7d} {server:28,.0f} {client:28,.0f} {limit(num_streams, arguments.steps):12,.0f}")


if __name__ == "__main__":
    main()
