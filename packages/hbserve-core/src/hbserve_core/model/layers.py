"""Parts of a decoder: matrix products, norms, and layers of them.

Projections that read the same input are one matrix. Each rank has its part of each (see shard.py).
Shapes: T tokens, I inputs, O outputs, E hidden_size, H heads of queries and keys, F intermediate_size; of one rank:
    embedding, head     (vocab_size / ranks, E)      qkv     (query + 2 * key heads) * head_dim, E
    gate_up             (2 F, E)                     output  E, query heads * head_dim
    down                (E, F)                       norms   (E,), qk_norm (H, head_dim)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


class Linear:
    """x W^T + b, with W as checkpoints have it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight: (O, I). bias: (O,)."""
        self.weight = weight
        self.bias = bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(T, I) to (T, O)."""
        return F.linear(inputs, self.weight, self.bias)

    def add_to(self, target: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the result to `target` (T, O) in place, within the product and rounded once."""
        target.addmm_(inputs, self.weight.t())
        if self.bias is not None:
            target.add_(self.bias)


class RmsNorm:
    """x / rms(x) * weight, over the last dimension. The mean is taken in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """weight: (E,), or (H, E) for one row per head."""
        self.weight = weight
        self.eps = eps
        self._eps_tensor = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._size = weight.shape[-1]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, E) to (…, E), of the same dtype."""
        if inputs.device.type != "cpu":
            return F.rms_norm(inputs, (self._size,), None, self.eps) * self.weight
        # torch's own is a dozen kernels on a CPU; these are five, and in a decode step it is the number that counts.
        length = torch.linalg.vector_norm(inputs, 2, -1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps_tensor, length, length, value=1 / self._size).rsqrt_()
        return (inputs * scale).to(inputs.dtype).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: attention, then a gated MLP, each behind a norm and added to its input."""

    attention_norm: RmsNorm
    qkv: Linear
    """Outputs: query heads, then key heads, then value heads; each rank has some of each kind."""
    qk_norm: RmsNorm | None
    """Of query and key heads together: its weight has one row per head."""
    output: Linear
    """Its results, and those of `down`, are to be summed over the ranks. Rank 0 alone has their biases."""
    mlp_norm: RmsNorm
    gate_up: Linear
    """Outputs: gate, then up."""
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All of a model, or one rank's part of it."""

    embedding: torch.Tensor
    """(vocab_size / ranks, hidden_size), rounded up; rows beyond the vocabulary are zero."""
    first_token: int
    """The token of its first row."""
    layers: tuple[LayerWeights, ...]
    norm: RmsNorm
    head: Linear
    """To the tokens of the embedding's rows; from the embedding's own weights where they are tied."""
    digest: str
    """Equal for equal weights, on every rank."""
