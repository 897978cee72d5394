"""Minimum that a model's steps must read and compute, and the time that it takes at a device's limits."""

from dataclasses import dataclass

import torch

from hbserve_core.bench.device_limits import DeviceLimits
from hbserve_core.config import InstanceConfig
from hbserve_core.model.architectures import Experts
from hbserve_core.model.loaded_model import can_stay_narrow
from hbserve_core.model.model_config import ModelConfig


@dataclass(frozen=True)
class Work:
    """Work of one kernel's part of a step."""

    read_bytes: float
    flops: float

    def time_s(self, limits: DeviceLimits) -> float:
        """Return the time of the work at these limits. Reading and computing go on at the same time, so the slower of
        the two decides."""
        return max(self.read_bytes / limits.read_bytes_per_s, self.flops / limits.flops_per_s)


@dataclass(frozen=True)
class DecodeLimit:
    """Minimum time that a decode step can take, or several together."""

    limit_s: float
    """Sum over parts: each product and each layer's attention takes the longer of the times for its bytes, at a pure
    read's rate, and for its operations, at a large product's."""
    copy_s: float
    """Time of all bytes at a copy's rate, without operations: the limit with which older measurements were compared."""
    read_bytes: float
    flops: float

    def __add__(self, other: "DecodeLimit") -> "DecodeLimit":
        return DecodeLimit(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def share_of(self, time_s: float) -> str:
        """Describe the share of the limit that was reached."""
        return f"share {self.limit_s / time_s:.2f} ({self.copy_s / time_s:.2f} of a copy's)"


NO_WORK = DecodeLimit(0.0, 0.0, 0.0, 0.0)


def decode_limit(
    model: ModelConfig,
    dtype: torch.dtype,
    batch: int,
    context: float,
    limits: DeviceLimits,
    kv_dtype: torch.dtype | None = None,
    weight_bytes: float | None = None,
) -> DecodeLimit:
    """Compute the limit of one step that gives `batch` sequences a token each, after `context` tokens on average.

    kv_dtype: dtype of keys and values in the pool; None for the model's. weight_bytes: bytes of each number in the
    layers' projections, see `stored_bytes`; None for the model's. The limit leaves out what is next to nothing: rows of
    the embedding, activations, norms, the new tokens' keys and values, sampling, and what ranks tell each other. What
    several ranks have is counted as read once.
    """
    parts = decode_work(model, dtype, batch, context, kv_dtype, weight_bytes)
    read_bytes, flops = sum(part.read_bytes for part in parts), sum(part.flops for part in parts)
    limit_s = sum(part.time_s(limits) for part in parts)
    return DecodeLimit(limit_s, read_bytes / limits.copy_bytes_per_s, read_bytes, flops)


def stored_bytes(config: InstanceConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes of each number in the projections of an instance's layers. If they stay narrow, these are the
    checkpoint's, including the scales of 4-bit numbers. Scales of 8-bit floats are next to nothing."""
    if device.type != "cuda" or config.widen_weights or not can_stay_narrow(model, device):
        return dtype.itemsize
    if model.packing is not None:
        size = model.hidden_size if model.packing.group_size == -1 else model.packing.group_size
        return 0.5 + 2.5 / size
    return 1 if model.scale_block is not None else dtype.itemsize


def decode_work(
    model: ModelConfig,
    dtype: torch.dtype,
    batch: int,
    context: float,
    kv_dtype: torch.dtype | None = None,
    weight_bytes: float | None = None,
) -> list[Work]:
    """List the work of such a step, which is done one part after the other: in each layer four products and attention,
    then the head. Parameters are those of `decode_limit`. In a mixture of experts, the number of experts read is the
    average number that `batch` sequences touch if all experts are equally likely."""

    def product(num_weights: int, itemsize: float = weight_bytes or dtype.itemsize) -> Work:
        return Work(num_weights * itemsize, 2.0 * batch * num_weights)

    def attention(num_keys: float) -> Work:
        return Work(
            read_bytes=2 * model.num_kv_heads * model.head_dim * num_keys * (kv_dtype or dtype).itemsize,
            flops=4 * model.num_heads * model.head_dim * num_keys,
        )

    work: list[Work] = []
    for index in range(model.num_layers):
        # Every window is taken to be full, although those of a context's first tokens are not.
        keys = min(context, model.windows[index] or context)
        experts, products = _experts_of(model, index), layer_products(model, index)
        mlp = [product(products["gate_up"]), product(products["down"])]
        if experts is not None:
            touched = experts.count * (1 - (1 - experts.per_token / experts.count) ** batch)
            mlp = [Work(each.read_bytes * touched, each.flops * experts.per_token) for each in mlp]
        work += [product(products["qkv"]), product(products["output"]), *mlp, attention(batch * keys)]
    return [*work, product(model.vocab_size * model.hidden_size, dtype.itemsize)]


def _experts_of(model: ModelConfig, layer: int) -> Experts | None:
    experts = model.switches.experts
    return experts if experts is not None and layer in experts.layers else None


def layer_products(model: ModelConfig, layer: int = 0) -> dict[str, int]:
    """Return the number of weights in each of a layer's projections; that of one expert if there are several."""
    hidden, experts = model.hidden_size, _experts_of(model, layer)
    inner = experts.intermediate_size if experts else model.intermediate_size
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": hidden * (heads + 2 * kv_heads),
        "output": heads * hidden,
        "gate_up": hidden * (2 if model.switches.is_gated else 1) * inner,
        "down": inner * hidden,
    }


def num_layer_weights(model: ModelConfig) -> int:
    """Return how many weights a token goes through in the projections of all layers."""
    return sum(map(sum, _used_products(model)))


def _used_products(model: ModelConfig) -> list[tuple[int, int]]:
    """Return how many weights a token goes through in each layer: to queries, keys and values, and after its
    attention."""
    found = []
    for layer in range(model.num_layers):
        products, experts = layer_products(model, layer), _experts_of(model, layer)
        used = experts.per_token if experts else 1
        found.append((products["qkv"], products["output"] + used * (products["gate_up"] + products["down"])))
    return found


def prefill_flops(model: ModelConfig, lengths: list[int]) -> float:
    """Return the operations of projections and causal attention. What only the last tokens need is left out: the output
    projection and, in the last layer, everything after queries, keys and values."""
    *_, (_, after_last) = _used_products(model)
    weights = num_layer_weights(model) - after_last
    attention = 2 * (model.num_layers - 1) * model.num_heads * model.head_dim * sum(length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + attention
