"""hbserve-kv alone, without torch: an engine whose pool is a piece of memory for each layer, in two processes.

Run it: uv run python examples/kv_own_memory.py        (or: … ipc, mooncake, nccl; nccl needs torch)
"""

import asyncio
import sys

from hbserve_kv import KVTransferConfig, KVTransferManager, PoolLayout, shared_buffer

NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, TOKEN_BYTES = 4, 64, 16, 128
BLOCK_BYTES = BLOCK_SIZE * TOKEN_BYTES
PROMPT = [7, 8, 3]  # blocks of the prefill engine
MINE = [60, 2, 1]  # where the decode engine has them


class Engine:
    def __init__(self, rank: int, backend: str) -> None:
        shape = (2, NUM_BLOCKS, BLOCK_SIZE, TOKEN_BYTES)  # keys and values; so a block is 2 * NUM_LAYERS pieces
        self.layers = [shared_buffer(2 * NUM_BLOCKS * BLOCK_BYTES) for _ in range(NUM_LAYERS)]
        pool = PoolLayout([layer.cast("B", shape) for layer in self.layers], "kv blocks tokens dim")
        config = KVTransferConfig(backend=backend)
        self.kv = KVTransferManager(rank=rank, pool=pool, fingerprint={"model": "mine"}, config=config)

    def block(self, layer: int, block: int) -> memoryview:
        """Its keys."""
        return self.layers[layer][block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


async def prefill(backend: str, grant: bytes) -> None:
    engine = Engine(0, backend)
    await engine.kv.start()
    transfer = await engine.kv.open_send("request-1", grant)
    for layer in range(NUM_LAYERS):
        for block in PROMPT:
            engine.block(layer, block)[:] = bytes([10 * layer + block]) * BLOCK_BYTES  # computes it
        transfer.push(PROMPT, first=0, layers=range(layer, layer + 1))  # moves while the next layer is computed
    result = await transfer.commit(b"first token: 42")
    print(f"sent {result.num_bytes} bytes: {result.outcome.name}", flush=True)
    await engine.kv.close()


async def decode(backend: str) -> None:
    engine = Engine(1, backend)
    await engine.kv.start()
    posted = engine.kv.post_receive("request-1", MINE)
    command = sys.executable, __file__, backend, posted.grant.hex()  # the grant is bytes
    child = await asyncio.create_subprocess_exec(*command)
    result = await posted.wait()
    values = [[engine.block(layer, block)[-1] for block in MINE] for layer in range(NUM_LAYERS)]
    print(f"received {result.payload.decode()!r} and {values}: {result.outcome.name}", flush=True)
    assert await child.wait() == 0
    await engine.kv.close()


if __name__ == "__main__":
    chosen, *given = [*sys.argv[1:], "auto"][: max(1, len(sys.argv) - 1)]
    asyncio.run(prefill(chosen, bytes.fromhex(given[0])) if given else decode(chosen))
