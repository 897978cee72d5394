"""Parts of a decoder: matrix products, norms, and layers of them.

Projections that read the same input are one matrix, of which each rank has its part (see shard.py).
Shapes: T tokens, I inputs, O outputs, E hidden_size, H heads of queries and keys, F intermediate_size; of one rank:
    embedding, head     (vocab_size / ranks, E)      qkv     (query + 2 * key heads) * head_dim, E
    gate_up             (2 F, E)                     output  E, query heads * head_dim
    down                (E, F)                       norms   (E,), qk_norm (H, head_dim)
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from hbserve_core.model.architectures import Switches
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.rank_group import RankGroup

logger = logging.getLogger(__name__)

# The layout is chosen for a product with this many rows. It suits all other numbers of rows well too.
_TYPICAL_ROWS = 16


class Linear:
    """Linear layer x W^T + b, with W laid out as in checkpoints."""

    narrow_bits = 0
    """Bits of each number of W, if it has fewer than 16 and needs its own kernels; otherwise 0."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight: (O, I). bias: (O,)."""
        self.weight = weight
        self.bias = bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs (T, I) to outputs (T, O)."""
        return F.linear(inputs, self.weight, self.bias)

    def form_of_rows(self, inputs: torch.Tensor) -> Any:
        """Return the form in which many inputs (T, I) are multiplied, or None if they are multiplied as they are; see
        `RowForm` in cuda_runner/products.py."""
        return None

    def into(self, out: torch.Tensor, inputs: torch.Tensor) -> None:
        """Write the result to `out` (T, O)."""
        if self.bias is None:
            torch.mm(inputs, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, inputs, self.weight.t(), out=out)

    def of_experts(self, count: int) -> Any:
        """Return W as the matrices of `count` experts that are stacked in it: (count, O / count, I)."""
        return self.weight.view(count, -1, self.weight.shape[1])

    def add_to(self, target: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the result to `target` (T, O) in place. The product includes the addition, so the sum is rounded once."""
        target.addmm_(inputs, self.weight.t())
        if self.bias is not None:
            target.add_(self.bias)


