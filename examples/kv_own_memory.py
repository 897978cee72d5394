"""hbserve-kv alone, without torch: an engine whose pool is a piece of memory for each layer, in two processes.

Run it: uv run python examples/kv_own_memory.py        (or: … ipc, mooncake, nccl; nccl needs torch)
"""

import asyncio
import sys

from hbserve_kv import KVTransferConfig, KVTransferManager, PoolLayout, shared_buffer

BLOCK = 16 * 128  # bytes of the keys of 16 tokens, in a layer; the values are as many
PROMPT, MINE = [7, 8, 3], [60, 2, 1]  # blocks of the prefill engine, and where the decode engine has them


async def engine(backend: str = "auto", grant: str = "") -> None:
    layers = [shared_buffer(2 * 64 * BLOCK) for _ in range(4)]  # each 64 blocks of keys, and then 64 of values
    pool = PoolLayout([layer.cast("B", (2, 64, 16, 128)) for layer in layers], "kv blocks tokens dim")
    config = KVTransferConfig(backend=backend)
    async with KVTransferManager(rank=int(bool(grant)), pool=pool, fingerprint={"model": "mine"}, config=config) as kv:
        if grant:  # prefill
            transfer = await kv.open_send("request-1", bytes.fromhex(grant))
            for number, layer in enumerate(layers):
                for block in PROMPT:  # computes it
                    layer[block * BLOCK : (block + 1) * BLOCK] = bytes([10 * number + block]) * BLOCK
                transfer.push(PROMPT, first=0, layers=range(number, number + 1))  # moves while the next is computed
            result = await transfer.commit(b"first token: 42")
            print(f"sent {result.num_bytes} bytes: {result.outcome.name}", flush=True)
        else:  # decode
            posted = kv.post_receive("request-1", MINE)
            child = await asyncio.create_subprocess_exec(sys.executable, __file__, backend, posted.grant.hex())
            result = await posted.wait()
            keys = [[layer[(block + 1) * BLOCK - 1] for block in MINE] for layer in layers]
            print(f"received {result.payload.decode()!r} and {keys}: {result.outcome.name}", flush=True)
            assert await child.wait() == 0


asyncio.run(engine(*sys.argv[1:]))
