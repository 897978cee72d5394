"""Products with narrow weights on CUDA. Nothing here is imported unless a model has such.

    rows        8-bit floats                              4 bits
    … 64        a skinny product, as of 16 bits           the same
    … 128       the same where there are tiles enough     the same
    … 256       tiles of rows                             tiles of rows
    … 512       widened into a scratch, then cuBLAS       tiles of rows
    513 …       as above                                  widened into a scratch, then cuBLAS
Where the rows change hands follows from bytes and has not been measured on a card: widening reads a weight, writes it
in 16 bits and lets cuBLAS read that: 5 bytes of each 8-bit float. benchmarks/narrow_products.py measures both.
"""

import torch

from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix, tiled_linear, widen
from hbserve_core.model.layers import Linear
from hbserve_core.model.narrow_weight import NarrowWeight

_MOST_TILED_ROWS = {8: 256, 4: 512}
"""By bits. More than these are widened first."""


class NarrowLinear(Linear):
    """x W^T + b, with W as it is stored, and scales."""

    weight: NarrowMatrix  # type: ignore[assignment]  # it stands for a tensor wherever products are chosen
    is_narrow = True

    def __init__(self, weight: NarrowWeight, bias: torch.Tensor | None = None) -> None:
        self.weight = NarrowMatrix(weight)
        self.bias = bias
        self._most_tiled = _MOST_TILED_ROWS[8 if weight.zeros is None else 4]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        out = torch.empty((len(inputs), len(self.weight)), dtype=inputs.dtype, device=inputs.device)
        self.into(out, inputs)
        return out

    def into(self, out: torch.Tensor, inputs: torch.Tensor) -> None:
        if len(inputs) > self._most_tiled:
            Linear(widen(self.weight, inputs.dtype), self.bias).into(out, self.weight.arranged(inputs))
        else:
            tiled_linear(inputs, self.weight, self.bias, out, adds=False)

    def add_to(self, target: torch.Tensor, inputs: torch.Tensor) -> None:
        if len(inputs) > self._most_tiled:
            Linear(widen(self.weight, inputs.dtype), self.bias).add_to(target, self.weight.arranged(inputs))
        else:
            tiled_linear(inputs, self.weight, self.bias, target, adds=True)
