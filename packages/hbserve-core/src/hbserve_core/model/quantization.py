"""Quantised weights, as a config.json describes them: which can be read, and by which blocks they have scales."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hbserve_core.errors import UnsupportedModel

BLOCK = (128, 128)


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
    if method == "fp8" and given.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"):
        return _block(folder, given.get("weight_block_size"))
    if method == "compressed-tensors":
        groups = [group["weights"] for group in given.get("config_groups", {}).values() if group.get("weights")]
        if not groups and given.get("kv_cache_scheme"):  # of which the scales are read, whatever it says
            return None
        if groups and all(each.get("num_bits") == 8 and each.get("type") == "float" for each in groups):
            return _block(
                folder, next((each["block_structure"] for each in groups if each.get("block_structure")), None)
            )
    raise UnsupportedModel(
        f"{folder}: quantization_config ({method}) is not supported; supported: fp8, and compressed-tensors of 8-bit "
        "floats; others need products of their own: use unquantised weights"
    )


def _block(folder: Path, given: Any) -> tuple[int, int]:
    if given is None:
        return BLOCK
    if len(given) != 2 or not all(isinstance(each, int) and each > 0 for each in given):
        raise UnsupportedModel(f"{folder}: weight_block_size={given!r}, expected two sizes")
    return given[0], given[1]
