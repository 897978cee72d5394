"""The decoder on CUDA: cuBLAS for large products, our kernels for all that is between them.

Up to four rows, where a step is as fast as its weights can be read, the products are our kernels too, with norms,
gates and residual additions inside them: six or seven launches a layer.
Shapes: T rows of one step, R of them sampled, E hidden_size.
"""

import torch

from hbserve_core.kernels.decode_attention import decode_attention, num_splits
from hbserve_core.kernels.embedding import embed
from hbserve_core.kernels.gated import silu_mul
from hbserve_core.kernels.norm import add_rms_norm
from hbserve_core.kernels.prefill_attention import prefill_attention
from hbserve_core.kernels.rope_and_store import rope_and_store
from hbserve_core.kernels.sampling import sample
from hbserve_core.kernels.small_linear import small_linear
from hbserve_core.linear import Linear
from hbserve_core.model_config import ModelConfig
from hbserve_core.norm import RmsNorm
from hbserve_core.rank_group import RankGroup
from hbserve_core.rope import angle_table
from hbserve_core.step_buffer import StepView
from hbserve_core.weights import DecoderWeights, LayerWeights

_SMALL = (1, 2, 4)

Hidden = tuple[torch.Tensor, torch.Tensor | None]
"""Rows (T, E), and what is still to be added to them."""


class CudaDecoder:
    """A causal language model over a paged pool. Reads steps that are on the device, and waits for nothing."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, num_processors: int, group: RankGroup | None = None
    ) -> None:
        """config: sizes of this rank's part. num_processors: of the device; decode attention keeps them busy."""
        self._config = config
        self._group = group or RankGroup()
        self._weights = weights
        device = weights.embedding.device
        self._angles = angle_table(config.rope, config.head_dim, config.max_model_len).to(device)
        self._num_processors = num_processors

    def decode(self, step: StepView, sampled: torch.Tensor, pool: torch.Tensor) -> None:
        """A step of decodes only: a token for every row goes to `sampled`, int32."""
        sample(self.logits(self.hidden(step, sampled, pool)), step.samples[1:], sampled)

    def finish(self, step: StepView, hidden: Hidden, sampled: torch.Tensor) -> None:
        """After `hidden`: a token for each of the step's samples goes to `sampled`."""
        sample(self.logits(hidden, step.samples[0]), step.samples[1:], sampled)

    def hidden(self, step: StepView, sampled: torch.Tensor, pool: torch.Tensor) -> Hidden:
        """What the last layer gives for every row. Writes the step's keys and values into the pool."""
        ids, sources = step.tokens[0], step.tokens[1]
        all_reduce = self._group.all_reduce
        residual = all_reduce(embed(ids, sources, sampled, self._weights.embedding, self._weights.first_token))
        if self._is_small(step):
            for index, layer in enumerate(self._weights.layers):
                self._small_layer(index, layer, residual, step, pool)
            return residual, None
        added: torch.Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            normed = self._norm(residual, added, layer.attention_norm)
            attended = all_reduce(layer.output(self._attend(index, layer, layer.qkv(normed), step, pool)))
            normed = self._norm(residual, attended, layer.mlp_norm)
            added = all_reduce(layer.down(silu_mul(layer.gate_up(normed))))
        return residual, added

    def logits(self, hidden: Hidden, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(R, vocab_size) of the given rows, (R,) int32, or of all."""
        residual, added = hidden
        norm, head = self._weights.norm, self._weights.head
        if rows is not None:
            residual = residual.index_select(0, rows)
            added = None if added is None else added.index_select(0, rows)
        if added is None and len(residual) in _SMALL:
            logits = small_linear(residual, head.weight, head.bias, norm=(norm.weight, norm.eps))
        else:
            logits = head(self._norm(residual, added, norm))
        return self._group.gather_logits(logits, self._config.vocab_size)

    def _is_small(self, step: StepView) -> bool:
        return step.shape.rows in _SMALL and step.shape.tiles == 0

    def _norm(self, residual: torch.Tensor, added: torch.Tensor | None, norm: RmsNorm) -> torch.Tensor:
        """norm(residual + added), which is also added in place."""
        if added is None:
            return add_rms_norm(residual, None, norm.weight, norm.eps)
        return add_rms_norm(added, residual, norm.weight, norm.eps)

    def _small_layer(
        self, index: int, layer: LayerWeights, residual: torch.Tensor, step: StepView, pool: torch.Tensor
    ) -> None:
        """One layer, added to `residual` in place."""
        before, after = layer.attention_norm, layer.mlp_norm
        qkv = small_linear(residual, layer.qkv.weight, layer.qkv.bias, norm=(before.weight, before.eps))
        attended = self._attend(index, layer, qkv, step, pool)
        self._add(attended, layer.output, residual)
        gate_up = layer.gate_up
        inner = small_linear(residual, gate_up.weight, gate_up.bias, norm=(after.weight, after.eps), gated=True)
        self._add(inner, layer.down, residual)

    def _add(self, inputs: torch.Tensor, linear: Linear, residual: torch.Tensor) -> None:
        """Add a product to `residual` in place; of several ranks, the sum of theirs."""
        if self._group.shard.size == 1:
            small_linear(inputs, linear.weight, linear.bias, add_to=residual)
        else:
            residual += self._group.all_reduce(small_linear(inputs, linear.weight, linear.bias))

    def _attend(
        self, index: int, layer: LayerWeights, qkv: torch.Tensor, step: StepView, pool: torch.Tensor
    ) -> torch.Tensor:
        """(T, N * D) of projected rows (T, (N + 2 K) * D), which are normed and rotated in place."""
        config = self._config
        norm = None if layer.qk_norm is None else (layer.qk_norm.weight, layer.qk_norm.eps)
        rope_and_store(qkv, step.tokens[2], step.tokens[3], self._angles, norm, pool, index)
        out = torch.empty((len(qkv), config.num_heads * config.head_dim), dtype=qkv.dtype, device=qkv.device)
        width, num_decodes = step.header[0:1], step.header[1:2]
        rows = step.shape.sequences
        splits = num_splits(rows, config.num_kv_heads, self._num_processors)
        decode_attention(
            qkv, out, pool, index, step.tables, width, step.sequences[2], num_decodes, splits
        )  # fmt: skip
        if step.shape.tiles:
            prefill_attention(qkv, out, pool, index, step.tables, width, step.tiles, step.sequences)
        return out
