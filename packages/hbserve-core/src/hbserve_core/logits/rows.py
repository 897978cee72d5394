"""Rows of a step whose requests ask for more than a token, and numbers about them on their way to the device."""

from collections.abc import Sequence as Ids
from typing import Any, NamedTuple

import torch

from hbserve_core.engine.sequence import Sequence


class LogitsRow(NamedTuple):
    """A row that a step samples for a request which asks for more than a token, or for more than one."""

    place: int
    """Among the rows that the step samples."""
    sequence: Sequence
    source: int = -1
    """Where, among the tokens of the step before, its last one is, if the host has not read it."""
    is_choice: bool = False
    """The sequence is one of several choices, and the place that of the prompt which they share."""


def special_rows(place: int, sequence: Sequence, source: int = -1) -> list[LogitsRow]:
    """The row of a special sequence; where it has choices, one for each of them."""
    if not sequence.choices:
        return [LogitsRow(place, sequence, source)]
    return [LogitsRow(place, choice, source, is_choice=True) for choice in sequence.choices]


def has_grammars(rows: Ids[LogitsRow]) -> bool:
    """Whether some of a step's special rows are left for the runner's `draw`, and with them all."""
    return any(each.sequence.params.structured_outputs is not None for each in rows)


def on_device(values: list[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of them, without waiting for what the device does."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
