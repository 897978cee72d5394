"""Scales of 8-bit weights in a checkpoint: one for a whole tensor, for each of its rows, or for each of its blocks."""

from collections.abc import Mapping
from math import inf, prod
from typing import NamedTuple

import torch

from hbserve_core.model.checkpoint.safetensors_file import DTYPES, StoredTensor

FP8 = "F8_E4M3"
_SUFFIXES = ("_scale_inv", "_scale")
"""Suffixes that are appended to a weight's name for its scales. Weights are multiplied by them, despite the name of the
first."""
KV_SCALES = (".k_scale", ".v_scale")
"""Suffixes of the names of scales for keys and values in a pool of 8-bit floats. Other pools need none."""
_OTHERS = (".input_scale", ".output_scale", ".q_scale")
"""Suffixes of the names of scales for values that are not stored. Here these values stay in 16 bits."""


class WeightScales(NamedTuple):
    """Scales of one weight matrix, which multiply its 8-bit floats."""

    values: torch.Tensor
    """Scales, (block rows, block columns), float32, on the CPU."""
    block: tuple[int, int]
    """Rows and columns of the weight that share a scale; the last block may be smaller."""

    def of(self, rows: range, columns: range, device: torch.device) -> torch.Tensor:
        """Return the scales (rows, columns) of that part of the weight."""
        down, across = (
            torch.arange(each.start, each.stop, device=device) // size
            for each, size in zip((rows, columns), self.block, strict=True)
        )
        return self.values.to(device)[down][:, across]

    def of_blocks(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scales (blocks that overlap these rows, block columns), and how many of the rows are in each of
        these blocks."""
        borders = range(rows.start // self.block[0] * self.block[0], rows.stop, self.block[0])
        counts = [min(first + self.block[0], rows.stop) - max(first, rows.start) for first in borders]
        own = self.values[borders.start // self.block[0] :][: len(counts)]
        return own, torch.tensor(counts, dtype=torch.int64, device="cpu")


def is_scale(name: str) -> bool:
    return name.endswith((".weight_scale_inv", ".weight_scale", *_OTHERS))


def find_kv_scales(stored: Mapping[str, StoredTensor]) -> tuple[dict[str, float], list[str]]:
    """Find scales of keys and values. Returns them by their names, and a list of what is wrong with them."""
    found, problems = {}, []
    for name, scale in stored.items():
        if name.endswith(KV_SCALES):
            number = float(scale.pick(range(1))[0]) if scale.dtype in DTYPES and prod(scale.shape) == 1 else 0.0
            if 0.0 < number < inf:
                found[name] = number
            else:
                problems.append(f"{name} of shape {scale.shape} and dtype {scale.dtype} is not one number above 0")
    return found, problems


def find_scales(
    stored: Mapping[str, StoredTensor], block: tuple[int, int]
) -> tuple[dict[str, WeightScales], list[str]]:
    """Find scales of 8-bit weights. Returns them by the names of the weights, and a list of what is wrong with them."""
    found, problems = {}, []
    for name, weight in stored.items():
        if weight.dtype != FP8:
            continue
        scales = next((stored[name + suffix] for suffix in _SUFFIXES if name + suffix in stored), None)
        if scales is None or scales.dtype not in DTYPES:
            problems.append(f"{name} has dtype {FP8} and no scales in floats of 16 bits or more")
            continue
        own = _block_of(weight.shape, scales.shape, block)
        if own is None:
            problems.append(f"{name} of shape {weight.shape} has scales of shape {scales.shape}, for blocks of {block}")
            continue
        values = scales.pick(range(prod(scales.shape))).float()
        found[name] = WeightScales(values.view(-(-weight.shape[0] // own[0]), -1), own)
    return found, problems


def _block_of(weight: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int] | None:
    if len(weight) != 2 or 0 in weight:
        return None
    rows, columns = weight
    if prod(scales) == 1:
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    by_blocks = (-(-rows // block[0]), -(-columns // block[1]))
    return block if scales == by_blocks else None
