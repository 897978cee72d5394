"""Attention of one decode step, by number of rows and length of contexts, beside the time that its bytes need.

    python benchmarks/decode_attention.py --heads 32,8 16,4

Contexts are equal, random, or short with two long ones among them. One column has the pieces in the order of rows, the
other one longest first, as SplitKV orders them. `--tilings` also measures other tilings of the kernel, with pieces
longest first: tokens of a tile, stages of the pipeline and warps of a program. Which one is fastest depends on how many
programs fit on the device at once, and on how many there are.
One time is the median of seven replays of a CUDA graph of ten layers. Whether results are right is for
packages/hbserve-core/tests/test_kernels.py. Random bfloat16 numbers, or 8-bit floats in the pool with `--narrow`.
"""

import argparse
import sys
from collections.abc import Sequence
from unittest.mock import patch

import cuda_products
import numpy as np
import numpy.typing as npt
import torch
import triton

from hbserve_core.bench.device_limits import measure_limits
from hbserve_core.cuda_runner.kernels import decode_attention as kernel
from hbserve_core.cuda_runner.kernels.attention_parts import Scores
from hbserve_core.cuda_runner.kernels.dependent_launch import num_processors
from hbserve_core.cuda_runner.step_packer import SplitKV

BLOCK_SIZE, HEAD_DIM, NUM_LAYERS, NUM_BLOCKS = 16, 128, 10, 18600
Tiling = tuple[int, int, int]
TILINGS: list[Tiling] = [(64, 2, 2), (64, 5, 2), (32, 4, 1), (32, 5, 1), (32, 4, 2), (128, 2, 4)]
EQUAL = {540: (1, 8, 16, 32, 64, 80, 96, 128, 192, 256), 1150: (16, 64, 96, 128, 256), 5000: (4, 16), 16000: (1, 4, 12)}
"""Numbers of rows, by the length of their contexts."""
OTHERS = (16, 32, 64, 100, 128, 200, 256)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whose = "query heads and key heads; by default those of Qwen3-8B, of one of its two ranks, and of Qwen3-0.6B"
    parser.add_argument("--heads", nargs="+", default=["32,8", "16,4", "16,8"], metavar="N,K", help=whose)
    parser.add_argument("--narrow", action="store_true", help="keys and values in 8 bits")
    parser.add_argument("--tilings", action="store_true", help="other tilings too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    limits = measure_limits(torch.device("cuda"), torch.bfloat16)
    print(f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}\n{limits}")
    tilings = TILINGS if arguments.tilings else []
    print("us a layer:     bytes  by row  longest first, share", *("x".join(map(str, each)) for each in tilings))
    for heads in arguments.heads:
        num_heads, num_kv_heads = map(int, heads.split(","))
        step = Step(num_heads, num_kv_heads, torch.float8_e4m3fn if arguments.narrow else torch.bfloat16)
        for name, contexts in workloads():
            needed_us = 1e6 * step.bytes_of(contexts) / limits.read_bytes_per_s
            cut = step.split.cut(contexts)
            by_row, longest_first = (step.microseconds(contexts, each) for each in (in_order_of_rows(cut), cut))
            others = [f"{step.microseconds(contexts, cut, each):7.1f}" for each in tilings]
            share = needed_us / longest_first
            print(f"{heads:5} {name:9} {needed_us:6.1f} {by_row:7.1f} {longest_first:7.1f} {share:5.2f}", *others)
            sys.stdout.flush()
    return 0


def workloads() -> list[tuple[str, npt.NDArray[np.int32]]]:
    """Return names and contexts of steps."""
    equal = [(f"{length}x{rows}", [length] * rows) for length, counts in EQUAL.items() for rows in counts]
    mixed = [(f"mixed {rows}", np.random.default_rng(rows).integers(60, 1900, rows)) for rows in OTHERS]
    skewed = [(f"skewed {rows}", [300] * (rows - 2) + [8000] * 2) for rows in OTHERS]
    return [(name, np.array(contexts, dtype=np.int32)) for name, contexts in [*equal, *mixed, *skewed]]


def in_order_of_rows(cut: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return cut[:, np.lexsort((cut[1], cut[0]))]


class Step:
    """The attention of a decode step, by a model with these heads."""

    def __init__(self, num_heads: int, num_kv_heads: int, stored: torch.dtype) -> None:
        self._heads = num_heads, num_kv_heads, HEAD_DIM
        self.split = SplitKV(num_kv_heads, num_processors(torch.device("cuda")))
        shape = NUM_BLOCKS, NUM_LAYERS, 2, BLOCK_SIZE, num_kv_heads, HEAD_DIM
        self._pool = torch.randn(shape, dtype=torch.bfloat16, device="cuda").to(stored)
        self._angles = torch.randn((1 << 15, HEAD_DIM), device="cuda")
        self._norm = torch.ones((num_heads + num_kv_heads) * HEAD_DIM, dtype=torch.bfloat16, device="cuda"), 1e-6

    def bytes_of(self, contexts: npt.NDArray[np.int32]) -> int:
        """Return the bytes of all keys and values of one layer."""
        return int(contexts.sum()) * 2 * self._heads[1] * HEAD_DIM * self._pool.dtype.itemsize

    def microseconds(
        self, contexts: npt.NDArray[np.int32], cut: npt.NDArray[np.int32], tiling: Tiling | None = None
    ) -> float:
        """Return how long one layer takes. tiling: None for the kernel's own choice."""
        num_heads, num_kv_heads, _ = self._heads
        rows, most = len(contexts), self.split.most(len(contexts))
        pieces = np.full((6, -(-most // 4) * 4), -1, dtype=np.int32)
        pieces[:, : cut.shape[1]] = cut
        tables = block_tables(contexts)
        qkv = torch.randn((rows, (num_heads + 2 * num_kv_heads) * HEAD_DIM), dtype=torch.bfloat16, device="cuda")
        out = torch.empty((rows, num_heads * HEAD_DIM), dtype=torch.bfloat16, device="cuda")
        given = int32(tables.flatten()), int32([tables.shape[1]]), int32(pieces)[:, :most]
        workspace = kernel.DecodeWorkspace(rows, most, self._heads, qkv.device)

        def attend(layer: int) -> None:
            kernel.decode_attention(
                qkv, out, self._pool, layer, self._angles, self._norm, *given, workspace, scores=Scores(HEAD_DIM**-0.5)
            )

        own = kernel._tiling
        with patch.object(kernel, "_tiling", own if tiling is None else lambda *_: tiling):
            return cuda_products.microseconds(attend, range(NUM_LAYERS))


def block_tables(contexts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Give each row blocks from all over the pool; returns (R, width)."""
    counts = -(-contexts // BLOCK_SIZE)
    blocks = np.random.default_rng(0).permutation(NUM_BLOCKS)[: counts.sum()]
    tables = np.zeros((len(contexts), counts.max()), dtype=np.int32)
    tables[np.arange(counts.max()) < counts[:, None]] = blocks
    return tables


def int32(numbers: Sequence[int] | npt.NDArray[np.int32]) -> torch.Tensor:
    return torch.as_tensor(numbers, dtype=torch.int32).cuda()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
