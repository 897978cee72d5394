"""Special rows of a step: their requests need more than one drawn token. And copies of numbers about them to the
device."""

from collections.abc import Sequence as Ids
from typing import Any, NamedTuple

import torch

from hbserve_core.engine.sequence import Sequence


class LogitsRow(NamedTuple):
    """A row that a step samples for a request which needs more than a token, or several tokens."""

    place: int
    """The row's place among the rows that the step samples."""
    sequence: Sequence
    source: int = -1
    """Place of the sequence's last token among the tokens of the step before, if the host has not read it."""
    is_choice: bool = False
    """Whether the sequence is one of several choices. `place` is then that of the prompt which they share."""


def special_rows(place: int, sequence: Sequence, source: int = -1) -> list[LogitsRow]:
    """The row of a special sequence; or, if it has choices, a row for each of them."""
    if not sequence.choices:
        return [LogitsRow(place, sequence, source)]
    return [LogitsRow(place, choice, source, is_choice=True) for choice in sequence.choices]


def has_grammars(rows: Ids[LogitsRow]) -> bool:
    """Whether a special row has a grammar. All special rows of the step are then sampled by the runner's `draw`."""
    return any(each.sequence.params.structured_outputs is not None for each in rows)


def on_device(values: list[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these values, made without waiting for the device."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
