"""Products with narrow weights on CUDA. This file is only imported if a model has such weights.

    rows        8-bit floats                              4 bits
    … 8         of small matrices as of 4 bits, else …    a product of few rows, on Hopper
    … 64        a skinny product, as of 16 bits           the same
    … 128       rows in 8-bit floats too                  a skinny product where there are tiles enough, else as below
    … 512       as above                                  tiles of rows
    513 …       as above                                  widened into a scratch, then cuBLAS
Rows in 8-bit floats are multiplied by cuBLAS if it supports the weight's scales, otherwise in tiles.
benchmarks/narrow_products.py measures the products; docs/performance-narrow.md has its results.
"""

import torch
import torch.nn.functional as F

from hbserve_core.cuda_runner.kernels.eight_bit_rows import EightBitForm, EightBitRows
from hbserve_core.cuda_runner.kernels.narrow_experts import NarrowExperts
from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix, eight_bit_linear, tiled_linear, widen
from hbserve_core.model.layers import Linear
from hbserve_core.model.narrow_weight import NarrowWeight

_MOST_TILED_ROWS = 512
"""Largest number of rows that are multiplied in tiles. For more rows, the weight is widened first."""
_BLOCK, _OUTPUTS_OF_CUBLAS, _GROUPS_OF_CUBLAS = 128, 16, 4
"""Number of outputs that share a scale, and the divisors that cuBLAS needs of the numbers of outputs and of groups of
inputs. With other numbers of groups it wants the scales padded."""


class NarrowLinear(Linear):
    """Linear layer x W^T + b, with W kept as it is stored, with scales."""

    weight: NarrowMatrix  # type: ignore[assignment]  # it stands for a tensor wherever products are chosen

    def __init__(self, weight: NarrowWeight, bias: torch.Tensor | None = None) -> None:
        self.weight = NarrowMatrix(weight)
        self.narrow_bits = self.weight.bits
        self.bias = bias
        self._scales = _scales_of_cublas(self.weight)

    def of_experts(self, count: int) -> NarrowExperts:
        return NarrowExperts(self.weight, count)

    def form_of_rows(self, inputs: torch.Tensor) -> EightBitForm | None:
        return EightBitForm(self.weight.group, self.weight.run) if self._takes_8_bits(inputs) else None

    def of_formed(self, rows: EightBitRows, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply rows that are inputs (M, I) in the form of `form_of_rows`; returns (M, O)."""
        if self._is_for_cublas(inputs):
            result = self._scaled_product(rows, inputs)
            return result if self.bias is None else result.add_(self.bias)
        out = torch.empty((len(inputs), len(self.weight)), dtype=inputs.dtype, device=inputs.device)
        eight_bit_linear(inputs, self.weight, self.bias, out, adds=False, rows=rows)
        return out

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if form := self.form_of_rows(inputs):
            return self.of_formed(form.of(inputs), inputs)
        out = torch.empty((len(inputs), len(self.weight)), dtype=inputs.dtype, device=inputs.device)
        if len(inputs) <= _MOST_TILED_ROWS:
            tiled_linear(inputs, self.weight, self.bias, out, adds=False)
        else:
            return Linear(widen(self.weight, inputs.dtype), self.bias)(self.weight.arranged(inputs))
        return out

    def into(self, out: torch.Tensor, inputs: torch.Tensor) -> None:
        out.copy_(self(inputs))

    def add_to(self, target: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the result to `target` as `Linear` does, except that a product of 8-bit floats by cuBLAS is rounded
        before it is added."""
        if self._is_for_cublas(inputs):
            target += self(inputs)
        elif self._takes_8_bits(inputs):
            eight_bit_linear(inputs, self.weight, self.bias, target, adds=True)
        elif len(inputs) <= _MOST_TILED_ROWS:
            tiled_linear(inputs, self.weight, self.bias, target, adds=True)
        else:
            Linear(widen(self.weight, inputs.dtype), self.bias).add_to(target, self.weight.arranged(inputs))

    def _takes_8_bits(self, inputs: torch.Tensor) -> bool:
        return inputs.dtype.itemsize == 2 and self.weight.takes_8_bits()

    def _is_for_cublas(self, inputs: torch.Tensor) -> bool:
        return self._scales is not None and inputs.dtype == torch.bfloat16

    def _scaled_product(self, rows: EightBitRows, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply rows in 8-bit floats by cuBLAS; returns (M, O)."""
        assert self._scales is not None
        _, words, _ = self.weight.operands(rows)
        by_row = len(self.weight.scales) == 1
        of_rows = F.ScalingType.RowWise if by_row else F.ScalingType.BlockWise1x128
        of_weight = F.ScalingType.RowWise if by_row else F.ScalingType.BlockWise128x128
        scales = rows.scales.t(), of_rows, self._scales, of_weight
        product: torch.Tensor = F.scaled_mm(
            rows.values, words.t(), *scales, output_dtype=inputs.dtype, use_fast_accum=by_row
        )
        return product[: len(inputs)]


def _scales_of_cublas(weight: NarrowMatrix) -> torch.Tensor | None:
    """Return a weight's scales as cuBLAS takes them: (1, O) by row, or (I / 128, O / 128) for blocks of 128 x 128. None
    if cuBLAS does not support such scales, or not on this card."""
    is_hopper = weight.words.is_cuda and torch.cuda.get_device_capability(weight.words.device) == (9, 0)
    groups, outputs = weight.scales.shape
    if not is_hopper or not weight.takes_8_bits() or outputs % _OUTPUTS_OF_CUBLAS:
        return None
    if groups == 1:
        return weight.scales
    if outputs % _BLOCK or groups % _GROUPS_OF_CUBLAS:
        return None
    blocks = weight.scales.view(groups, -1, _BLOCK)
    if not bool((blocks == blocks[:, :, :1]).all()):
        return None
    return blocks[:, :, 0].t().contiguous().t()