class PackedLinear(Linear):
    """Linear layer with W in oneDNN's blocked layout.

    A product with plain weights packs them each time, which costs more than the product if there are few rows: with 4
    to 16 rows, packed weights take about half the time in bfloat16, and a third in float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS), bias)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return result


class WidenedLinear(Linear):
    """Linear layer with 16-bit weights on a processor that cannot multiply them: kept and multiplied in float32.

    There torch multiplies such weights row by row: 16 rows take 16 times as long as one, and one takes longer than in
    float32. Twice the memory avoids that. The result is rounded once, like that of a 16-bit product.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        wide_bias = None if bias is None else bias.float()
        self._wide = make_linear(weight.float(), wide_bias)
        super().__init__(self._wide.weight, wide_bias)
        self._dtype = weight.dtype

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._wide(inputs.float()).to(self._dtype)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Make the fastest linear layer for the weight's device and dtype. The weight is not kept if the layer has its own
    copy."""
    if weight.device.type != "cpu":
        return Linear(weight, bias)
    if _can_pack(weight.dtype):
        return PackedLinear(weight, bias)
    return Linear(weight, bias) if weight.dtype == torch.float32 else WidenedLinear(weight, bias)


def fewest_rows(device: torch.device) -> int:
    """Return the number of rows to which smaller steps should be padded.

    With AVX-512, oneDNN multiplies 4 rows faster than 1, 2 or 3. With AVX2, each row takes the same time.
    """
    padded = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return 4 if padded else 1


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Return whether this build of torch, on this processor, multiplies with packed weights of this dtype.

    The operators are those that torch's own compiler emits. They are not available everywhere, so they are tried once.
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


class RmsNorm:
    """RMS norm over the last dimension: x / rms(x) * weight. The mean is taken in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """weight: (E,), or (H, E) for one row per head."""
        self.weight = weight
        self.eps = eps
        self._eps_tensor = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._size = weight.shape[-1]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Norm inputs (…, E), with a result of the same shape and dtype."""
        if inputs.device.type != "cpu":
            return (F.rms_norm(inputs, (self._size,), None, self.eps) * self.weight).to(inputs.dtype)
        # On a CPU torch's own norm takes a dozen kernels. These are five, and in a decode step their number is what
        # counts.
        length = torch.linalg.vector_norm(inputs, 2, -1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps_tensor, length, length, value=1 / self._size).rsqrt_()
        return (inputs * scale).to(inputs.dtype).mul_(self.weight)


class ProjectionNorm:
    """RMS norms over all query heads together and over all key heads together, including those of other ranks (OLMo
    2)."""

    def __init__(self, weight: torch.Tensor, eps: float, num_heads: int, sizes: tuple[int, int]) -> None:
        """weight: (H, D), of this rank's query heads, then its key heads. num_heads: number of its query heads. sizes:
        how many numbers all ranks' query heads have, and their key heads; heads that several ranks have count several
        times."""
        self._weight = weight
        self._eps = eps
        self._counts = (num_heads, len(weight) - num_heads)
        self._sizes = sizes

    def apply(self, heads: torch.Tensor, group: RankGroup) -> None:
        """Norm the query and key heads among heads (T, H or more, D) in place. The means are taken in float32."""
        normed = heads[:, : sum(self._counts)]
        squares = normed.float().square().sum(-1)
        sums = [part.sum(-1) for part in torch.split(squares, list(self._counts), dim=1)]
        of_all = group.all_reduce(torch.stack(sums, dim=1)).unbind(1)
        means = [
            total[:, None].expand(-1, n) / size
            for total, n, size in zip(of_all, self._counts, self._sizes, strict=True)
        ]
        scales = torch.cat(means, dim=1).add_(self._eps).rsqrt_()[:, :, None]
        normed.copy_((normed * scales).to(heads.dtype) * self._weight)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer: attention, then an MLP, usually gated, each added to its input, and usually a norm before
    each."""

    attention_norm: RmsNorm | None
    qkv: Linear
    """Projection of queries, keys and values. Outputs: query heads, then key heads, then value heads; each rank has
    some of each kind."""
    qk_norm: RmsNorm | ProjectionNorm | None
    """Norm of query and key heads in one: its weight has one row per head."""
    output: Linear
    """Output projection. Its results, and those of `down`, must be summed over the ranks; only rank 0 has biases."""
    mlp_norm: RmsNorm | None
    gate_up: Linear | None
    """First product of the MLP. Outputs: gate, then up; without gates, only up. None, like `down`, if there are
    experts."""
    down: Linear | None
    attention_out_norm: RmsNorm | None = None
    """Norm of attention's sum over the ranks, before it is added to the residual stream."""
    mlp_out_norm: RmsNorm | None = None
    experts: "ExpertWeights | None" = None
    kv_scales: tuple[float, float] = (1.0, 1.0)
    """Divisors of keys and of values in a pool of 8-bit floats."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights of a mixture of experts: X MLPs on this rank, each for the tokens that are routed to it. Their results
    must be summed over the ranks."""

    router: Linear
    """Router, whose outputs are a logit for each expert of all ranks."""
    gate_up: Any
    """First matrices of the experts, (X, 2 F, E): gates, then ups. A tensor, like `down`, or for narrow weights what
    their kernels read."""
    down: Any
    """Last matrices of the experts, (X, E, F)."""
    first: int
    """Number of this rank's first expert among those of all ranks."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Weights of a model, or one rank's part of them."""

    embedding: torch.Tensor
    """Embedding table, (vocab_size / ranks rounded up, hidden_size). Rows beyond the vocabulary are zero."""
    first_token: int
    """Token of the first row of `embedding`."""
    layers: tuple[LayerWeights, ...]
    norm: RmsNorm
    positions: torch.Tensor | None
    """Table of learned positions, (P, hidden_size), added to the embedding by position; None if the model has none."""
    head: Linear
    """LM head, whose outputs are logits of the tokens for which `embedding` has rows. It shares the weights of
    `embedding` if they are tied."""
    digest: str
    """Digest of the weights, equal for equal weights on every rank."""


def first_inputs(
    embedded: torch.Tensor, positions: torch.Tensor, weights: DecoderWeights, switches: Switches
) -> torch.Tensor:
    """Compute the input of the first layer, (T, E), from rows of the embedding, summed over the ranks, and positions
    (T,)."""
    if weights.positions is not None:
        embedded = embedded + F.embedding(positions, weights.positions)
    return embedded - embedded.mean(-1, keepdim=True) if switches.layer_norms else embedded


def activated(inner: torch.Tensor, switches: Switches) -> torch.Tensor:
    """Compute the input of an MLP's last product, (T, F), from the output of its first one."""
    gate, up = inner.chunk(2, dim=-1) if switches.is_gated else (inner, None)
    if switches.activation == "relu":
        gate = F.relu(gate)
    else:
        gate = F.silu(gate) if switches.activation == "silu" else F.gelu(gate, approximate="tanh")
    return gate if up is None else gate * up


def capped_logits(logits: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Limit the logits, in place, by the model's cap if it has one, and return them."""
    cap = config.switches.logits_cap
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits
