"""Time of each product of a step on CUDA, by our kernels and by cuBLAS, and whether `choose` takes the fastest.

    python benchmarks/cuda_products.py --model Qwen3-8B --rows 1 8 64

For each of a layer's four products and the head, the table has:
microseconds by small_linear, skinny_linear and cuBLAS, each with the norm, gate or addition that belongs to it, as
CudaProducts computes it; the time of the weights' bytes at the rate of a pure read, measured in the same run; and the
kernel that `choose` takes, marked where another is over 5 % faster.
A `skinny` product of normed rows gets them half normed by the product before it, whose time includes that. With several
ranks it does not, because a sum is between the two. That sum is not in these times.
One time is the median of seven replays of a CUDA graph. Its calls take turns with different weights, together several
times what the second-level cache holds. Each result is compared with a product in float32. The weights are random
bfloat16 numbers, without biases.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import triton

from hbserve_core.bench.device_limits import measure_limits
from hbserve_core.cuda_runner.kernels.dependent_launch import num_processors
from hbserve_core.cuda_runner.kernels.few_rows_linear import (
    TILE_OUTPUTS,
    ScaledRows,
    SkinnyWorkspace,
    add_skinny_linear,
    num_tiles,
    skinny_linear,
    small_linear,
)
from hbserve_core.cuda_runner.kernels.pointwise import gate_mul, rms_norm
from hbserve_core.cuda_runner.products import Choice, Kind, choose
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.layers import Linear
from hbserve_core.model.model_config import ModelConfig, load_model_config
from hbserve_core.model.shard import Shard, check_divisible

T = TypeVar("T")
DTYPE = torch.bfloat16
EPS = 1e-6
ROWS = [1, 2, 4, 8, 16, 17, 32, 64, 65, 96, 128, 256]
SMALL_ROWS = (1, 2, 4)
MOST_SKINNY_ROWS = 128
KERNELS = ("small", "skinny", "cublas")
CACHES = 5
"""The weights of one product take turns in as many times the second-level cache as this."""
REPLAYS = 7
MOST_ERROR = 1e-2
MUCH = 1.05


def shape(name: str, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int) -> ModelConfig:
    """Return the shape of a model like Llama with one layer, read as any model's is."""
    content = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content))
        return replace(load_model_config(folder), path=Path(name))


MODELS = {
    str(model.path): model
    for model in (
        shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152),
        shape("Qwen3-0.6B", 1024, 3072, 16, 8, 128, 151936),
        shape("Qwen3-4B", 2560, 9728, 32, 8, 128, 151936),
        shape("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256),
        shape("Qwen3-8B", 4096, 12288, 32, 8, 128, 151936),
        shape("Qwen3-32B", 5120, 25600, 64, 8, 128, 151936),
    )
}


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("no CUDA device: what is measured here are kernels of one", file=sys.stderr)
        return 2
    device, shard = torch.device("cuda"), Shard(0, args.tensor_parallel_size)
    try:
        for name in args.model:
            check_divisible(MODELS[name], shard.size)
    except InvalidInstanceConfig as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limits = measure_limits(device, DTYPE)
    print(f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name(device)}, {DTYPE}")
    print(f"{limits}; tensor_parallel_size {shard.size}; times in microseconds", flush=True)
    found = []
    for name in args.model:
        for product in products(MODELS[name], shard):
            for measured in measure(name, product, args.rows, limits.read_bytes_per_s, device):
                print(measured, flush=True)
                found.append(measured)
    print(summary(found))
    return 1 if any(measured.is_wrong for measured in found) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=str([*MODELS]))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    args = parser.parse_args()
    if min(args.rows) < 1 or args.tensor_parallel_size < 1:
        parser.error("--rows and --tensor-parallel-size: expected numbers >= 1")
    return args


# ---- what is multiplied ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    name: str
    outputs: int
    """Number of rows of the weights; for gates and ups, of both together."""
    inputs: int
    reads_norm: bool = False
    follows_sum: bool = False
    """Whether a sum over ranks comes before it, so that the product before could not begin the norm."""
    gated: bool = False
    adds: bool = False

    @property
    def kind(self) -> Kind:
        return "gated" if self.gated else "normed" if self.reads_norm else "plain"


