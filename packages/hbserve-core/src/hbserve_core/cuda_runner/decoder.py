"""Decoder on CUDA: each matrix product by the kernel that is fastest for its shape, and our kernels for everything in
between.

A layer takes five launches for up to 64 decodes (norms and gates are inside the products), and nine for more. In the
last layer, a step with prompts computes keys and values for all rows, and all else only for rows that are sampled.
Shapes: T rows of one step, R of them sampled, E hidden_size, N query heads, K key heads, D head_dim.
"""

from collections.abc import Sequence as Ids

import torch

from hbserve_core.cuda_runner.kernels.attention_parts import Scores
from hbserve_core.cuda_runner.kernels.decode_attention import DecodeWorkspace, decode_attention
from hbserve_core.cuda_runner.kernels.experts import Routing, combined
from hbserve_core.cuda_runner.kernels.few_experts import few_expert_mlps, suits_few_experts
from hbserve_core.cuda_runner.kernels.pointwise import embed
from hbserve_core.cuda_runner.kernels.prefill_attention import prefill_attention, store_kv
from hbserve_core.cuda_runner.kernels.sampling import sample, seed_halves
from hbserve_core.cuda_runner.products import CudaProducts, ResidualStream, RowForm, normed
from hbserve_core.cuda_runner.step_packer import StepShape, StepView
from hbserve_core.logits.rows import LogitsRow, has_grammars, on_device
from hbserve_core.model.layers import (
    ExpertWeights,
    LayerWeights,
    Linear,
    ProjectionNorm,
    RmsNorm,
    activated,
    capped_logits,
    first_inputs,
)
from hbserve_core.model.loaded_model import LoadedModel
from hbserve_core.model.rank_group import RankGroup


