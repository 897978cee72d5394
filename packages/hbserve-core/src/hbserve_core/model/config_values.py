"""Types and bounds of the values of a config.json that are read here. Other files say what the values mean.

A file that was edited by hand, or cut off, is refused with the name of the key before anything is computed from it. The
bounds are far above any model: they keep what is made for each layer or each position within memory.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec

from hbserve_core.errors import UnsupportedModel

Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
"""Number that is neither infinite nor NaN, both of which Python's JSON may contain."""
Above0 = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Epsilon = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Rope(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Above0 | None = None
    factor: Number | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: Number | None = None
    attention_factor: Number | None = None
    beta_fast: Above0 | None = None
    beta_slow: Above0 | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    low_freq_factor: Above0 | None = None
    high_freq_factor: Above0 | None = None
    long_factor: list[Number] | None = None
    short_factor: list[Number] | None = None
    full_attention: "_Rope | None" = None
    sliding_attention: "_Rope | None" = None


class _Weights(msgspec.Struct):
    num_bits: int | None = None
    type: str | None = None
    block_structure: list[int] | None = None


class _Group(msgspec.Struct):
    weights: _Weights | None
    input_activations: dict[str, Any] | None = None


class _Quantization(msgspec.Struct):
    quant_method: str | None = None
    fmt: str | None = None
    weight_block_size: list[int] | None = None
    config_groups: dict[str, _Group] = {}


class _Values(msgspec.Struct):
    """Types of values, by the names of every architecture. The defaults mean nothing: only keys that are present are
    checked."""

    architectures: list[str] | None = None
    model_type: str | None = None
    vocab_size: Size = 1
    hidden_size: Size = 1
    intermediate_size: Size = 1
    ffn_dim: Size = 1
    num_hidden_layers: Layers = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 1
    original_max_position_embeddings: Size | None = None
    rms_norm_eps: Epsilon = 0
    norm_epsilon: Epsilon = 0
    layer_norm_eps: Epsilon = 0
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    attention_out_bias: bool | None = None
    mlp_bias: bool | None = None
    use_bias: bool | None = None
    use_qkv_bias: bool | None = None
    layer_types: list[str] | None = None
    sliding_window: Index | None = None
    use_sliding_window: bool | None = None
    sliding_window_pattern: Size = 1
    max_window_layers: Index = 0
    no_rope_layers: list[bool | int] | None = None
    no_rope_layer_interval: Size = 1
    rope_theta: Above0 | None = None
    rope_local_base_freq: Above0 | None = None
    partial_rotary_factor: Number | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    embedding_multiplier: Above0 = 1
    residual_multiplier: Above0 = 1
    attention_multiplier: Above0 = 1
    logits_scaling: Above0 = 1
    query_pre_attn_scalar: Above0 = 1
    attn_logit_softcapping: Above0 | None = None
    final_logit_softcapping: Above0 | None = None
    num_experts: Size = 1
    num_local_experts: Size = 1
    num_experts_per_tok: Size = 1
    moe_intermediate_size: Size = 1
    norm_topk_prob: bool | None = None
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: Size = 1
    quantization_config: _Quantization | None = None


_MAY_BE_NULL = {field.name for field in msgspec.structs.fields(_Values) if type(None) in get_args(field.type)}


def checked_values(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Check a config.json and return it without keys that are null and then mean nothing. Exports have such keys, even
    of other architectures.

    Raises:
        UnsupportedModel: a value is not possible; the message has its key, and what is allowed.
    """
    known = _Values.__struct_fields__
    raw = {name: value for name, value in raw.items() if value is not None or name not in known or name in _MAY_BE_NULL}
    try:
        msgspec.convert(raw, _Values)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        path = path.rstrip("`")
        given = repr(_at(raw, path))
        given = given if len(given) <= 60 else f"{given[:56]} ..."
        raise UnsupportedModel(f"{file}: {path}={given}: {problem[0].lower()}{problem[1:]}") from None
    count, rotates = raw.get("num_hidden_layers", 0), raw.get("no_rope_layers")
    if rotates is not None and len(rotates) != count:
        raise UnsupportedModel(
            f"{file}: no_rope_layers has {len(rotates)} entries: expected one for each of {count} layers"
        )
    return raw


def _at(value: Any, path: str) -> Any:
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path.partition("[...]")[0]):
        value = value[int(index)] if index else value[name]
    return value
