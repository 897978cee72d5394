"""Attention of one decode step, by number of rows and length of contexts, beside the time that its bytes need.

    python benchmarks/decode_attention.py --heads 32,8 16,4

Contexts are equal, random, or short with two long ones among them, the longest first, as a step has them. The columns
have 2, 3 and 4 pieces for each multiprocessor, and SplitKV's own number, with its share of the limit. `--tilings` also
measures other tilings of the kernel: tokens of a tile, stages of the pipeline and warps of a program. Which number and
which tiling is fastest depends on how many programs fit on the device at once, and on how many there are.
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
from hbserve_core.cuda_runner import step_packer
from hbserve_core.cuda_runner.kernels import decode_attention as kernel
from hbserve_core.cuda_runner.kernels.attention_parts import Scores
from hbserve_core.cuda_runner.kernels.dependent_launch import num_processors
from hbserve_core.cuda_runner.step_packer import SplitKV

BLOCK_SIZE, HEAD_DIM, NUM_LAYERS, NUM_BLOCKS = 16, 128, 10, 18600
Tiling = tuple[int, int, int]
TILINGS: list[Tiling] = [(64, 2, 2), (64, 5, 2), (32, 4, 1), (32, 5, 1), (32, 4, 2), (128, 2, 4)]
EQUAL = {540: (1, 8, 16, 32, 64, 80, 96, 128, 192, 256), 1150: (16, 64, 96, 128, 256), 5000: (4, 16), 16000: (1, 4, 12)}
"""Numbers of rows, by the length of their contexts."""
OTHERS = (8, 16, 32, 48, 64, 80, 100, 128, 200)


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
    names = ["x".join(map(str, each)) for each in tilings]
    print("us a layer:          bytes       2       3       4   own, share", *names)
    for heads in arguments.heads:
        num_heads, num_kv_heads = map(int, heads.split(","))
        step = Step(num_heads, num_kv_heads, torch.float8_e4m3fn if arguments.narrow else torch.bfloat16)
        for name, contexts in workloads():
            needed_us = 1e6 * step.bytes_of(contexts) / limits.read_bytes_per_s
            found = [step.microseconds(contexts, number) for number in (2, 3, 4)]
            own = step.microseconds(contexts)
            others = [f"{step.microseconds(contexts, tiling=each):7.1f}" for each in tilings]
            columns = " ".join(f"{each:7.1f}" for each in [needed_us, *found, own])
            print(f"{heads:5} {name:13} {columns} {needed_us / own:5.2f}", *others)
            sys.stdout.flush()
    return 0


def workloads() -> list[tuple[str, npt.NDArray[np.int32]]]:
    """Return names and contexts of steps."""
    equal = [(f"{length}x{rows}", np.full(rows, length)) for length, counts in EQUAL.items() for rows in counts]
    uniform = [(f"60-1900 {rows}", np.random.default_rng(rows).integers(60, 1900, rows)) for rows in OTHERS]
    skewed = [(f"lognormal {rows}", lognormal(rows)) for rows in OTHERS]
    two_long = [(f"two long {rows}", np.array([300] * (rows - 2) + [8000] * 2)) for rows in OTHERS]
    found = [*equal, *uniform, *skewed, *two_long]
    return [(name, np.sort(contexts)[::-1].astype(np.int32)) for name, contexts in found]


def lognormal(rows: int) -> npt.NDArray[np.float64]:
    """Return contexts of 30 to 16,000 tokens; half of them have fewer than 900."""
    lengths: npt.NDArray[np.float64] = np.exp(np.random.default_rng(rows).normal(np.log(900), 1, rows)).clip(30, 16000)
    return lengths


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
        self, contexts: npt.NDArray[np.int32], number: int | None = None, tiling: Tiling | None = None
    ) -> float:
        """Return how long one layer takes. number: pieces for each multiprocessor; it and tiling: None for our own."""
        chosen = step_packer._PIECES if number is None else ((float("inf"), number, 0.0),)
        with patch.object(step_packer, "_PIECES", chosen):
            cut = self.split.cut(contexts)
        num_heads, num_kv_heads, _ = self._heads
        rows, most = len(contexts), max(self.split.most(len(contexts)), cut.shape[1])
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