class CudaDecoder:
    """Causal language model over a paged pool. Reads steps that are on the device, and waits for nothing."""

    def __init__(self, model: LoadedModel, largest: StepShape, group: RankGroup | None = None) -> None:
        """largest: a shape that every step fits into."""
        config = model.rank_config
        self._config = config
        self._group = group or RankGroup()
        self._weights = model.weights
        self._angles = model.angle_tables()
        self._products = CudaProducts(model.device, config.switches.activation == "gelu")
        cap = config.switches.attention_cap
        scales = [layer.kv_scales for layer in model.weights.layers]
        self._scores = [
            Scores(config.attention_scale, window, cap, *of_layer)
            for window, of_layer in zip(config.windows, scales, strict=True)
        ]
        self._workspace = DecodeWorkspace(
            largest.sequences, largest.pieces, (config.num_heads, config.num_kv_heads, config.head_dim), model.device
        )

    def decode(self, step: StepView, sampled: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """Compute a step that has only decodes. A token for every row goes to `sampled`, int32. Returns the last
        layer's output, as `hidden` does."""
        stream = self._stream(step, sampled, pool, every_row=True)
        sample(self._logits(stream), step.samples[1:], sampled)
        return stream.rows

    def finish(self, step: StepView, hidden: torch.Tensor, sampled: torch.Tensor) -> None:
        """Sample a token for each of the step's samples into `sampled`, from their rows (R, E) of the last layer."""
        sample(self.logits(hidden[: step.samples.shape[1]]), step.samples[1:], sampled)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, vocab_size) of rows (N, E) from the last layer."""
        return self._logits(ResidualStream(hidden))

    def draw(
        self,
        step: StepView,
        scores: torch.Tensor,
        places: torch.Tensor,
        sampled: torch.Tensor,
        rows: Ids[LogitsRow],
    ) -> torch.Tensor:
        """Draw some of the step's samples again, at positions `places` (N,) int64, from other logits (N, vocab_size).

        If some have grammars, only rank 0 knows what may be drawn, and it tells the other ranks what was drawn.
        """
        tokens = torch.empty(len(places), dtype=torch.int32, device=scores.device)
        drawn_by = step.samples[1:].index_select(1, places)
        if of_choices := [place for place, row in enumerate(rows) if row.is_choice]:
            # The step has only one seed for each sample.
            seeds = seed_halves([rows[place].sequence.params.seed or 0 for place in of_choices]).tolist()
            own = on_device(of_choices, torch.int64, scores.device)
            drawn_by[1:3].index_copy_(1, own, on_device(seeds, torch.int32, scores.device))
        sample(scores, drawn_by, tokens)
        if has_grammars(rows):
            tokens = self._group.from_first(tokens)
        sampled.index_copy_(0, places, tokens)
        return tokens

    def hidden(
        self, step: StepView, sampled: torch.Tensor, pool: torch.Tensor, every_row: bool = False
    ) -> torch.Tensor:
        """Compute the last layer's output, (R, E) for the rows that are sampled, or one unused row if there are none;
        or (T, E), for every row. Writes the step's keys and values into the pool."""
        return self._stream(step, sampled, pool, every_row).rows

    def _stream(self, step: StepView, sampled: torch.Tensor, pool: torch.Tensor, every_row: bool) -> ResidualStream:
        weights, slots = self._weights, step.tokens[3]
        embedded = embed(step.tokens[0], step.tokens[1], sampled, weights.embedding, weights.first_token)
        embedded = self._group.all_reduce(embedded)
        stream = ResidualStream(first_inputs(embedded, step.tokens[2], weights, self._config.switches))
        norms_after = [*(layer.attention_norm for layer in weights.layers[1:]), weights.norm]
        for index, (layer, norm_after) in enumerate(zip(weights.layers, norms_after, strict=True)):
            qkv = self._products.of_normed(stream, layer.attention_norm, layer.qkv)
            is_narrowed = index + 1 == len(weights.layers) and not every_row
            attended = self._attend(index, layer, qkv, step, pool, step.last_tiles if is_narrowed else step.tiles)
            if is_narrowed:
                # At least one row is kept, because its sums end after all ranks have written their keys and values.
                rows = step.samples[0] if step.samples.shape[1] else step.samples.new_zeros(1)
                stream = ResidualStream(stream.rows.index_select(0, rows))
                attended, slots = attended.index_select(0, rows), slots.index_select(0, rows)
            if layer.experts is not None:
                is_few = self._are_few(stream.rows, layer.experts)
                next_norm = layer.mlp_norm if is_few or self._group.shard.size > 1 else None
                self._add(attended, layer.output, stream, layer.attention_out_norm, next_norm)
                self._add_experts(index, layer.experts, slots, stream, norm_after, is_few)
                continue
            assert layer.gate_up is not None
            assert layer.down is not None
            self._add(attended, layer.output, stream, layer.attention_out_norm, layer.mlp_norm)
            inner = self._inner(stream, layer.mlp_norm, layer.gate_up)
            self._add(inner, layer.down, stream, layer.mlp_out_norm, norm_after)
        return stream

    def _inner(self, stream: ResidualStream, norm: RmsNorm | None, linear: Linear) -> torch.Tensor:
        """Compute the input of an MLP's last product, (T, F)."""
        switches = self._config.switches
        if switches.is_gated:
            return self._products.gated(stream, norm, linear)
        return activated(self._products.of_normed(stream, norm, linear), switches)

    def _are_few(self, rows: torch.Tensor, weights: ExpertWeights) -> bool:
        """Return whether these experts have faster kernels for such few rows."""
        experts = self._config.switches.experts
        assert experts is not None
        are_wide = [isinstance(each, torch.Tensor) for each in (weights.gate_up, weights.down)]
        if all(are_wide):
            return suits_few_experts(rows, experts.per_token)
        # Those kernels take both matrices narrow, or both wide.
        return not any(are_wide) and bool(weights.gate_up.suits_few(rows, weights.down, experts.per_token))

    def _add_experts(
        self,
        index: int,
        weights: ExpertWeights,
        slots: torch.Tensor,
        stream: ResidualStream,
        next_norm: RmsNorm | None,
        are_few: bool,
    ) -> None:
        """Add the output of layer `index`'s experts for the stream's rows, which are normed first. slots: slots of the
        rows, see `store_kv`. are_few: whether there are few rows, see `_are_few`."""
        experts, norm = self._config.switches.experts, self._weights.layers[index].mlp_norm
        assert experts is not None
        routing = Routing(experts.count, experts.per_token, experts.renormalises, weights.first)
        if are_few:
            self._add_few_experts(norm, weights, slots, stream, next_norm, routing)
            return
        parts = self._products.expert_parts(stream, norm, weights, slots, routing)
        if self._group.shard.size > 1:
            stream.add_sum_of_parts(parts, self._group, next_norm)
            return
        form = self._next_form(index, stream.rows)
        if next_norm is not None and form is not None:
            stream.add_parts(parts, next_norm, form)
        else:
            combined(parts, stream.rows)
            stream.changes()

    def _add_few_experts(
        self,
        norm: RmsNorm | None,
        weights: ExpertWeights,
        slots: torch.Tensor,
        stream: ResidualStream,
        next_norm: RmsNorm | None,
        routing: Routing,
    ) -> None:
        """Add the output of experts for few rows: each pair of row and expert is computed by itself, without sorting by
        expert."""
        is_alone = self._group.shard.size == 1
        logits = self._products.of_normed(stream, norm, weights.router)
        rows, eps = stream.scaled or stream.normed_by(norm), norm.eps if norm else 0.0
        gate_up, down, add_to = weights.gate_up, weights.down, stream.rows if is_alone else None
        if isinstance(gate_up, torch.Tensor):
            result = few_expert_mlps(rows, logits, slots, gate_up, down, routing, eps=eps, add_to=add_to)
            stream.changes()
        else:
            begins = stream.begins(next_norm) if is_alone else None
            result, stream.scaled = gate_up.few_mlps(
                rows, logits, slots, down, routing, eps=eps, add_to=add_to, next_norm=begins
            )
        if not is_alone:
            stream.add_sum(result, self._group, next_norm)

    def _next_form(self, index: int, rows: torch.Tensor) -> RowForm | None:
        """Return the form in which the next layer reads normed rows (M, E): see `CudaProducts.form_of_rows`."""
        layers = self._weights.layers
        return None if index + 1 == len(layers) else self._products.form_of_rows(rows, layers[index + 1].qkv)

    def _logits(self, stream: ResidualStream) -> torch.Tensor:
        """Compute logits (R, vocab_size) of rows (R, E)."""
        logits = self._products.of_normed(stream, self._weights.norm, self._weights.head)
        return capped_logits(self._group.gather_logits(logits, self._config.vocab_size), self._config)

    def _add(
        self,
        inputs: torch.Tensor,
        linear: Linear,
        stream: ResidualStream,
        norm: RmsNorm | None,
        next_norm: RmsNorm | None,
    ) -> None:
        """Add a product to the stream or, with several ranks, the sum of all ranks' products. It is normed first if
        there is a norm for it."""
        if norm is not None:
            stream.add(normed(self._group.all_reduce(self._products.of(inputs, linear)), norm))
        elif self._group.shard.size > 1:
            self._products.add_sum_to(stream, inputs, linear, self._group, next_norm)
        else:
            self._products.add_to(stream, inputs, linear, next_norm)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        qkv: torch.Tensor,
        step: StepView,
        pool: torch.Tensor,
        tiles: torch.Tensor,
    ) -> torch.Tensor:
        """Compute attention (T, N * D) from projected rows (T, (N + 2 K) * D), whose keys may be normed and rotated in
        place. tiles: the step's tiles, or some of them. The results for prompts' rows in other tiles are not read."""
        config = self._config
        norm = (layer.qk_norm.weight, layer.qk_norm.eps) if isinstance(layer.qk_norm, RmsNorm) else None
        if isinstance(layer.qk_norm, ProjectionNorm):
            layer.qk_norm.apply(qkv.view(len(qkv), -1, config.head_dim), self._group)
        rotation, scores = (self._angles[index], norm), self._scores[index]
        # Padding among the samples of a graph stands for row 0, which may be in none of the last tiles.
        make = torch.empty if tiles is step.tiles else torch.zeros
        out = make((len(qkv), config.num_heads * config.head_dim), dtype=qkv.dtype, device=qkv.device)
        if step.shape.tiles:
            store_kv(qkv, step.tokens[2], step.tokens[3], *rotation, pool, index, scores=scores)
            prefill_attention(
                qkv, out, pool, index, *rotation, step.tables, step.width, tiles, step.sequences, scores=scores
            )
        if step.shape.pieces:
            decode_attention(
                qkv, out, pool, index, *rotation, step.tables, step.width, step.pieces, self._workspace, scores=scores
            )
        return out
