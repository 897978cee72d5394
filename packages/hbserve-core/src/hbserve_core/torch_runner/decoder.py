"""Input of one step as flat tensors, and the decoder: embedding, layers of attention and MLP, norm, output projection.

The differences between architectures (model/architectures.py) are in the weights, most of them applied at load time.
Shapes: T rows of one step (tokens, and padding after them), R of them sampled, E hidden_size, D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.logits.prompt_logprobs import ScoredRows, scored_rows
from hbserve_core.model.layers import (
    DecoderWeights,
    ExpertWeights,
    LayerWeights,
    ProjectionNorm,
    RmsNorm,
    activated,
    capped_logits,
    first_inputs,
)
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.rope import Rope
from hbserve_core.torch_runner.attention import AttentionPlan

# On a CPU the MLP computes this many rows at a time. Its wide intermediates then stay in the cache, and are small
# enough for malloc to keep; larger ones are requested from the system anew each time, page by page.
_MLP_ROWS = 512

Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepInput:
    """Input of one step, T rows: its tokens, then padding, which is computed but not used. R of its chunks sample."""

    chunks: tuple[ScheduledChunk, ...]
    """Chunks in the order of their tokens: by number of new tokens, then by context."""
    token_ids: torch.Tensor
    """Token ids of the rows, (T,) int64."""
    positions: torch.Tensor
    """Position of each token in its sequence, (T,) int64."""
    sampling_rows: torch.Tensor | None
    """Rows, among the T, whose hidden states yield next tokens, (R,) int64; None for the first R rows."""
    sampling_places: tuple[int, ...]
    """Positions of the sampling chunks in the batch as it was given, (R,)."""
    scored: tuple[ScoredRows, ...]
    """Rows, among the T, that score prompt tokens."""


def prepare_step(batch: Sequence[ScheduledChunk], device: torch.device, fewest_rows: int = 1) -> StepInput:
    """Flatten a batch, and pad it to `fewest_rows`.

    The order suits the kernels: decodes first, equal shapes together. `sampling_places` leads back to the given order.
    """
    order = sorted(range(len(batch)), key=lambda i: (batch[i].num_new_tokens, batch[i].sequence.num_computed_tokens))
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    places: list[int] = []
    scored: list[ScoredRows] = []
    for place in order:
        chunk = batch[place]
        first = chunk.sequence.num_computed_tokens
        end = first + chunk.num_new_tokens
        if chunk.scored_positions and (scores := scored_rows(chunk, place, len(token_ids))) is not None:
            scored.append(scores)
        token_ids += chunk.sequence.token_ids[first:end]
        positions += range(first, end)
        if chunk.samples:
            rows.append(len(token_ids) - 1)
            places.append(place)
    all_sample = len(rows) == len(token_ids)
    padding = [0] * (fewest_rows - len(token_ids))
    return StepInput(
        chunks=tuple(batch[place] for place in order),
        token_ids=torch.tensor(token_ids + padding, dtype=torch.int64, device=device),
        positions=torch.tensor(positions + padding, dtype=torch.int64, device=device),
        sampling_rows=None if all_sample else torch.tensor(rows, dtype=torch.int64, device=device),
        sampling_places=tuple(places),
        scored=tuple(scored),
    )


class Decoder:
    """Causal language model over a paged pool, or one rank's part of it. Holds no state of any request."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, group: RankGroup) -> None:
        """config: configuration with the sizes of this rank's part."""
        self._config = config
        self._weights = weights
        self._group = group
        dtype, device = weights.embedding.dtype, weights.embedding.device
        self._layer_ropes = config.layer_ropes()
        self._ropes = {each: Rope(each, config.head_dim, dtype, device) for each in self._layer_ropes}

    def hidden(self, step: StepInput, attention: AttentionPlan) -> torch.Tensor:
        """Compute the last layer's output, (R, E) for the rows that are sampled; or (T, E), for every row, if all are
        sampled or some score prompt tokens. Writes the step's keys and values into the pool."""
        all_reduce, rows = self._group.all_reduce, None if step.scored else step.sampling_rows
        embedded = all_reduce(self._embed(step.token_ids))
        hidden = first_inputs(embedded, step.positions, self._weights, self._config.switches)
        angles = {config: rope.angles(step.positions) for config, rope in self._ropes.items()}
        for index, (layer, rope) in enumerate(zip(self._weights.layers, self._layer_ropes, strict=True)):
            attended = self._attention(index, layer, hidden, angles[rope], attention)
            if rows is not None and index + 1 == len(self._layer_ropes):
                # At least one row is kept, because its sums end after all ranks have written their keys and values.
                read = rows if len(rows) else rows.new_zeros(1)
                hidden, attended = hidden.index_select(0, read), attended.index_select(0, read)
            hidden = hidden + _normed(all_reduce(layer.output(attended)), layer.attention_out_norm)
            hidden = hidden + _normed(all_reduce(self._mlp(layer, hidden)), layer.mlp_out_norm)
        return hidden if rows is None else hidden[: len(rows)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits (R, vocab_size) of rows (R, E), in the engine's dtype, on every rank."""
        logits = self._weights.head(self._weights.norm(hidden))
        return capped_logits(self._group.gather_logits(logits, self._config.vocab_size), self._config)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up embeddings (T, E), which are zeros for tokens that are on other ranks."""
        table = self._weights.embedding
        if len(table) >= self._config.vocab_size:
            return F.embedding(token_ids, table)
        rows = token_ids - self._weights.first_token
        elsewhere = (rows < 0) | (rows >= len(table))
        return F.embedding(rows.masked_fill_(elsewhere, 0), table).masked_fill_(elsewhere[:, None], 0)

    def _attention(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, angles: Angles, attention: AttentionPlan
    ) -> torch.Tensor:
        """Compute attention (T, N * D) of rows (T, E), before the output projection."""
        config = self._config
        projected = layer.qkv(_normed(hidden, layer.attention_norm))
        heads = projected.view(len(hidden), -1, config.head_dim)
        queries_and_keys = rotated = heads[:, : config.num_heads + config.num_kv_heads]
        if isinstance(layer.qk_norm, ProjectionNorm):
            layer.qk_norm.apply(heads, self._group)
        elif layer.qk_norm:
            queries_and_keys = layer.qk_norm(rotated)
        self._ropes[self._layer_ropes[index]].rotate(queries_and_keys, angles, out=rotated)
        out = hidden.new_zeros(len(hidden), config.num_heads * config.head_dim)
        attention.attend(index, heads, out)
        return out

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.device.type == "cpu" and len(hidden) > _MLP_ROWS:
            return torch.cat([self._mlp(layer, part) for part in torch.split(hidden, _MLP_ROWS)])
        rows = _normed(hidden, layer.mlp_norm)
        if layer.experts is not None:
            return self._experts(layer.experts, rows)
        assert layer.gate_up is not None
        assert layer.down is not None
        return layer.down(activated(layer.gate_up(rows), self._config.switches))

    def _experts(self, weights: ExpertWeights, rows: torch.Tensor) -> torch.Tensor:
        """Compute for each row the sum of its experts that are on this rank, (T, E), one expert after another."""
        switches, experts = self._config.switches, self._config.switches.experts
        assert experts is not None
        shares, chosen = weights.router(rows).float().softmax(-1).topk(experts.per_token, dim=-1)
        if experts.renormalises:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for expert in torch.unique(chosen).tolist():
            place = expert - weights.first
            if 0 <= place < len(weights.gate_up):
                own, rank = (chosen == expert).nonzero(as_tuple=True)
                inside = activated(F.linear(rows[own], weights.gate_up[place]), switches)
                result = F.linear(inside, weights.down[place]) * shares[own, rank, None]
                out.index_add_(0, own, result.to(out.dtype))
        return out


def _normed(rows: torch.Tensor, norm: RmsNorm | None) -> torch.Tensor:
    return rows if norm is None else norm(rows)
