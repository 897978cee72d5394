"""Quantised weights, as a config.json describes them: which can be read, and by which blocks they have scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hbserve_core.errors import UnsupportedModel

BLOCK = (128, 128)
_FORMAT = {"awq": ("version", ("gemm",)), "gptq": ("checkpoint_format", ("gptq", "gptq_v2"))}
"""For each method, the key that says how numbers are packed (newer files call it `format`), and what can be read."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How weights of 4 bits are stored; see checkpoint/packed_weights.py."""

    method: Literal["awq", "gptq"]
    group_size: int
    """Inputs that share a scale; -1: all of them."""
    zero_offset: int
    """What is to be added to zeros as they are stored."""
    is_ordered: bool = True
    """Whether inputs that share a scale are neighbours; else each weight says which do."""


def packing(folder: Path, raw: Mapping[str, Any]) -> Packing | None:
    """How 4-bit weights are stored; None: there are none.

    Raises:
        UnsupportedModel: another kind of AWQ or GPTQ than is read here; names what it is.
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
    """Rows and columns of a weight that share a scale, of weights that have scales by block; None: they are not
    quantised. Weights with one scale each, or one for each row, say so by the shape of their scales.

    Raises:
        UnsupportedModel: anything but 8-bit floats (e4m3); says what it would need.
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
        if not groups and given.get("kv_cache_scheme"):  # of which the scales are read, whatever it says
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
    """Whether a checkpoint of 8-bit weights was made for inputs that keep their bits (W8A16). Others leave it to the
    engine to make them 8-bit floats too, by scales of its own."""
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
