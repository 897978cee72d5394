"""Time of prefill besides cuBLAS's products, kernel by kernel, and what the device could do.

    python benchmarks/prefill_kernels.py --model Qwen3-8B

Attention of several batches of prompts is computed in three ways: by either of our kernels, from paged keys, with
queries rotated on the way; and by cuDNN, for prompts of equal lengths that lie one after the other, already rotated.
Operations are those that a causal mask leaves.
Then follow, for several numbers of rows: gates and ups (the product by cuBLAS, with `gate_mul` behind it, and with the
gates in it); and what only reads and writes rows (norms, and keys and values into blocks).
One time is the median of seven replays of a CUDA graph of several calls. Numbers are random bfloat16.
packages/hbserve-core/tests/test_kernels.py tests whether results are right.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import cuda_products
import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from hbserve_core.bench.device_limits import DeviceLimits, measure_limits
from hbserve_core.cuda_runner.kernels import prefill_attention
from hbserve_core.cuda_runner.kernels.hopper import IS_HOPPER
from hbserve_core.cuda_runner.kernels.hopper_attention import hopper_prefill_attention
from hbserve_core.cuda_runner.kernels.hopper_gated import hopper_gated
from hbserve_core.cuda_runner.kernels.pointwise import gate_mul, rms_norm
from hbserve_core.cuda_runner.kernels.prefill_attention import (
    new_tokens_per_tile,
    store_kv,
    triton_prefill_attention,
)
from hbserve_core.model.rope import angle_table
from hbserve_core.model.rope_config import RopeConfig

DTYPE = torch.bfloat16
EPS = 1e-6
BLOCK_SIZE, HEAD_DIM = 16, 128
CALLS = 5


@dataclass(frozen=True)
class Model:
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int


MODELS = {"Qwen3-0.6B": Model(1024, 3072, 16, 8), "Qwen3-8B": Model(4096, 12288, 32, 8)}
SHORT, LONG = [(1, 128, 0), (1, 256, 0), (1, 128, 2000)], [(1, 2048, 0), (8, 2048, 0), (1, 16384, 0)]
BATCHES = [*SHORT, *LONG, (4, 512, 3000), (64, 16, 500)]
"""Batches: number of prompts, new tokens of each, and tokens before these."""
ROWS = [128, 256, 512, 1024, 2048, 4096, 16384]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=str([*MODELS]))
    models = parser.parse_args().model
    if not IS_HOPPER:
        print("no Hopper GPU: what is measured here are kernels of one", file=sys.stderr)
        return 2
    limits = measure_limits(torch.device("cuda"), DTYPE)
    print(f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}\n{limits}")
    for name in models:
        for prompts, new, before in BATCHES:
            print(f"{name:10} {prompts:2} x {new:5} after {before:4}: {attention(MODELS[name], prompts, new, before)}")
            sys.stdout.flush()
        for rows in ROWS:
            print(f"{name:10} {rows:5} rows: {row_by_row(MODELS[name], rows, limits)}", flush=True)
    return 0


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def microseconds(work: Callable[[], object]) -> float:
    """Return the microseconds of one call, among several that follow each other."""
    return cuda_products.microseconds(lambda _: work(), range(CALLS))


def line(times: dict[str, float], amounts: dict[str, float], unit: str) -> str:
    """Format the microseconds and the rate (operations or bytes a second) of each kernel."""
    scale = 1e12 if unit == "TFLOP/s" else 1e9
    return "; ".join(
        f"{name} {us:.1f} us" + (f" {1e6 * amounts[name] / us / scale:.0f} {unit}" if name in amounts else "")
        for name, us in times.items()
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(model: Model, prompts: int, new: int, before: int) -> str:
    step = Step(model, prompts, new, before)
    times = {"Triton": microseconds(step.triton), "Hopper": microseconds(step.hopper)}
    if prompts * new < 512:  # where programs share a tile
        with patch.object(prefill_attention, "_PARTS", {}):
            times["one program a tile"] = microseconds(step.triton)
    if not before:
        q, k, v = (random(prompts, count, new, HEAD_DIM) for count in step.counts)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            times["cuDNN"] = microseconds(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
    return line(times, dict.fromkeys(times, step.flops), "TFLOP/s")


class Step:
    """The attention of one layer over the new tokens of several prompts."""

    def __init__(self, model: Model, prompts: int, new: int, before: int) -> None:
        num_heads, num_kv_heads, context = model.num_heads, model.num_kv_heads, before + new
        blocks = -(-context // BLOCK_SIZE)
        self.counts = (num_heads, num_kv_heads, num_kv_heads)
        self.flops = prompts * 4 * num_heads * HEAD_DIM * (new * before + new * (new + 1) / 2)
        self._out = random(prompts * new, num_heads * HEAD_DIM)
        self._qkv = random(prompts * new, sum(self.counts) * HEAD_DIM)
        self._pool = random(prompts * blocks, 2, 2, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
        self._angles = angle_table(RopeConfig("default", 1e6), HEAD_DIM, context).cuda()
        self._norm = (random(num_heads + num_kv_heads, HEAD_DIM), EPS)
        per_tile = new_tokens_per_tile(DTYPE, (num_heads, num_kv_heads, HEAD_DIM))
        # Those of the longest context first, as StepPacker has them.
        tiles = [(i, first) for first in range(0, new, per_tile)[::-1] for i in range(prompts)]
        self._tables, self._width = int32(torch.randperm(prompts * blocks)), int32([blocks])
        self._tiles = int32(tiles).t().contiguous()
        self._sequences = int32([[i * new, new, context] for i in range(prompts)]).t().contiguous()

    def triton(self) -> None:
        triton_prefill_attention(*self._arguments())

    def hopper(self) -> None:
        hopper_prefill_attention(*self._arguments())

    def _arguments(self):
        return (
            self._qkv, self._out, self._pool, 1, self._angles, self._norm, self._tables, self._width, self._tiles,
            self._sequences,
        )  # fmt: skip


def int32(numbers: Sequence[object] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(numbers, dtype=torch.int32).cuda()


# ---- row by row ------------------------------------------------------------------------------------------------------


def row_by_row(model: Model, rows: int, limits: DeviceLimits) -> str:
    hidden, inner, heads = model.hidden_size, model.intermediate_size, model.num_heads + 2 * model.num_kv_heads
    x, weight, norm = random(rows, hidden), random(2 * inner, hidden), random(hidden)
    products = {
        "cuBLAS": microseconds(lambda: F.linear(x, weight)),
        "cuBLAS, gates": microseconds(lambda: gate_mul(F.linear(x, weight))),
        "with gates": microseconds(lambda: hopper_gated(x, weight)),
    }
    blocks, size = -(-rows // BLOCK_SIZE), DTYPE.itemsize
    pool = random(blocks, 1, 2, BLOCK_SIZE, model.num_kv_heads, HEAD_DIM)
    angles, qkv = random(rows, HEAD_DIM).float(), random(rows, heads * HEAD_DIM)
    key_norm, positions = (random(heads, HEAD_DIM), EPS), int32(list(range(rows)))
    passes = {
        "norm": microseconds(lambda: rms_norm(x, norm, EPS)),
        "store": microseconds(lambda: store_kv(qkv, positions, positions, angles, key_norm, pool, 0)),
    }
    moved = {"norm": 2.0 * rows * hidden * size, "store": 4.0 * rows * model.num_kv_heads * HEAD_DIM * size}
    of_products = line(products, dict.fromkeys(products, 4.0 * rows * hidden * inner), "TFLOP/s")
    return f"{of_products}; {line(passes, moved, 'GB/s')}"


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
