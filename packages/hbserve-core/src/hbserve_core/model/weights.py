"""Loading: a checkpoint's tensors become the layers that the forward pass wants; layers.py has their shapes.

A checkpoint's weights are (O, I), as ours are. Those of q, k and v, and of gate and up, are put one below the other:
    rank's rows of q_proj, k_proj, v_proj          ─▶ qkv        rank's columns of o_proj       ─▶ output
    rank's rows of gate_proj, up_proj              ─▶ gate_up    rank's columns of down_proj    ─▶ down
    rank's rows of embed_tokens, lm_head           ─▶ embedding, head
Each rank reads its part (see shard.py), and no more than that.
"""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.checkpoint.checkpoint import Checkpoint, with_stored_head
from hbserve_core.model.checkpoint.dummy_checkpoint import DummyCheckpoint
from hbserve_core.model.checkpoint.tensor_source import TensorPart, TensorSource, weights_digest
from hbserve_core.model.layers import DecoderWeights, LayerWeights, Linear, RmsNorm
from hbserve_core.model.linear import make_linear
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.shard import Shard

logger = logging.getLogger(__name__)


def load_weights(
    config: ModelConfig, load_format: str, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
) -> DecoderWeights:
    """Read, or for load_format "dummy" invent, a rank's part of the weights. `config` is of the whole model.

    All of them are there when it returns, for any stream.

    Raises:
        InvalidInstanceConfig: another load_format.
        ModelFilesMissing, WeightsMismatch: as `Checkpoint` says.
    """
    if load_format not in ("safetensors", "dummy"):
        raise InvalidInstanceConfig(f"load_format={load_format!r}: expected 'safetensors' or 'dummy'")
    began_s = time.perf_counter()
    if load_format == "safetensors":
        config = with_stored_head(config)
    shapes = checkpoint_shapes(config)
    source: TensorSource
    source = DummyCheckpoint(shapes) if load_format == "dummy" else Checkpoint(config, shapes, device)
    with contextlib.closing(source):
        loader = _Loader(config, shard or Shard(), source, dtype, device)
        weights = loader.decoder()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, gigabytes = time.perf_counter() - began_s, loader.num_bytes / 1e9
    logger.info("weights: %.2f GB (%s) in %.1f s", gigabytes, load_format, seconds)
    return weights


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model needs."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config).items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = [
        ("self_attn.q_proj", query, hidden, config.biases.qkv),
        ("self_attn.k_proj", key, hidden, config.biases.qkv),
        ("self_attn.v_proj", key, hidden, config.biases.qkv),
        ("self_attn.o_proj", hidden, query, config.biases.output),
        ("mlp.gate_proj", inner, hidden, config.biases.mlp),
        ("mlp.up_proj", inner, hidden, config.biases.mlp),
        ("mlp.down_proj", hidden, inner, config.biases.mlp),
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, outputs, inputs, has_bias in linears:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (outputs,)
    if config.biases.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes | {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}


class _Loader:
    """Fetches tensors by name, takes the rank's part, fuses them, and brings them to the engine's dtype and device."""

    def __init__(
        self, config: ModelConfig, shard: Shard, source: TensorSource, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._shard = shard
        self._source = source
        self._shapes = checkpoint_shapes(config)
        self._dtype = dtype
        self._device = device
        self._heads = shard.part(config.num_heads, config.head_dim)
        self._kv_heads = shard.kv_part(config.num_kv_heads, config.head_dim)
        self._inner = shard.part(config.intermediate_size)
        self.num_bytes = 0
        """Of what has been loaded."""

    def decoder(self) -> DecoderWeights:
        embedding = self._vocabulary("model.embed_tokens.weight")
        # Without a terminal there is no bar.
        layers = tqdm(range(self._config.num_layers), desc="weights of layers", disable=None, leave=False)
        return DecoderWeights(
            embedding=embedding,
            first_token=self._shard.rank * len(embedding),
            layers=tuple(map(self._layer, layers)),
            head=make_linear(embedding if self._config.tied_embeddings else self._vocabulary("lm_head.weight")),
            norm=self._norm("model.norm.weight"),
            # Last: by now the files are in the system's page cache.
            digest=weights_digest(self._source, self._shapes),
        )

    def _fuse(self, parts: Sequence[TensorPart], num_rows: int | None = None) -> torch.Tensor:
        """Parts of tensors one below the other, and zeros up to `num_rows`."""
        shapes = [part.shape(self._shapes[part.name]) for part in parts]
        rows = num_rows or sum(shape[0] for shape in shapes)
        fused = torch.empty((rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        self.num_bytes += fused.nbytes
        first = 0
        for part, shape in zip(parts, shapes, strict=True):
            self._source.read(part, fused[first : first + shape[0]])
            first += shape[0]
        fused[first:].zero_()
        return fused

    def _whole(self, name: str) -> torch.Tensor:
        return self._fuse([TensorPart(name)])

    def _vocabulary(self, name: str) -> torch.Tensor:
        num_tokens = self._shard.num_tokens(self._config.vocab_size)
        first = self._shard.rank * num_tokens
        return self._fuse([TensorPart(name, rows=slice(first, first + num_tokens))], num_tokens)

    def _split_by_outputs(self, prefix: str, parts: Mapping[str, slice], has_bias: bool) -> Linear:
        def fused(kind: str) -> torch.Tensor:
            return self._fuse([TensorPart(f"{prefix}.{name}_proj.{kind}", rows=part) for name, part in parts.items()])

        return make_linear(fused("weight"), fused("bias") if has_bias else None)

    def _split_by_inputs(self, name: str, part: slice, has_bias: bool) -> Linear:
        weight = self._fuse([TensorPart(f"{name}_proj.weight", columns=part)])
        bias = self._whole(f"{name}_proj.bias") if has_bias and self._shard.rank == 0 else None
        return make_linear(weight, bias)

    def _layer(self, index: int) -> LayerWeights:
        prefix, biases = f"model.layers.{index}", self._config.biases
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = {"q": self._heads, "k": self._kv_heads, "v": self._kv_heads}
        return LayerWeights(
            attention_norm=self._norm(f"{prefix}.input_layernorm.weight"),
            qkv=self._split_by_outputs(attention, qkv, biases.qkv),
            qk_norm=self._qk_norm(attention) if biases.qk_norm else None,
            output=self._split_by_inputs(f"{attention}.o", self._heads, biases.output),
            mlp_norm=self._norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._split_by_outputs(mlp, {"gate": self._inner, "up": self._inner}, biases.mlp),
            down=self._split_by_inputs(f"{mlp}.down", self._inner, biases.mlp),
        )

    def _norm(self, name: str) -> RmsNorm:
        return RmsNorm(self._whole(name), self._config.rms_norm_eps)

    def _qk_norm(self, attention: str) -> RmsNorm:
        query, key = (self._whole(f"{attention}.{name}.weight") for name in ("q_norm", "k_norm"))
        local = self._shard.config(self._config)
        weight = torch.cat((query.expand(local.num_heads, -1), key.expand(local.num_kv_heads, -1)))
        return RmsNorm(weight, self._config.rms_norm_eps)
