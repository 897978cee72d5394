"""Keywords of LLM: those of nano-vllm, and the fields of PdDisaggConfig."""

import difflib
import warnings
from pathlib import Path
from typing import Any

NANO_VLLM_NAMES = {"kvcache_block_size": "block_size", "num_kvcache_blocks": "num_blocks"}
IGNORED = {"hf_config": "it is read from the folder", "eos": "it is read from the folder"}
NOT_OF_ONE_ENGINE = {
    "gpu_instances",
    "scheduler",
    "kv_buffer_size",
    "kv_ip",
    "kv_port",
    "kv_timeout_s",
    "kv_checksum",
    "kv_options",
}


def within_model_len(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Lower a `max_model_len` that exceeds the model's own to the model's own, as nano-vllm does."""
    from hbserve_core.model.model_config import load_model_config

    wanted = settings.get("max_model_len")
    if not isinstance(wanted, int):  # None means the model's own; a wrong type is refused later, like other keywords'
        return settings
    return settings | {"max_model_len": min(wanted, load_model_config(folder).max_model_len)}


def translated(keywords: dict[str, Any], default_backend: str | None) -> dict[str, Any]:
    """Translate nano-vllm's keywords to fields of PdDisaggConfig. Warns of each that is unknown or without effect."""
    from hbserve.pd_disagg.config import PdDisaggConfig

    known = set(PdDisaggConfig.__struct_fields__) - {"model_path"}
    settings: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in IGNORED:
            warnings.warn(f"LLM({name}=...) is not used: {IGNORED[name]}", stacklevel=3)
        elif name == "enforce_eager":
            settings["cuda_graph_enabled"] = not value
        elif (own := NANO_VLLM_NAMES.get(name, name)) in known:
            settings[own] = None if name == "num_kvcache_blocks" and value == -1 else value
        else:
            close = difflib.get_close_matches(name, {*known, *NANO_VLLM_NAMES, "enforce_eager"}, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            warnings.warn(f"LLM({name}=...) is unknown and ignored{hint}", stacklevel=3)
    if settings.setdefault("kv_transfer_backend", default_backend) is None:
        del settings["kv_transfer_backend"]
        for name in NOT_OF_ONE_ENGINE & settings.keys():
            warnings.warn(f"LLM({name}=...) is not used by one engine; give kv_transfer_backend too", stacklevel=3)
    return settings
