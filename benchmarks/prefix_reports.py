"""Cost, each second, of the scheduler's knowledge of the prefixes that an instance has cached: the engine's thread
makes a report between two steps, and the scheduler's event loop reads it between two tokens.

    python benchmarks/prefix_reports.py
    python benchmarks/prefix_reports.py --blocks 65536 --changed 0 1000 5120

Times are processor time. One block is 16 tokens. So 40 requests a second with prompts of 2048 tokens change 5,120
blocks of the cache in each second.
"""

import argparse
import asyncio
import os
import statistics
import time
from typing import Any

from hbserve_core.engine.block_manager import BlockManager
from hbserve_rpc.messages import CachedPrefixes, InstanceInfo
from hbserve_scheduler import SchedulerConfig
from hbserve_scheduler.instances import InstanceHandle
from hbserve_scheduler.prefixes import Prefixes

BLOCK_SIZE = 16
ROUNDS = 9


class Client:
    """Replacement of an instance's client, which answers with the blocks of a BlockManager here."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.made_s: list[float] = []

    async def call(self, _method: object, request: Any, **_: object) -> CachedPrefixes:
        began_s = time.thread_time()
        reply = CachedPrefixes(*self.blocks.cached_digests(request.known))
        self.made_s.append(time.thread_time() - began_s)
        return reply


async def longest_pauses_s(job: Any) -> float:
    """Return the longest time in which nothing else ran in this event loop while `job` did."""
    longest_s, last_s = 0.0, time.thread_time()

    async def look() -> None:
        nonlocal longest_s, last_s
        while True:
            now_s = time.thread_time()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    await job
    await asyncio.sleep(0)
    looking.cancel()
    return longest_s


def change(blocks: BlockManager, count: int) -> None:
    """Replace the oldest blocks by as many blocks of new prompts."""
    ids = blocks.allocate_idle(count)
    blocks.cache(ids, [os.urandom(32) for _ in ids])
    blocks.release(ids)


async def measure(num_blocks: int, num_changed: int) -> None:
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    change(blocks, num_blocks)
    handle = InstanceHandle("d", "decode", "127.0.0.1:1", SchedulerConfig(), lambda _: None, lambda _: None)
    handle._set_info(InstanceInfo("d", "decode", "epoch", "ready", block_size=BLOCK_SIZE))
    client, prefixes, pauses_s = Client(blocks), Prefixes(), []
    handle.client = client  # type: ignore[assignment]
    await prefixes._ask(handle)
    for _ in range(ROUNDS):
        change(blocks, max(1, num_changed))
        before = len(client.made_s)
        pause_s = await longest_pauses_s(prefixes._ask(handle))
        pauses_s.append(pause_s - client.made_s[before])
    made_ms, pause_ms = 1e3 * statistics.median(client.made_s), 1e3 * statistics.median(pauses_s)
    print(f"{num_blocks:9} {num_changed:9} {made_ms:22.2f} {pause_ms:22.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--changed", type=int, nargs="+", default=[0, 1000, 5120])
    arguments = parser.parse_args()
    if max(1, *arguments.changed) > min(arguments.blocks):
        parser.error("--changed: expected no more than each of --blocks")
    print(f"{'blocks':>9} {'changed':>9} {'made in, ms':>22} {'longest pause, ms':>22}")
    for num_blocks in arguments.blocks:
        for num_changed in arguments.changed:
            asyncio.run(measure(num_blocks, num_changed))


if __name__ == "__main__":
    main()
