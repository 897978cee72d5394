"""Settings of a model that its GGUF file has, but transformers (5.24) leaves out. Without them the model would generate
other tokens.

Above all these are the settings of scaled RoPE: for Llama 3.1 and later, the file has the factor of each frequency as a
tensor (rope_freqs); for Phi-3 it has two of them; for others, a type and numbers. Then there are windows, caps, the
base of the frequencies where transformers takes its own default, and what llama.cpp infers from the model's size alone.
"""

from collections.abc import Mapping
from typing import Any

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_WHERE_STATED = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Key of config.json, by the key of the GGUF file."""
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""Number of layers of the 27B models, by model type. They divide attention scores by the square root of
hidden_size / num_attention_heads, and not of head_dim."""
_SCALING = "rope.scaling."
_OF_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_PARTLY_ROTATED = ("phi3", "stablelm")


def left_out(raw: Mapping[str, Any], reader: Any) -> dict[str, Any]:
    """Return what to change in a config.json: settings of a gguf.GGUFReader that its content, `raw`, lacks.

    Raises:
        ValueError: config.json has no key for a setting, which the message names.
    """
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}."
    stated = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    found: dict[str, Any] = {}
    for name, key in _WHERE_STATED.items():
        if key in raw and name in stated:
            found[key] = stated[name] or None
        elif 0 < (stated.get(name) or 0) < raw["max_position_embeddings"]:
            raise ValueError(f"{prefix}{name}={stated[name]}: transformers has none of a {raw['model_type']}")
    if raw["num_hidden_layers"] == _LAYERS_OF_27B.get(raw["model_type"]):
        found["query_pre_attn_scalar"] = raw["hidden_size"] // raw["num_attention_heads"]
    given = raw.get("rope_parameters") or {}
    rope = _rope(raw, given.get("full_attention", given), stated)
    rope |= _scaling(raw, stated, {each.name: each.data for each in reader.tensors if each.name in _ROPE_TENSORS})
    found["rope_parameters"] = {**given, "full_attention": rope} if "full_attention" in given else rope
    if rope["rope_type"] == "longrope":  # Phi-3's config reads it from a key of its own
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return found


def count_numbers(reader: Any) -> int:
    """Count the numbers in the tensors of a file that are a model's weights."""
    return sum(int(each.n_elements) for each in reader.tensors if each.name not in _ROPE_TENSORS)


def _rope(raw: Mapping[str, Any], given: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of RoPE other than its scaling. `given` are those that transformers found."""
    rope = {"rope_type": "default", "rope_theta": stated.get("rope.freq_base", given.get("rope_theta", 1e4))}
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    rotated = stated.get("rope.dimension_count", head_dim)
    if raw["model_type"] in _PARTLY_ROTATED:
        rope["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise ValueError(f"rope.dimension_count={rotated}: transformers rotates all {head_dim} of a head")
    return rope


def _scaling(raw: Mapping[str, Any], stated: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    named = {name.removeprefix(_SCALING): value for name, value in stated.items() if name.startswith(_SCALING)}
    kind, magnitude = named.pop("type", "none"), named.pop("attn_factor", None)
    original = named.pop("original_context_length", None) or raw["max_position_embeddings"]
    named.pop("finetuned", None)
    if tensors:
        factors = {name: [float(each) for each in data] for name, data in tensors.items()}
        same = factors.get("rope_freqs.weight")
        return {
            "rope_type": "longrope",
            "long_factor": same or factors["rope_factors_long.weight"],
            "short_factor": same or factors["rope_factors_short.weight"],
            "original_max_position_embeddings": original,
            "attention_factor": magnitude or (1.0 if same else None),
        }
    if kind == "none":
        return {}
    factor = float(named.pop("factor", 0))
    own = {key: named.pop(name) for name, key in _OF_YARN.items() if name in named and kind == "yarn"}
    if kind not in ("linear", "yarn") or factor <= 0 or magnitude not in (None, 0, 1) or named:
        every = {"type": kind, "factor": factor, "attn_factor": magnitude, **named}
        raise ValueError(f"rope.scaling of {every}: transformers has no such RoPE")
    if kind == "yarn":
        own["original_max_position_embeddings"] = original
    return {"rope_type": kind, "factor": factor, **own}
