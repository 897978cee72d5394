"""Loading of weights: a checkpoint's tensors become the layers of the forward pass; layers.py has their shapes.

A checkpoint's weights are (O, I), as ours are. Those of q, k and v, and of gate and up, are put one below the other:
    rank's rows of q_proj, k_proj, v_proj          ─▶ qkv        rank's columns of o_proj       ─▶ output
    rank's rows of gate_proj, up_proj              ─▶ gate_up    rank's columns of down_proj    ─▶ down
    rank's rows of embed_tokens, lm_head           ─▶ embedding, head
Each rank only reads its own part (see shard.py).

A layer norm equals an RMS norm of inputs with a mean of 0, followed by a bias. So in models with layer norms,
everything that is added to the residual stream is given a mean of 0 (in `first_inputs`, o_proj and down_proj), which is
harmless because the norms would subtract the mean anyway. The biases of norms are merged into the bias of the product
that reads the norm (SliceGPT, Ashkboos et al. 2024).
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.checkpoint.checkpoint import Checkpoint, with_stored_head
from hbserve_core.model.checkpoint.dummy_checkpoint import DummyCheckpoint
from hbserve_core.model.checkpoint.tensor_source import SplitGroups, TensorPart, TensorSource, weights_digest
from hbserve_core.model.checkpoint_shapes import (
    NO_POSITIONS,
    POSITIONS,
    Rows,
    checkpoint_shapes,
    gate_up_tensors,
    qkv_tensors,
)
from hbserve_core.model.layers import (
    DecoderWeights,
    ExpertWeights,
    LayerWeights,
    Linear,
    ProjectionNorm,
    RmsNorm,
    make_linear,
)
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.narrow_weight import NarrowWeight
from hbserve_core.model.rope import head_order
from hbserve_core.model.shard import Shard

logger = logging.getLogger(__name__)

MakeNarrow = Callable[[NarrowWeight, torch.Tensor | None], Linear]
"""Function that makes the layer that multiplies with a narrow weight and adds a bias (O,), if there is one."""


def load_weights(
    config: ModelConfig,
    load_format: str,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard | None = None,
    *,
    with_kv_scales: bool = False,
    make_narrow: MakeNarrow | None = None,
) -> DecoderWeights:
    """Read a rank's part of the weights, or generate it for load_format "dummy". `config` is that of the whole model.
    with_kv_scales: for a pool of 8-bit floats. make_narrow: makes layers of weights that are stored in fewer than 16
    bits and can stay as they are; None if none of them can.

    When this returns, all weights are ready for any stream.

    Raises:
        InvalidInstanceConfig: load_format is unknown, or ranks would share a group of a narrow weight.
        ModelFilesMissing, WeightsMismatch: see `Checkpoint`.
    """
    if load_format not in ("safetensors", "dummy"):
        raise InvalidInstanceConfig(f"load_format={load_format!r}: expected 'safetensors' or 'dummy'")
    began_s = time.perf_counter()
    if load_format == "safetensors":
        config = with_stored_head(config)
    shapes = checkpoint_shapes(config)
    source: TensorSource
    if load_format == "dummy":
        source = DummyCheckpoint(shapes, config.scale_block, config.packing, config.keeps_inputs)
    else:
        source = Checkpoint(config, shapes, device)
    with contextlib.closing(source):
        loader = _Loader(config, shard or Shard(), source, dtype, device, with_kv_scales, make_narrow)
        try:
            weights = loader.decoder()
        except SplitGroups as error:
            size = shard.size if shard else 1
            raise InvalidInstanceConfig(
                f"tensor_parallel_size={size}: {error}; take another number of ranks, or widen_weights=true"
            ) from None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, gigabytes = time.perf_counter() - began_s, loader.num_bytes / 1e9
    logger.info("weights: %.2f GB (%s) in %.1f s", gigabytes, load_format, seconds)
    return weights


class _Loader:
    """Loader that fetches tensors by name, takes the rank's part, fuses them, and converts them to the engine's dtype
    and device."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        with_kv_scales: bool,
        make_narrow: MakeNarrow | None,
    ) -> None:
        self._config = config
        self._shard = shard
        self._make_narrow = make_narrow
        self._source = source
        self._shapes = checkpoint_shapes(config)
        self._dtype = dtype
        self._device = device
        self._with_kv_scales = with_kv_scales
        self._heads = shard.part(config.num_heads, config.head_dim)
        self._kv_heads = shard.kv_part(config.num_kv_heads, config.head_dim)
        self._inner = shard.part(config.intermediate_size)
        self._head_order = head_order(config.rope, config.head_dim)
        self._qkv_order = self._order_of_qkv()
        # The residual stream is kept divided by the multiplier of each addition to it. The norms undo that.
        self._embedding_multiplier = config.switches.embedding_multiplier / config.switches.residual_multiplier
        self._stream_eps = config.rms_norm_eps / config.switches.residual_multiplier**2
        self.num_bytes = 0
        """Number of bytes of the weights loaded so far."""

    def decoder(self) -> DecoderWeights:
        embedding = self._vocabulary("model.embed_tokens.weight")
        if self._embedding_multiplier != 1.0:
            embedding *= self._embedding_multiplier
        # Without a terminal there is no progress bar.
        layers = tqdm(range(self._config.num_layers), desc="weights of layers", disable=None, leave=False)
        head = embedding if self._config.tied_embeddings else self._vocabulary("lm_head.weight")
        has_positions = self._config.switches.learned_positions
        return DecoderWeights(
            embedding=embedding,
            first_token=self._shard.rank * len(embedding),
            layers=tuple(map(self._layer, layers)),
            positions=self._whole(POSITIONS)[NO_POSITIONS:] if has_positions else None,
            head=make_linear(head, self._after_norm("model.norm", head)),
            norm=self._last_norm(),
            # The digest comes last, when the files are in the system's page cache.
            digest=weights_digest(self._source, self._shapes),
        )

    def _last_norm(self) -> RmsNorm:
        switches = self._config.switches
        divisor = switches.logits_divisor * (self._embedding_multiplier if self._config.tied_embeddings else 1.0)
        weight = self._norm_weight("model.norm.weight")
        return RmsNorm(weight if divisor == 1.0 else weight.float() / divisor, self._stream_eps)

    def _norm_weight(self, name: str) -> torch.Tensor:
        weight = self._whole(name)
        return weight.float() + 1 if self._config.switches.norms_from_one else weight

    def _after_norm(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the bias of a product that reads a norm."""
        return F.linear(self._whole(f"{name}.bias"), weight, bias) if self._config.switches.layer_norms else bias

    def _order_of_qkv(self) -> torch.Tensor | None:
        """Return the order in which rows of the fused projection are kept, or None if it is unchanged."""
        if self._head_order is None:
            return None
        local, head_dim = self._shard.config(self._config), self._config.head_dim
        places = torch.arange((local.num_heads + 2 * local.num_kv_heads) * head_dim, device="cpu").view(-1, head_dim)
        num_rotated = local.num_heads + local.num_kv_heads
        places[:num_rotated] = places[:num_rotated, self._head_order]
        return places.flatten().to(self._device)

    def _fuse(self, parts: Sequence[TensorPart], num_rows: int | None = None) -> torch.Tensor:
        """Stack parts of tensors below each other, and add zeros up to `num_rows`."""
        shapes = [part.shape(self._shapes[part.name]) for part in parts]
        rows = num_rows or sum(shape[0] for shape in shapes)
        fused = self._empty(rows, *shapes[0][1:])
        self._source.read(parts, fused)
        fused[sum(shape[0] for shape in shapes) :].zero_()
        return fused

    def _empty(self, *shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.num_bytes += made.nbytes
        return made

    def _whole(self, name: str) -> torch.Tensor:
        return self._fuse([TensorPart(name)])

    def _vocabulary(self, name: str) -> torch.Tensor:
        num_tokens = self._shard.num_tokens(self._config.vocab_size)
        first = self._shard.rank * num_tokens
        return self._fuse([TensorPart(name, rows=slice(first, first + num_tokens))], num_tokens)

    def _split_by_outputs(
        self,
        prefix: str,
        tensors: Mapping[str, Rows],
        parts: Sequence[slice],
        has_bias: bool,
        norm: str | None,
        order: torch.Tensor | None = None,
    ) -> Linear:
        """Load a product that ranks split by its outputs. parts: the rows of each projection in `tensors`. norm: full
        name of the norm that is its input. order: order of the outputs, if not their own."""
        firsts = [(name, sum(rows[:i])) for name, rows in tensors.items() for i in range(len(rows))]

        def parts_of(kind: str) -> list[TensorPart]:
            return [
                TensorPart(f"{prefix}.{name}.{kind}", rows=slice(first + part.start, first + part.stop))
                for (name, first), part in zip(firsts, parts, strict=True)
            ]

        bias = self._fuse(parts_of("bias")) if has_bias else None
        bias = bias[order] if bias is not None and order is not None else bias
        if norm is None or not self._config.switches.layer_norms:
            return self._linear(parts_of("weight"), bias, order)
        rows = self._fuse(parts_of("weight"))
        weight = rows if order is None else rows[order]
        return make_linear(weight, self._after_norm(norm, weight, bias))

    def _split_by_inputs(self, name: str, part: slice, has_bias: bool) -> Linear:
        bias = self._whole(f"{name}_proj.bias") if has_bias and self._shard.rank == 0 else None
        parts = [TensorPart(f"{name}_proj.weight", columns=part)]
        if not self._config.switches.layer_norms:
            return self._linear(parts, bias)
        weight = self._fuse(parts)
        weight -= weight.float().mean(0)
        return make_linear(weight, None if bias is None else bias - bias.float().mean())

    def _linear(
        self, parts: Sequence[TensorPart], bias: torch.Tensor | None, order: torch.Tensor | None = None
    ) -> Linear:
        """Make a layer of weights stacked below each other, which stay as narrow as they are stored if they can."""
        narrow = self._narrow(parts)
        if narrow is not None:
            return self._kept(narrow if order is None else narrow.with_rows(order), bias)
        rows = self._fuse(parts)
        return make_linear(rows if order is None else rows[order], bias)

    def _narrow(self, parts: Sequence[TensorPart]) -> NarrowWeight | None:
        if self._make_narrow is None:
            return None
        return self._source.read_narrow(parts, self._device)

    def _kept(self, narrow: NarrowWeight, bias: torch.Tensor | None) -> Linear:
        assert self._make_narrow is not None
        linear = self._make_narrow(narrow, bias)
        self.num_bytes += linear.weight.nbytes
        return linear

    def _layer(self, index: int) -> LayerWeights:
        prefix, switches, norms = f"model.layers.{index}", self._config.switches, self._config.switches.norms
        attention, qkv = f"{prefix}.self_attn", (self._heads, self._kv_heads, self._kv_heads)
        experts = self._experts(prefix, index)
        gate_up, down = (None, None) if experts else self._mlp(prefix)
        return LayerWeights(
            attention_norm=self._layer_norm(prefix, norms.before_attention, self._stream_eps),
            qkv=self._split_by_outputs(
                attention,
                qkv_tensors(self._config),
                qkv,
                switches.qkv_bias,
                norms.before_attention and f"{prefix}.{norms.before_attention}",
                self._qkv_order,
            ),
            qk_norm=self._qk_norm(attention),
            output=self._split_by_inputs(f"{attention}.o", self._heads, switches.output_bias),
            attention_out_norm=self._layer_norm(prefix, norms.after_attention, self._config.rms_norm_eps),
            mlp_norm=self._layer_norm(prefix, norms.before_mlp, self._stream_eps),
            gate_up=gate_up,
            down=down,
            experts=experts,
            kv_scales=self._kv_scales(attention),
            mlp_out_norm=self._layer_norm(prefix, norms.after_mlp, self._config.rms_norm_eps),
        )

    def _kv_scales(self, attention: str) -> tuple[float, float]:
        if not self._with_kv_scales:
            return 1.0, 1.0
        return self._source.kv_scale(attention, "k"), self._source.kv_scale(attention, "v")

    def _mlp(self, prefix: str) -> tuple[Linear, Linear]:
        switches, tensors = self._config.switches, gate_up_tensors(self._config)
        inner = [self._inner] * sum(map(len, tensors.values()))
        norm = switches.norms.before_mlp and f"{prefix}.{switches.norms.before_mlp}"
        gate_up = self._split_by_outputs(f"{prefix}.mlp", tensors, inner, switches.mlp_bias, norm)
        return gate_up, self._split_by_inputs(f"{prefix}.mlp.down", self._inner, switches.mlp_bias)

    def _experts(self, prefix: str, index: int) -> ExpertWeights | None:
        experts, shard = self._config.switches.experts, self._shard
        if experts is None or index not in experts.layers:
            return None
        inner, own = slice(0, experts.intermediate_size), range(experts.count)
        if experts.whole_on_ranks:
            own = own[shard.part(experts.count)]
        else:
            inner = shard.part(experts.intermediate_size)
        names = [
            [f"{prefix}.{experts.block}.experts.{expert}.{each}.weight" for each in experts.projections]
            for expert in own
        ]
        gate_up = [TensorPart(name, rows=inner) for each in names for name in each[:2]]
        down = [TensorPart(each[2], columns=inner) for each in names]
        router = make_linear(self._whole(f"{prefix}.{experts.block}.gate.weight"))
        return ExpertWeights(router, self._of_experts(gate_up, len(own)), self._of_experts(down, len(own)), own.start)

    def _of_experts(self, parts: Sequence[TensorPart], count: int) -> Any:
        """Load the matrices of `count` experts, which stay as narrow as they are stored if they can."""
        narrow = self._narrow(parts)
        # Each expert may have an input order of its own, but rows are gathered once for all experts.
        if narrow is None or narrow.input_order is not None:
            return Linear(self._fuse(parts)).of_experts(count)
        return self._kept(narrow, None).of_experts(count)

    def _layer_norm(self, prefix: str, name: str | None, eps: float) -> RmsNorm | None:
        return None if name is None else RmsNorm(self._norm_weight(f"{prefix}.{name}.weight"), eps)

    def _qk_norm(self, attention: str) -> RmsNorm | ProjectionNorm | None:
        config, shard = self._config, self._shard
        names = [f"{attention}.{name}.weight" for name in ("q_norm", "k_norm")]
        local, head_dim = shard.config(config), config.head_dim
        if not config.switches.qk_norm:
            return None
        if config.switches.qk_norm == "head":
            query, key = (self._norm_weight(name) for name in names)
            weight = torch.cat((query.expand(local.num_heads, -1), key.expand(local.num_kv_heads, -1)))
            return RmsNorm(weight if self._head_order is None else weight[:, self._head_order], config.rms_norm_eps)
        parts = [TensorPart(name, rows=part) for name, part in zip(names, (self._heads, self._kv_heads), strict=True)]
        weight = self._fuse(parts).view(-1, head_dim)
        sizes = local.num_heads * shard.size * head_dim, local.num_kv_heads * shard.size * head_dim
        return ProjectionNorm(weight, config.rms_norm_eps, local.num_heads, sizes)
