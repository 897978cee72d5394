"""Transfer rate of layer-major and of block-major pools: the same bytes between two processes, over each backend.

    python benchmarks/kv_layouts.py                                                 # CPU
    python benchmarks/kv_layouts.py --device cuda:0 --peer-device cuda:1 --backends ipc nccl

Rounds of both alternate, so that other work on the machine hits both. The table has medians, of blocks in random order.
"limit" is a plain copy of as many bytes in one process: from one GPU to the other if there are two, within the GPU if
there is one, and memcpy otherwise. A block of 72 pieces of 32 KB is 16 tokens of an 8B model with 36 layers.
"""

import argparse
import asyncio
import os
import statistics
from time import perf_counter

import msgspec
import torch

from hbserve_kv.bench import MIB, Measurement, Settings, chosen_blocks, sender


def limit(settings: Settings, num_bytes: int, num_rounds: int) -> float:
    """Measure the bytes a second of a plain copy in one process."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=settings.device)
    target = torch.ones(num_bytes, dtype=torch.uint8, device=settings.of_peer().device)
    took_s = []
    for _ in range(num_rounds + 1):
        began_s = perf_counter()
        target.copy_(source)
        for each in (source, target):
            if each.is_cuda:
                torch.cuda.synchronize(each.device)
        took_s.append(perf_counter() - began_s)
    return num_bytes / statistics.median(took_s[1:])


async def compare(settings: Settings, num_rounds: int) -> tuple[list[Measurement], list[Measurement], str]:
    """Measure block-major and layer-major pairs in turns. Returns both, and the name of what carried the bytes."""
    block_major = msgspec.structs.replace(settings, num_layers=0)
    source, target = (chosen_blocks(settings, settings.num_blocks, True, seed) for seed in (1, 2))
    async with sender(block_major) as one, sender(settings) as other:
        found: tuple[list[Measurement], list[Measurement]] = [], []
        for _ in range(num_rounds + 1):
            for there, measured in zip((one, other), found, strict=True):
                measured.append(await there.transfer(source, target))
        return found[0][1:], found[1][1:], other.manager.links()[0].detail


def rate(found: list[Measurement]) -> float:
    return found[0].num_bytes / statistics.median(each.time_s for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer-device", default="", help="of the receiving process, if it is another one: cuda:1")
    parser.add_argument("--backends", nargs="+", default=["ipc", "mooncake", "nccl"])
    parser.add_argument("--size", type=int, default=512, metavar="MIB")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--piece-bytes", type=int, default=32 << 10)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    os.environ.setdefault("MC_FORCE_TCP", "1")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    torch.set_num_threads(1)
    block_bytes = 2 * arguments.layers * arguments.piece_bytes
    num_blocks = max(1, arguments.size * MIB // block_bytes)
    settings = Settings(
        "",
        arguments.device,
        num_blocks,
        block_bytes,
        peer_device=arguments.peer_device,
        num_layers=arguments.layers,
    )
    most = limit(settings, num_blocks * block_bytes, arguments.rounds)
    print(f"{num_blocks} blocks of {2 * arguments.layers} pieces of {arguments.piece_bytes} bytes; GB/s:")
    print(f"{'':10s}{'block-major':>12s}{'layer-major':>12s}{'ratio':>8s}{'limit':>8s}")
    for backend in arguments.backends:
        chosen = msgspec.structs.replace(settings, backend=backend)
        whole, layers, detail = asyncio.run(compare(chosen, arguments.rounds))
        rates = rate(whole), rate(layers)
        print(
            f"{backend:10s}{rates[0] / 1e9:12.2f}{rates[1] / 1e9:12.2f}{rates[1] / rates[0]:8.2f}{most / 1e9:8.2f}"
            f"   {detail}",
            flush=True,
        )


if __name__ == "__main__":
    main()
