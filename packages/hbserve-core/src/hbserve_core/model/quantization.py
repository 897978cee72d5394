"""Quantised weights, as a config.json describes them: which of them can be read, and which blocks share a scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hbserve_core.errors import UnsupportedModel

BLOCK = (128, 128)
_FORMAT = {"awq": ("version", ("gemm",)), "gptq": ("checkpoint_format", ("gptq", "gptq_v2"))}
"""Key that says how numbers are packed (newer files call it `format`), and its values that can be read, by method."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Storage format of 4-bit weights; see checkpoint/packed_weights.py."""

    method: Literal["awq", "gptq"]
    group_size: int
    """Number of inputs that share a scale; -1 means all of them."""
    zero_offset: int
    """Number to be added to the stored zeros."""
    is_ordered: bool = True
    """Whether inputs that share a scale are adjacent; otherwise each weight says which inputs share one."""


def packing(folder: Path, raw: Mapping[str, Any]) -> Packing | None:
    """Return the storage format of 4-bit weights, or None if there are none.

    Raises:
        UnsupportedModel: a kind of AWQ or GPTQ that is not read here; the message names it.
    """
    given = raw.get("quantization_config") or {}
    method = given.get("quant_method")
    if method not in ("awq", "gptq"):
        return None
    if given.get("backend") == "llm-awq":
        raise UnsupportedModel(f"{folder}: quantization_config (awq) has backend='llm-awq', which packs otherwise")
    own, usual = _FORMAT[method]
    form = own if given.get(own) is not None else "format"
    known: dict[str, tuple[object, ...]] = {"bits": (4,), form: usual}
    if method == "awq":
        known |= {"zero_point": (True,)}
    for name, allowed in known.items():
        value = given.get(name)
        value = value.lower() if isinstance(value, str) else value
        if value is not None and value not in allowed:
            of = " or ".join(map(repr, allowed))
            raise UnsupportedModel(f"{folder}: quantization_config ({method}) has {name}={value!r}; supported: {of}")
    size = given.get("group_size", 128)
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise UnsupportedModel(
            f"{folder}: quantization_config ({method}) has group_size={size!r}, expected a size or -1"
        )
    is_one_too_small = method == "gptq" and str(given.get(form) or "gptq").lower() == "gptq"
    return Packing(method, size, int(is_one_too_small), size == -1 or not given.get("desc_act"))


def scale_block(folder: Path, raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a weight that share a scale, for weights that have scales by block, or None if
    there are no 8-bit weights. Weights with a single scale, or one for each row, say so by the shape of their scales.

    Raises:
        UnsupportedModel: anything but 8-bit floats (e4m3); the message says what it would need.
    """
    given = raw.get("quantization_config")
    if not given:
        return None
    method = given.get("quant_method", "unknown")
    if method in ("awq", "gptq"):
        return None
    if method == "fp8" and given.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"):
        return _block(folder, given.get("weight_block_size"))
    if given.get("transform_config"):
        raise UnsupportedModel(
            f"{folder}: quantization_config ({method}) has transform_config; it needs rotations of what comes into its "
            "products: use weights without"
        )
    if method == "compressed-tensors":
        groups = [group["weights"] for group in given.get("config_groups", {}).values() if group.get("weights")]
        if not groups and given.get("kv_cache_scheme"):  # its scales are read, whatever the scheme says
            return None
        if groups and all(each.get("num_bits") == 8 and each.get("type") == "float" for each in groups):
            return _block(
                folder, next((each["block_structure"] for each in groups if each.get("block_structure")), None)
            )
    raise UnsupportedModel(
        f"{folder}: quantization_config ({method}) is not supported; supported: awq, gptq, fp8, and compressed-tensors "
        "of 8-bit floats; others need kernels that are not here: use unquantised weights"
    )


def keeps_inputs(raw: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint of 8-bit weights was made for inputs that keep their bits (W8A16). Other checkpoints
    let the engine convert inputs to 8-bit floats too, with scales of its own."""
    given = raw.get("quantization_config") or {}
    if given.get("quant_method") != "compressed-tensors":
        return False
    return not any(group.get("input_activations") for group in given.get("config_groups", {}).values())


def _block(folder: Path, given: Any) -> tuple[int, int]:
    if given is None:
        return BLOCK
    if len(given) != 2 or not all(isinstance(each, int) and each > 0 for each in given):
        raise UnsupportedModel(f"{folder}: weight_block_size={given!r}, expected two sizes")
    return given[0], given[1]
