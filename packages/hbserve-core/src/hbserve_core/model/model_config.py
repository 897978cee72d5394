"""The configuration of a model, as its Hugging Face folder says it, read as plain JSON and checked.

The three supported architectures are one decoder with a few switches: see `_ARCHITECTURES`.
torch is not imported: whoever starts instances asks first whether they can serve the model, and must not wait for it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbserve_core.errors import ModelFilesMissing, UnsupportedModel
from hbserve_core.model.end_tokens import end_token_ids
from hbserve_core.model.rope_config import RopeConfig, extended_length, read_rope_config

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def torch_dtype(name: str) -> "torch.dtype":
    """torch's own dtype for one of DTYPES."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True, slots=True)
class Biases:
    """Which linear layers add a bias, and whether each query and key head is normalised."""

    qkv: bool
    output: bool
    mlp: bool
    qk_norm: bool


def _qwen3(raw: Mapping[str, Any]) -> Biases:
    attention = bool(raw.get("attention_bias", False))
    return Biases(qkv=attention, output=attention, mlp=False, qk_norm=True)


def _qwen2(raw: Mapping[str, Any]) -> Biases:
    return Biases(qkv=True, output=False, mlp=False, qk_norm=False)


def _llama(raw: Mapping[str, Any]) -> Biases:
    attention = bool(raw.get("attention_bias", False))
    return Biases(qkv=attention, output=attention, mlp=bool(raw.get("mlp_bias", False)), qk_norm=False)


_ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], Biases]] = {
    "Qwen3ForCausalLM": _qwen3,
    "Qwen2ForCausalLM": _qwen2,
    "LlamaForCausalLM": _llama,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one model."""

    path: Path
    architecture: str
    dtype_name: str
    """Of the checkpoint, one of DTYPES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_model_len: int
    """Most tokens of a sequence."""
    tied_embeddings: bool
    """The output projection is the embedding table."""
    biases: Biases
    eos_token_ids: tuple[int, ...]
    """Each of them ends a sequence."""

    @property
    def dtype(self) -> "torch.dtype":
        """Of the checkpoint."""
        return torch_dtype(self.dtype_name)


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `config.json` and, where they are there, `generation_config.json` and the end token of the tokenizer.

    Raises:
        ModelFilesMissing: no such folder, or no config.json in it.
        UnsupportedModel: an architecture, activation, RoPE type or sliding window that this engine does not have,
            or a config.json that lacks a size.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelFilesMissing(f"model folder {str(folder)!r} does not exist: give the path of a Hugging Face folder")
    raw = _read_json(folder / "config.json")
    if raw is None:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelFilesMissing(f"model folder {str(folder)!r} has no config.json (it has: {found})")
    architecture = _architecture(folder, raw)
    try:
        return _parse(folder, architecture, raw, _read_json(folder / "generation_config.json") or {})
    except KeyError as error:
        raise UnsupportedModel(f"{folder / 'config.json'}: {error.args[0]!r} is missing") from error


def _parse(folder: Path, architecture: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    _refuse_what_is_not_built(folder, raw)
    num_heads = raw["num_attention_heads"]
    num_kv_heads = raw.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModel(
            f"{folder}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    rope = read_rope_config(folder, raw)
    return ModelConfig(
        path=folder,
        architecture=architecture,
        dtype_name=_checkpoint_dtype(folder, raw),
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=raw.get("head_dim") or _default_head_dim(architecture, raw),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=rope,
        max_model_len=extended_length(rope, raw["max_position_embeddings"]),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        biases=_ARCHITECTURES[architecture](raw),
        eos_token_ids=end_token_ids(folder, raw, generation),
    )


def _default_head_dim(architecture: str, raw: Mapping[str, Any]) -> int:
    """Qwen3's own default is 128 whatever the hidden size; the others divide the hidden size among the heads."""
    if architecture == "Qwen3ForCausalLM":
        return 128
    return int(raw["hidden_size"] // raw["num_attention_heads"])


def _architecture(folder: Path, raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return str(name)
    found = ", ".join(map(str, names)) or f"none named (model_type={raw.get('model_type')!r})"
    raise UnsupportedModel(f"{folder}: architecture {found} is not supported; supported: {', '.join(_ARCHITECTURES)}")


def _refuse_what_is_not_built(folder: Path, raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"{folder}: hidden_act={activation!r} is not supported; supported: 'silu'")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"{folder}: quantization_config ({method}) is not supported; use unquantised weights")
    if _slides(raw):
        raise UnsupportedModel(f"{folder}: sliding_window={raw.get('sliding_window')} is in use, and not supported")


def _slides(raw: Mapping[str, Any]) -> bool:
    """Whether any layer looks at a window of the context only. Many configs carry a window that they do not use."""
    if "layer_types" in raw and raw["layer_types"] is not None:
        return any(layer_type != "full_attention" for layer_type in raw["layer_types"])
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return False
    # Qwen: layers from max_window_layers on have the window.
    return bool(raw.get("max_window_layers", 0) < raw["num_hidden_layers"])


def _checkpoint_dtype(folder: Path, raw: Mapping[str, Any]) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise UnsupportedModel(f"{folder}: dtype={name!r} is not supported; supported: {', '.join(DTYPES)}")
    return str(name)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: expected a JSON object")
    return value
