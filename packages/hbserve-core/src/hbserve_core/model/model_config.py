"""Configuration of a model, read as plain JSON from its Hugging Face folder, and checked.

The differences between architectures are in architectures.py. torch is not imported: whoever starts instances first
asks whether they can serve the model, and must not wait for that import.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbserve_core.errors import ModelFilesMissing, UnsupportedModel
from hbserve_core.model.architectures import ARCHITECTURES, Experts, Switches
from hbserve_core.model.config_values import checked_values
from hbserve_core.model.end_tokens import end_token_ids
from hbserve_core.model.quantization import Packing, keeps_inputs, packing, scale_block
from hbserve_core.model.rope_config import RopeConfig, extended_length, read_rope_configs
from hbserve_core.model.weight_files import stored_dtype
from hbserve_rpc.settings import EngineSettings

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
_SPELLINGS = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
}


def torch_dtype(name: str) -> "torch.dtype":
    """Return torch's dtype for one of DTYPES."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one model."""

    path: Path
    architecture: str
    dtype_name: str
    """Name of the checkpoint's dtype, one of DTYPES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    """Rotation of the layers that rotate; see `layer_ropes`."""
    local_rope: RopeConfig | None
    """Rotation of the sliding layers, if it is a different one."""
    sliding_layers: tuple[int, ...]
    """Layers that were trained to see only a window of the context."""
    windows: tuple[int, ...]
    """Number of last positions that a token sees in each layer, including its own; 0 means all that a sequence can
    have."""
    max_model_len: int
    """Largest number of tokens of a sequence."""
    tied_embeddings: bool
    """Whether the output projection is the embedding table."""
    switches: Switches
    attention_scale: float
    """Factor of attention's scores."""
    scale_block: tuple[int, int] | None
    """Rows and columns of 8-bit weights that share a scale; None if there are no such weights. See
    `quantization.scale_block`."""
    eos_token_ids: tuple[int, ...]
    """Ids of the tokens in the vocabulary that end a sequence."""
    packing: Packing | None = None
    """Storage format of 4-bit weights; None if there are none."""
    keeps_inputs: bool = False
    """Whether 8-bit weights are for inputs in the model's own dtype only (W8A16)."""

    @property
    def reach(self) -> int:
        """Number of last positions that the layer with the largest window sees, including the token's own; 0 means
        all."""
        return max(self.windows) if all(self.windows) else 0

    @property
    def dtype(self) -> "torch.dtype":
        """Dtype of the checkpoint."""
        return torch_dtype(self.dtype_name)

    def within(self, max_model_len: int) -> "ModelConfig":
        """Return the same model for an engine whose sequences are no longer than this."""
        local = None if self.local_rope is None else self.local_rope.within(max_model_len)
        return replace(self, max_model_len=max_model_len, rope=self.rope.within(max_model_len), local_rope=local)

    def layer_ropes(self) -> list[RopeConfig]:
        """Return the rotation of each layer."""
        ropes = [self.rope] * self.num_layers
        if self.local_rope is not None:
            for layer in self.sliding_layers:
                ropes[layer] = self.local_rope
        for layer in self.switches.plain_layers:
            ropes[layer] = self.rope.without_rotation()
        return ropes


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `config.json` and, where they are there, `generation_config.json` and the end token of the tokenizer.

    Raises:
        ModelFilesMissing: there is no such folder or no config.json in it, or config.json cannot be read.
        UnsupportedModel: an architecture, activation, RoPE type or sliding window that this engine does not have, or a
            config.json that lacks a size.
        BrokenTokenizer: a tokenizer's files cannot be read.
        WeightsMismatch: config.json does not say the dtype of the weights, and these cannot be read.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise ModelFilesMissing(f"model folder {str(folder)!r} does not exist: give the path of a Hugging Face folder")
    raw = _read_json(folder / "config.json")
    if raw is None:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelFilesMissing(f"model folder {str(folder)!r} has no config.json (it has: {found})")
    raw = checked_values(folder / "config.json", raw)
    architecture = _find_architecture(folder, raw)
    built = ARCHITECTURES[architecture]
    try:
        return _parse(folder, architecture, built.completed(raw), _read_json(folder / "generation_config.json") or {})
    except KeyError as error:
        name = _own_name(architecture, error.args[0])
        raise UnsupportedModel(f"{folder / 'config.json'}: {name!r} is missing") from error


def _find_architecture(folder: Path, raw: Mapping[str, Any]) -> str:
    """Return the supported one of `architectures` or, if that is empty, the architecture of `model_type`.

    Raises:
        UnsupportedModel: there is none; the message lists the supported ones.
    """
    names = raw.get("architectures") or []
    if not names:
        names = [name for name, each in ARCHITECTURES.items() if each.model_type == raw.get("model_type")]
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    found = ", ".join(map(str, names)) or f"none named (model_type={raw.get('model_type')!r})"
    others = [name.removesuffix("_config") for name in ("vision_config", "audio_config") if raw.get(name)]
    need = f"; it needs parts for {' and '.join(others)}, or its language model saved by itself" if others else ""
    supported = ", ".join(ARCHITECTURES)
    raise UnsupportedModel(f"{folder}: architecture {found} is not supported{need}; supported: {supported}")


def _own_name(architecture: str, general: str) -> str:
    """Return the name in this architecture's config.json for a key that others call `general`."""
    return {ours: own for own, ours in ARCHITECTURES[architecture].renamed.items()}.get(general, general)


def configured_model(path: str | Path, settings: EngineSettings) -> ModelConfig:
    """Return the model of instances, split among ranks as their settings say. Raises what `load_model_config`
    raises."""
    model = load_model_config(path)
    if model.switches.experts is None:
        return model
    experts = replace(model.switches.experts, whole_on_ranks=settings.expert_parallel)
    return replace(model, switches=replace(model.switches, experts=experts))


