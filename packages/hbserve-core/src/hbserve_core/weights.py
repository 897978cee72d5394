"""The weights of a decoder as the forward pass wants them: projections that read the same input are one matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hbserve_core.checkpoint import Checkpoint, DigestingSource, DummyCheckpoint, TensorSource
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.linear import Linear, make_linear
from hbserve_core.model_config import ModelConfig
from hbserve_core.norm import RmsNorm


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: RmsNorm
    qkv: Linear
    """Outputs: query heads, then key heads, then value heads."""
    qk_norm: RmsNorm | None
    """Of query and key heads together: its weight has one row per head."""
    output: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    """Outputs: gate, then up."""
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding: torch.Tensor
    """(vocab_size, hidden_size)"""
    layers: tuple[LayerWeights, ...]
    norm: RmsNorm
    head: Linear
    """To vocab_size outputs; from the embedding's own weights where they are tied."""
    digest: str
    """Equal for equal weights."""


def load_weights(config: ModelConfig, load_format: str, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Read, or for load_format "dummy" invent, all weights.

    Raises:
        InvalidInstanceConfig: another load_format.
        ModelFilesMissing, WeightsMismatch: as `Checkpoint` says.
    """
    if load_format not in ("safetensors", "dummy"):
        raise InvalidInstanceConfig(f"load_format={load_format!r}: expected 'safetensors' or 'dummy'")
    shapes = checkpoint_shapes(config)
    source: TensorSource = DummyCheckpoint(shapes, dtype) if load_format == "dummy" else Checkpoint(config, shapes)
    digesting = DigestingSource(source)
    loader = _Loader(config, digesting, dtype, device)
    embedding = loader.tensor("model.embed_tokens.weight")
    layers = tuple(loader.layer(index) for index in range(config.num_layers))
    head = embedding if config.tied_embeddings else loader.tensor("lm_head.weight")
    return DecoderWeights(embedding, layers, loader.norm("model.norm.weight"), make_linear(head), digesting.digest())


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
    """Fetches tensors by name, fuses them, and brings them to the engine's dtype and device."""

    def __init__(self, config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._source = source
        self._dtype = dtype
        self._device = device

    def tensor(self, *names: str) -> torch.Tensor:
        """One tensor, or several of them one below the other."""
        parts = [self._source.get(name) for name in names]
        rows = sum(len(part) for part in parts)
        # A copy in any case: tensors that safetensors maps into memory are slow to touch and keep their file open.
        fused = torch.empty((rows, *parts[0].shape[1:]), dtype=self._dtype, device=self._device)
        first = 0
        for part in parts:
            fused[first : first + len(part)].copy_(part)
            first += len(part)
        return fused

    def linear(self, prefix: str, names: Sequence[str], has_bias: bool) -> Linear:
        weight = self.tensor(*(f"{prefix}.{name}_proj.weight" for name in names))
        bias = self.tensor(*(f"{prefix}.{name}_proj.bias" for name in names)) if has_bias else None
        return make_linear(weight, bias)

    def layer(self, index: int) -> LayerWeights:
        prefix, biases = f"model.layers.{index}", self._config.biases
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            attention_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            qkv=self.linear(attention, "qkv", biases.qkv),
            qk_norm=self._qk_norm(attention) if biases.qk_norm else None,
            output=self.linear(attention, "o", biases.output),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self.linear(mlp, ("gate", "up"), biases.mlp),
            down=self.linear(mlp, ("down",), biases.mlp),
        )

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.tensor(name), self._config.rms_norm_eps)

    def _qk_norm(self, attention: str) -> RmsNorm:
        query, key = (self.tensor(f"{attention}.{name}.weight") for name in ("q_norm", "k_norm"))
        heads = (self._config.num_heads, -1), (self._config.num_kv_heads, -1)
        weight = torch.cat((query.expand(*heads[0]), key.expand(*heads[1])))
        return RmsNorm(weight, self._config.rms_norm_eps)
