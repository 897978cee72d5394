"""Rows of a step whose requests ask for more than a token, and numbers about them on their way to the device."""

from typing import Any, NamedTuple

import torch

from hbserve_core.engine.sequence import Sequence


class LogitsRow(NamedTuple):
    """A row that a step samples for a request which asks for more than a token."""

    place: int
    """Among the rows that the step samples."""
    sequence: Sequence
    source: int = -1
    """Where, among the tokens of the step before, its last one is, if the host has not read it."""


def on_device(values: list[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of them, without waiting for what the device does."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