def products(whole: ModelConfig, shard: Shard) -> list[Product]:
    """Return a rank's part of the products of one layer, and of the head."""
    model = shard.config(whole)
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    of_normed = partial(Product, inputs=hidden, reads_norm=True, follows_sum=shard.size > 1)
    adds = shard.size == 1
    return [
        of_normed("qkv", heads + 2 * kv_heads),
        Product("output", hidden, heads, adds=adds),
        of_normed("gate_up", 2 * inner, gated=True),
        Product("down", hidden, inner, adds=adds),
        of_normed("head", shard.num_tokens(model.vocab_size)),
    ]


class Operands:
    """The operands of one product (rows, and several weights), and every way to multiply them."""

    def __init__(self, product: Product, most_rows: int, num_weights: int, device: torch.device) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=DTYPE, device=device)

        self._product = product
        self._x = random(most_rows, product.inputs)
        self._norm = torch.rand(product.inputs, dtype=DTYPE, device=device)
        self._next_norm = torch.rand(product.outputs, dtype=DTYPE, device=device)
        self.linears = [Linear(random(product.outputs, product.inputs).mul_(0.02)) for _ in range(num_weights)]
        self._before = random(most_rows, product.outputs) if product.adds else None
        self._num_processors = num_processors(device)
        self._workspace = SkinnyWorkspace(self._num_processors, MOST_SKINNY_ROWS, device)

    def choice(self, rows: int) -> Choice:
        product = self._product
        size = product.outputs, product.inputs
        return choose(rows, size, DTYPE.itemsize, product.kind, self._num_processors)

    def ways(self, rows: int) -> dict[str, Callable[[Linear], torch.Tensor]]:
        """Return, by kernel, the ways that can take so many rows. Each adds to numbers of its own."""
        found: dict[str, Callable[[Linear], torch.Tensor]] = {}
        if rows in SMALL_ROWS:
            found["small"] = partial(self._small, *self._given(rows))
        if rows <= MOST_SKINNY_ROWS:
            found["skinny"] = self._skinny(*self._given(rows))
        return found | {"cublas": partial(self._cublas, *self._given(rows))}

    def _given(self, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows that are multiplied, and those to which the result is added."""
        return self._x[:rows], None if self._before is None else self._before[:rows].clone()

    def expected(self, rows: int) -> torch.Tensor:
        """Return the result in float32, with the first weights."""
        product, exact = self._product, self._x[:rows].float()
        if product.reads_norm:
            exact = F.rms_norm(exact, (product.inputs,), self._norm.float(), EPS)
        result = exact @ self.linears[0].weight.float().t()
        if product.gated:
            gate, up = result.chunk(2, dim=-1)
            return F.silu(gate) * up
        return result if self._before is None else result + self._before[:rows].float()

    def _small(self, x: torch.Tensor, target: torch.Tensor | None, linear: Linear) -> torch.Tensor:
        norm = (self._norm, EPS) if self._product.reads_norm else None
        return small_linear(x, linear.weight, norm=norm, add_to=target, gated=self._product.gated)

    def _cublas(self, x: torch.Tensor, target: torch.Tensor | None, linear: Linear) -> torch.Tensor:
        if target is not None:
            linear.add_to(target, x)
            return target
        result = linear(rms_norm(x, self._norm, EPS) if self._product.reads_norm else x)
        return gate_mul(result) if self._product.gated else result

    def _skinny(self, x: torch.Tensor, target: torch.Tensor | None) -> Callable[[Linear], torch.Tensor]:
        product, padded = self._product, max(16, 1 << (len(x) - 1).bit_length())
        # Up to 64 the splits are the same for any number of rows, and 16 are always for this kernel.
        splits = self.choice(16).splits if len(x) <= 64 else 1
        tiling: dict[str, Any] = {"padded_rows": padded, "splits": splits, "workspace": self._workspace}
        begun = half_normed(x, self._norm, padded) if product.reads_norm and not product.follows_sum else None

        def multiply(linear: Linear) -> torch.Tensor:
            if target is not None:
                add_skinny_linear(target, x, linear.weight, next_norm=self._next_norm, **tiling)
                return target
            given = x if begun is None else begun
            if product.reads_norm and begun is None:
                given = rms_norm(x, self._norm, EPS)
            return skinny_linear(given, linear.weight, eps=EPS, gated=product.gated, **tiling)

        return multiply


def half_normed(x: torch.Tensor, norm: torch.Tensor, padded_rows: int) -> ScaledRows:
    """Return rows as a skinny product leaves them for a norm."""
    rows, size = x.shape
    tiles = num_tiles(size, False)
    padded = F.pad(x.float() ** 2, (0, tiles * TILE_OUTPUTS - size, 0, padded_rows - rows))
    squares = padded.view(padded_rows, tiles, TILE_OUTPUTS).sum(-1).t().contiguous()
    return ScaledRows((x.float() * norm.float()).to(x.dtype), squares)


# ---- how it is measured ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    model: str
    product: str
    rows: int
    times_us: dict[str, float]
    """Times by kernel."""
    read_us: float
    chosen: str
    errors: dict[str, float]
    """Errors by kernel, relative to the product in float32."""

    @property
    def better(self) -> str | None:
        """The fastest kernel, if it is much faster than the chosen one; else None."""
        fastest = min(self.times_us, key=self.times_us.__getitem__)
        return fastest if self.times_us[self.chosen] > MUCH * self.times_us[fastest] else None

    @property
    def gain(self) -> str:
        ratio = self.times_us[self.better or self.chosen] / self.times_us[self.chosen]
        return f"{self.better} takes {ratio:.2f} of {self.chosen}"

    @property
    def is_wrong(self) -> bool:
        return not all(error <= MOST_ERROR for error in self.errors.values())

    def __str__(self) -> str:
        times = "".join(
            f"  {kernel} {self.times_us[kernel]:8.2f}" if kernel in self.times_us else f"  {kernel}        -"
            for kernel in KERNELS
        )
        share = self.read_us / self.times_us[self.chosen]
        line = f"{self.model:12} {self.product:7} {self.rows:3}{times}  read {self.read_us:7.2f}"
        line += f"  chosen {self.chosen:6} at {share:.2f} of the reading rate"
        if self.better:
            line += f"  ! {self.gain}"
        wrong = [f"{kernel} {error:.1e}" for kernel, error in self.errors.items() if not error <= MOST_ERROR]
        return f"{line}  WRONG by {', '.join(wrong)}" if wrong else line


def measure(
    model: str, product: Product, row_counts: list[int], read_bytes_per_s: float, device: torch.device
) -> Iterator[Measured]:
    """Measure a product for each number of rows."""
    weight_bytes = product.outputs * product.inputs * DTYPE.itemsize
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    num_weights = max(2, -(-CACHES * cache_bytes // weight_bytes))
    operands = Operands(product, max(row_counts), num_weights, device)
    expected = operands.expected(max(row_counts))
    for rows in row_counts:
        errors = {
            kernel: relative_error(multiply(operands.linears[0]), expected[:rows])
            for kernel, multiply in operands.ways(rows).items()
        }
        times_us = {
            kernel: microseconds(multiply, operands.linears) for kernel, multiply in operands.ways(rows).items()
        }
        read_us = 1e6 * weight_bytes / read_bytes_per_s
        yield Measured(model, product.name, rows, times_us, read_us, operands.choice(rows).kernel, errors)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def microseconds(work: Callable[[T], object], given: Sequence[T]) -> float:
    """Compile `work`, and return the microseconds of one call in a graph that calls it with each of `given` in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(given[0])
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for each in given:
                work(each)
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / len(given))
    return statistics.median(times)


def summary(found: list[Measured]) -> str:
    lost = [f"{each.model} {each.product} {each.rows} ({each.gain})" for each in found if each.better]
    return f"another than the chosen is over 5 % faster: {', '.join(lost) or 'nowhere'}"


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
