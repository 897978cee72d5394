"""Time of each product of a step on CUDA with weights of 8 and 4 bits, compared with 16 bits in the same run.

    python benchmarks/narrow_products.py --model Qwen3-8B --bits 8 4 --rows 1 16 64 256 2048

For each of a layer's four products the table has: microseconds of the 16-bit product that `choose` takes, and of the
narrow one that CudaProducts computes, each with the norm, gate or addition that belongs to it; the ratio of the two;
and the share of the narrow one's time that its bytes (weights, scales and zeros) need, at the rate of a pure read
measured in the same run.
For more rows than a skinny product takes, it has microseconds of every other way: tiles of 16-bit rows, tiles of 8-bit
rows, and weights that are widened for cuBLAS, of 16-bit rows alone and without what belongs to the product.
Times are taken as in cuda_products.py. Weights are random, with blocks of 128 x 128 and groups of 128. Each result is
compared with a float32 product of the widened weights; rows in 8 bits may be further from it.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from cuda_products import CACHES, DTYPE, EPS, MODELS, MOST_ERROR, Operands, Product, microseconds, products

from hbserve_core.bench.device_limits import measure_limits
from hbserve_core.cuda_runner.kernels.narrow_linear import eight_bit_linear, tiled_linear, widen
from hbserve_core.cuda_runner.narrow_linear import NarrowLinear
from hbserve_core.cuda_runner.products import CudaProducts, ResidualStream
from hbserve_core.model.layers import Linear, RmsNorm
from hbserve_core.model.narrow_weight import NarrowWeight, in_words, packed
from hbserve_core.model.shard import Shard

ROWS = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048]
GROUP = 128
MOST_SKINNY_ROWS = 64
MOST_ERROR_OF_8_BIT_ROWS = 5e-2


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("no CUDA device: what is measured here are kernels of one", file=sys.stderr)
        return 2
    device, are_right = torch.device("cuda"), True
    limits = measure_limits(device, DTYPE)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}; {limits}; times in microseconds")
    for name in args.model:
        for product in products(MODELS[name], Shard())[:-1]:
            for bits in args.bits:
                for rows in args.rows:
                    line, is_right = measure(product, bits, rows, limits.read_bytes_per_s, device)
                    are_right &= is_right
                    print(f"{name:12} {line}", flush=True)
    return 0 if are_right else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name, model in MODELS.items() if model.hidden_size % GROUP == 0]
    parser.add_argument("--model", nargs="+", choices=models, default=["Qwen3-8B"], metavar="NAME", help=str(models))
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4), default=[8, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    args = parser.parse_args()
    if min(args.rows) < 1:
        parser.error("--rows: expected numbers >= 1")
    return args


def invented(outputs: int, inputs: int, bits: int, device: torch.device) -> NarrowWeight:
    groups = inputs // GROUP
    if bits == 8:
        values = torch.randn(outputs, inputs, device=device).mul_(50).to(torch.float8_e4m3fn)
        return NarrowWeight(in_words(values, GROUP), torch.full((groups, outputs), 4e-4, device=device), None, GROUP)
    numbers = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=device)
    scales = torch.full((groups, outputs), 4e-3, dtype=torch.float16, device=device)
    zeros = torch.full((groups, outputs), 8, dtype=torch.uint8, device=device)
    return NarrowWeight(packed(numbers, GROUP), scales, zeros, GROUP)


class Computed:
    """Computes one product of some rows, by CudaProducts, with any linear of its shape."""

    def __init__(self, product: Product, rows: int, device: torch.device) -> None:
        self._product, self._by = product, CudaProducts(device)
        self._x = torch.randn(rows, product.inputs, dtype=DTYPE, device=device)
        self._norm = RmsNorm(torch.rand(product.inputs, dtype=DTYPE, device=device), EPS)
        self._before = torch.randn(rows, product.outputs, dtype=DTYPE, device=device)

    def __call__(self, linear: Linear) -> torch.Tensor:
        """Compute as a layer does, except for halves of norms, which the product before would have computed."""
        if self._product.gated:
            return self._by.gated(ResidualStream(self._x), self._norm, linear)
        if self._product.reads_norm:
            return self._by.of_normed(ResidualStream(self._x), self._norm, linear)
        stream = ResidualStream(self._before)
        self._by.add_to(stream, self._x, linear, None)
        return stream.rows

    def error(self, weight: NarrowWeight) -> float:
        """Return the error of the product with this weight, relative to the one in float32."""
        exact, before = self._x.float(), self._before.float()
        if self._product.reads_norm:
            exact = F.rms_norm(exact, (self._product.inputs,), self._norm.weight.float(), EPS)
        expected = exact @ weight.widened().t()
        if self._product.gated:
            gate, up = expected.chunk(2, dim=-1)
            expected = F.silu(gate) * up
        elif not self._product.reads_norm:
            expected += before
        return float((self(NarrowLinear(weight)).float() - expected).norm() / expected.norm())


def measure(product: Product, bits: int, rows: int, read_bytes_per_s: float, device: torch.device) -> tuple[str, bool]:
    """Measure a product. Returns a line of the table, and whether the result is right."""
    computed = Computed(product, rows, device)
    cache_bytes = CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    sample = invented(product.outputs, product.inputs, bits, device)
    error = computed.error(sample)
    wide = Operands(product, 1, max(2, -(-cache_bytes // (2 * product.outputs * product.inputs))), device).linears
    wide_us = microseconds(computed, wide)
    del wide
    count = max(2, -(-cache_bytes // sample.nbytes))
    narrow = [NarrowLinear(invented(product.outputs, product.inputs, bits, device)) for _ in range(count)]
    narrow_us = microseconds(computed, list(narrow))
    share = 1e6 * sample.nbytes / read_bytes_per_s / narrow_us
    line = (
        f"{product.name:7} {bits} bits {rows:5} rows: 16 bits {wide_us:8.2f}  narrow {narrow_us:8.2f} "
        f"(x {wide_us / narrow_us:.2f}, {share:.2f} of the reading rate){ways_of_many(product, narrow, rows)}"
    )
    is_right = error <= (MOST_ERROR_OF_8_BIT_ROWS if bits == 8 and rows > MOST_SKINNY_ROWS else MOST_ERROR)
    return (line if is_right else f"{line}  WRONG by {error:.1e}"), is_right


def ways_of_many(product: Product, linears: list[NarrowLinear], rows: int) -> str:
    if rows <= MOST_SKINNY_ROWS:
        return ""
    device = linears[0].weight.words.device
    x = torch.randn(rows, product.inputs, dtype=DTYPE, device=device)
    out = torch.empty(rows, product.outputs, dtype=DTYPE, device=device)

    def in_tiles(linear: NarrowLinear) -> torch.Tensor:
        tiled_linear(x, linear.weight, None, out, adds=False)
        return out

    def of_8_bit_rows(linear: NarrowLinear) -> torch.Tensor:
        eight_bit_linear(x, linear.weight, None, out, adds=False)
        return out

    ways = {"tiles": in_tiles, "widened": lambda linear: F.linear(x, widen(linear.weight, DTYPE))}
    if linears[0].weight.takes_8_bits():
        ways["tiles of 8-bit rows"] = of_8_bit_rows
    return "".join(f"  {name} {microseconds(way, list(linears)):8.2f}" for name, way in ways.items())


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
