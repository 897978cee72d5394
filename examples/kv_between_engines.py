"""hbserve-kv alone: KV cache from one engine of yours to another, each chunk while the next one is computed.

Run it: uv run python examples/kv_between_engines.py        (its pools are tensors: hbserve-kv[torch])
"""

import asyncio
import multiprocessing
from multiprocessing.queues import Queue

import torch

from hbserve_kv import KVTransferConfig, KVTransferManager, shared_empty

NUM_BLOCKS, BLOCK_ELEMENTS = 64, 4096
CONFIG = KVTransferConfig(backend="auto")  # on one host: `ipc`
FINGERPRINT = {"model": "mine", "dtype": "float32"}  # both sides must have the same


def compute(pool: torch.Tensor, blocks: list[int]) -> None:
    """Stands for a prefill step, which fills these blocks."""
    for block in blocks:
        pool[block] = float(block)


async def prefill(grants: "Queue[bytes]") -> None:
    pool = shared_empty((NUM_BLOCKS, BLOCK_ELEMENTS), dtype=torch.float32)
    async with KVTransferManager(rank=0, pool=pool, fingerprint=FINGERPRINT, config=CONFIG) as kv:
        transfer = await kv.open_send("request-1", await asyncio.to_thread(grants.get))
        chunks = [[40, 41], [7, 8], [55]]
        sent = 0
        for chunk in chunks:
            await asyncio.to_thread(compute, pool, chunk)
            transfer.push(chunk, first=sent)  # moves while the next chunk is computed
            sent += len(chunk)
        result = await transfer.commit(b"first token: 42")
        print(f"sent {result.num_bytes} bytes: {result.outcome.name}")  # the blocks are ours again


async def decode(grants: "Queue[bytes]") -> None:
    pool = shared_empty((NUM_BLOCKS, BLOCK_ELEMENTS), dtype=torch.float32)
    mine = [3, 1, 4, 10, 5]  # which blocks of this pool, in the order of the prompt
    async with KVTransferManager(rank=1, pool=pool, fingerprint=FINGERPRINT, config=CONFIG) as kv:
        posted = kv.post_receive("request-1", mine)
        grants.put(posted.grant)  # bytes, which reach the other side however your engines talk
        result = await posted.wait()
        print(f"received {result.payload.decode()!r} and blocks {pool[mine, 0].int().tolist()}: {result.outcome.name}")


def run(side: str, grants: "Queue[bytes]") -> None:
    asyncio.run(prefill(grants) if side == "prefill" else decode(grants))


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [spawn.Process(target=run, args=(side, queue)) for side in ("prefill", "decode")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
