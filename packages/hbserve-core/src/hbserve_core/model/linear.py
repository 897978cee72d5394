"""Matrix products with weights in the layout that the device likes best: the CPU's are not plain.

Shapes: T tokens, I inputs, O outputs.
"""

import logging
from functools import cache

import torch

from hbserve_core.model.layers import Linear

logger = logging.getLogger(__name__)

# The layout is chosen for a product with this many rows; it serves all others well too.
_TYPICAL_ROWS = 16


class PackedLinear(Linear):
    """The same, with W in oneDNN's blocked layout.

    A product with plain weights packs them on the way, every time. With few rows that costs more than the product: with
    4 to 16 rows this one takes about half the time in bfloat16, and a third in float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS), bias)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return result


class WidenedLinear(Linear):
    """The same for 16-bit weights on a processor that cannot multiply them: kept and multiplied in float32.

    torch multiplies such weights row by row there: 16 rows take 16 times as long as one, and one takes longer than in
    float32. Twice the memory buys that back. The result is rounded once, as that of a 16-bit product is.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        wide_bias = None if bias is None else bias.float()
        self._wide = make_linear(weight.float(), wide_bias)
        super().__init__(self._wide.weight, wide_bias)
        self._dtype = weight.dtype

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._wide(inputs.float()).to(self._dtype)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest that the weight's device and dtype have. The weight is not kept where the result has its own copy."""
    if weight.device.type != "cpu":
        return Linear(weight, bias)
    if _can_pack(weight.dtype):
        return PackedLinear(weight, bias)
    return Linear(weight, bias) if weight.dtype == torch.float32 else WidenedLinear(weight, bias)


def fewest_rows(device: torch.device) -> int:
    """To how many rows a step should be padded.

    With AVX-512, oneDNN multiplies 4 rows faster than 1, 2 or 3. With AVX2 each row costs its share.
    """
    padded = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return 4 if padded else 1


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, multiplies with packed weights of this dtype.

    The operators are those that torch's own compiler emits. They are not everywhere, so they are tried.
    """
    weight = torch.eye(32, dtype=dtype, device="cpu")
    inputs = torch.arange(64, dtype=dtype, device="cpu").view(2, 32)
    try:
        with torch.inference_mode():
            same = torch.equal(PackedLinear(weight)(inputs), inputs)
    except (RuntimeError, AttributeError) as error:
        logger.info("plain %s weights: torch cannot pack them here (%s)", dtype, str(error).splitlines()[0])
        return False
    return same
