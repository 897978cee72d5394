"""Cost of many idle peers: processor time, files and threads of a process with a client for each of many servers.

    python benchmarks/rpc_idle.py

The clients are those of a scheduler: each has a heartbeat a second, and in some rows also a message or calls each
second. The servers are one process, and each client has a connection of its own. The bar is a tenth of a core for 1,000
idle instances.
"""

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator

from mock_instances import mock_instance, serve_until_killed, started

from hbserve_rpc import RpcClient, StreamMethod, own_process
from hbserve_rpc.messages import DESCRIBE, STATS, Empty, InstanceStats

REPORTS: StreamMethod[Empty, InstanceStats] = StreamMethod("bench.reports", Empty, InstanceStats)
INTERVAL_S = 1.0


async def serve() -> None:
    async def report(_: Empty) -> AsyncIterator[InstanceStats]:
        while True:
            yield InstanceStats("decode-0", "decode", "ready")
            await asyncio.sleep(INTERVAL_S)

    server = mock_instance("decode-0", "decode")
    server.serve_stream(REPORTS, report)
    await serve_until_killed(server)


async def idle(client: RpcClient) -> None:
    await asyncio.Event().wait()


async def polled(client: RpcClient) -> None:
    while True:
        await client.call(DESCRIBE, Empty(), timeout_s=60)
        await client.call(STATS, Empty(), timeout_s=60)
        await asyncio.sleep(INTERVAL_S)


async def pushed(client: RpcClient) -> None:
    async for _ in client.stream(REPORTS, Empty()):
        pass


KINDS = {"idle": idle, "pushed": pushed, "polled": polled}


async def measure(kind: str, address: str, count: int, seconds: float) -> str:
    clients = [RpcClient(address, heartbeat_interval_s=INTERVAL_S) for _ in range(count)]
    for client in clients:
        await client.start()
    await asyncio.gather(*(client.call(DESCRIBE, Empty(), timeout_s=60) for client in clients))
    work = [asyncio.create_task(KINDS[kind](client)) for client in clients]
    await asyncio.sleep(2 * INTERVAL_S)
    before_s, began_s = time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    share = (time.process_time() - before_s) / (time.monotonic() - began_s)
    files, threads = (len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task"))
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    await asyncio.gather(*(client.close() for client in clients))
    return f"{kind:8s} {100 * share:10.1f} {files / count:14.2f} {threads:8d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    own_process.set_up()
    if arguments.serve:
        asyncio.run(serve())
        return
    with started(__file__, "--serve") as (_, (address,)):
        print(f"{arguments.count} peers   % of a core   files for each  threads")
        for kind in KINDS:
            print(asyncio.run(measure(kind, address, arguments.count, arguments.seconds)))


if __name__ == "__main__":
    main()
