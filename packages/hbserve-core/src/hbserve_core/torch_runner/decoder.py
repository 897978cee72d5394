"""The decoder: embedding, layers of attention and gated MLP, norm, output projection.

Qwen3, Qwen2 and Llama differ by which biases and norms their weights have, and by nothing else.
Shapes: T rows of one step (tokens, and padding after them), R of them sampled, E hidden_size, D head_dim.
"""

import torch
import torch.nn.functional as F

from hbserve_core.model.layers import DecoderWeights, LayerWeights
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.rope import Rope
from hbserve_core.torch_runner.attention import AttentionPlan
from hbserve_core.torch_runner.batch import StepInput

# On a CPU the MLP takes this many rows at a time: its wide intermediates then stay in the cache, and are small enough
# for malloc to keep, where larger ones come from the system anew each time, page by page.
_MLP_ROWS = 512

Angles = tuple[torch.Tensor, torch.Tensor]


class Decoder:
    """A causal language model over a paged pool, or one rank's part of it. Holds no state of any request."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, group: RankGroup) -> None:
        """config: sizes of this rank's part."""
        self._config = config
        self._weights = weights
        self._group = group
        self._rope = Rope(config.rope, config.head_dim, weights.embedding.dtype, weights.embedding.device)

    def hidden(self, step: StepInput, attention: AttentionPlan) -> torch.Tensor:
        """(T, E): what the last layer gives. Writes the step's keys and values into the pool."""
        all_reduce = self._group.all_reduce
        hidden = all_reduce(self._embed(step.token_ids))
        angles = self._rope.angles(step.positions)
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + all_reduce(self._attention(index, layer, hidden, angles, attention))
            hidden = hidden + all_reduce(self._mlp(layer, hidden))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(R, vocab_size) of rows (R, E), in the engine's dtype, on every rank."""
        return self._group.gather_logits(self._weights.head(self._weights.norm(hidden)), self._config.vocab_size)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(T, E); zeros for tokens that other ranks have."""
        table = self._weights.embedding
        if len(table) >= self._config.vocab_size:
            return F.embedding(token_ids, table)
        rows = token_ids - self._weights.first_token
        elsewhere = (rows < 0) | (rows >= len(table))
        return F.embedding(rows.masked_fill_(elsewhere, 0), table).masked_fill_(elsewhere[:, None], 0)

    def _attention(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, angles: Angles, attention: AttentionPlan
    ) -> torch.Tensor:
        config = self._config
        projected = layer.qkv(layer.attention_norm(hidden))
        heads = projected.view(len(hidden), -1, config.head_dim)
        rotated = heads[:, : config.num_heads + config.num_kv_heads]
        queries_and_keys = layer.qk_norm(rotated) if layer.qk_norm else rotated
        self._rope.rotate(queries_and_keys, angles, out=rotated)
        out = hidden.new_zeros(len(hidden), config.num_heads * config.head_dim)
        attention.attend(index, heads, out)
        return layer.output(out)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.device.type == "cpu" and len(hidden) > _MLP_ROWS:
            return torch.cat([self._mlp(layer, part) for part in torch.split(hidden, _MLP_ROWS)])
        gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, dim=-1)
        return layer.down(F.silu(gate) * up)