def _parse(folder: Path, architecture: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    switches = ARCHITECTURES[architecture].switches(raw)
    _refuse_what_is_not_built(folder, raw, architecture, switches)
    num_heads = raw["num_attention_heads"]
    num_kv_heads = raw.get("num_key_value_heads") or num_heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // num_heads
    _refuse_parts_that_do_not_fit(folder, raw["hidden_size"], num_heads, num_kv_heads, head_dim, switches.experts)
    rope, local_rope = read_rope_configs(folder, raw)
    for each in {rope, local_rope or rope}:
        _refuse_rotation(folder, architecture, each, head_dim)
    stated = raw["max_position_embeddings"]
    max_model_len = stated if local_rope else extended_length(rope, stated)  # with a local one, it is extended already
    sliding = _sliding_layers(folder, architecture, raw, switches, max_model_len)
    window = raw["sliding_window"] if sliding and raw["sliding_window"] < max_model_len else 0
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
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=rope,
        local_rope=local_rope,
        sliding_layers=sliding,
        windows=tuple(window if i in sliding else 0 for i in range(raw["num_hidden_layers"])),
        max_model_len=max_model_len,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        switches=switches,
        attention_scale=switches.attention_multiplier or head_dim**-0.5,
        scale_block=scale_block(folder, raw),
        eos_token_ids=end_token_ids(folder, raw, generation, raw["vocab_size"]),
        packing=packing(folder, raw),
        keeps_inputs=keeps_inputs(raw),
    ).within(max_model_len)


def _refuse_what_is_not_built(folder: Path, raw: Mapping[str, Any], architecture: str, switches: Switches) -> None:
    expected = "gelu_pytorch_tanh" if switches.activation == "gelu" else switches.activation
    key = "hidden_activation" if raw.get("hidden_activation") else "hidden_act"
    activation = raw.get(key) or expected
    activation = "silu" if activation == "swish" else activation
    if activation != expected:
        key = _own_name(architecture, key)
        raise UnsupportedModel(f"{folder}: {key}={activation!r} is not supported; supported: {expected!r}")
    for name, is_causal in {"use_bidirectional_attention": False, "is_causal": True}.items():
        if bool(raw.get(name, is_causal)) != is_causal:
            raise UnsupportedModel(f"{folder}: {name}={json.dumps(raw[name])} is not supported; it needs another mask")
    for name, (value, needed) in ARCHITECTURES[architecture].only.items():
        if raw.get(name, value) != value:
            given = json.dumps(raw[name])
            raise UnsupportedModel(f"{folder}: {name}={given} of {architecture} is not supported; it needs {needed}")


def _refuse_parts_that_do_not_fit(
    folder: Path, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, experts: Experts | None
) -> None:
    if num_heads % num_kv_heads:
        raise UnsupportedModel(
            f"{folder}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    if head_dim < 1:
        raise UnsupportedModel(f"{folder}: num_attention_heads={num_heads}: more than hidden_size={hidden_size}")
    if experts is not None and experts.per_token > experts.count:
        raise UnsupportedModel(f"{folder}: num_experts_per_tok={experts.per_token}: there are {experts.count} experts")


def _refuse_rotation(folder: Path, architecture: str, rope: RopeConfig, head_dim: int) -> None:
    if rope.partial != 1 and not ARCHITECTURES[architecture].part_of_head:
        raise UnsupportedModel(
            f"{folder}: partial_rotary_factor={rope.partial} of {architecture} is not supported; it rotates whole heads"
        )
    rope.check_fits(folder, head_dim)


def _sliding_layers(
    folder: Path, architecture: str, raw: Mapping[str, Any], switches: Switches, max_model_len: int
) -> tuple[int, ...]:
    """Return the layers that only see a window of the context. Many configs carry a window that they do not use."""
    count, kinds = raw["num_hidden_layers"], raw.get("layer_types")
    given = [] if kinds is None else list(kinds)
    unknown = sorted(set(given) - {"full_attention", "sliding_attention"})
    if unknown or (kinds is not None and len(given) != count):
        raise UnsupportedModel(
            f"{folder}: {len(given)} layer_types with {', '.join(unknown) or 'no unknown one'}: expected {count} of "
            "full_attention and sliding_attention; others need attention that this engine does not have"
        )
    if raw.get("sliding_window") is None:
        return ()
    known, own = ARCHITECTURES[architecture], switches.windowed_layers
    layers = own if kinds is None else tuple(i for i, kind in enumerate(given) if kind == "sliding_attention")
    is_off = not raw.get("use_sliding_window", True)
    if is_off and "max_window_layers" in known.defaults:
        return ()
    if raw["sliding_window"] >= max_model_len:
        return layers
    if layers != own and not known.by_layer:
        contradiction = "layer_types of its own"
    elif layers and is_off:
        contradiction = "use_sliding_window=false"
    else:
        return layers
    raise UnsupportedModel(
        f"{folder}: {contradiction} beside sliding_window={raw['sliding_window']} is not supported of "
        f"{architecture}, where transformers looks at the latter alone; sliding_window=null means no window"
    )


def _checkpoint_dtype(folder: Path, raw: Mapping[str, Any]) -> str:
    given = raw.get("dtype") or raw.get("torch_dtype") or stored_dtype(folder) or "float32"
    name = str(given).removeprefix("torch.")
    name = _SPELLINGS.get(name, name)
    if name not in DTYPES:
        raise UnsupportedModel(f"{folder}: dtype={given!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair, escaped, is no text either
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFilesMissing(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError includes text that is not UTF-8
        raise UnsupportedModel(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: expected a JSON object")
    return value
