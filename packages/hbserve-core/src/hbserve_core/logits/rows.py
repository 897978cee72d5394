"""Special rows of a step, whose requests need more than one drawn token, and copies of numbers about them to the
device."""

from collections.abc import Sequence as Ids
from typing import Any, NamedTuple

import torch

from hbserve_core.engine.sequence import Sequence


class LogitsRow(NamedTuple):
    """Row that a step samples for a request which needs more than a token, or several tokens."""

    place: int
    """Place of the row among the rows that the step samples."""
    sequence: Sequence
    source: int = -1
    """Place of the sequence's last token among the tokens of the previous step, if the host has not read it; otherwise
    -1."""
    is_choice: bool = False
    """Whether the sequence is one of several choices. `place` is then that of the prompt that they share."""


def special_rows(place: int, sequence: Sequence, source: int = -1) -> list[LogitsRow]:
    """Return the row of a special sequence or, if it has choices, a row for each of them."""
    if not sequence.choices:
        return [LogitsRow(place, sequence, source)]
    return [LogitsRow(place, choice, source, is_choice=True) for choice in sequence.choices]


def has_grammars(rows: Ids[LogitsRow]) -> bool:
    """Return whether any special row has a grammar. If so, all special rows of the step are sampled by the runner's
    `draw`."""
    return any(each.sequence.params.structured_outputs is not None for each in rows)


def on_device(values: list[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make a tensor of these values without waiting for the device."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
