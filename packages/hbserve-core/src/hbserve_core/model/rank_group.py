"""Collective operations of the ranks of one instance: sums, gathered logits, and agreement on a number.

Shapes: T rows of one step, R of them sampled, E hidden_size, V vocab_size, P ranks.
"""

from collections.abc import Callable
from typing import Any

import torch

from hbserve_core.model.shard import Shard


class RankGroup:
    """Group of an instance's ranks, as one of them sees it. This class itself is a group of one."""

    shard = Shard()
    seed: int | None = None
    """Seed from which all ranks draw the same random numbers for requests without a seed; None if ranks need not
    agree."""
    on_close: Callable[[], None] | None = None
    """Callback of `close` that frees the CUDA graphs that contain operations of the group: NCCL waits for their end."""

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Return the sum (T, E) of every rank's `partial`, which may be overwritten.

        Raises:
            RankFailed: a rank is lost. This applies to all methods.
        """
        return partial

    def partial(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        """Return memory for the next `partial` (T, E) of `add_sum`, or None if it may be anywhere."""
        return None

    def rows_at_once(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return how many of the rows (T, E) for `add_sum` to compute and sum at a time."""
        return shape[0]

    def add_sum(
        self,
        rows: torch.Tensor,
        partial: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None = None,
        normed_to: torch.Tensor | None = None,
        parts: Any = None,
    ) -> torch.Tensor | None:
        """Add the sum of every rank's `partial` (T, E) to `rows` (T, E) in place.

        norm: weights (E,) and eps of an RMS norm. parts: if the group `takes_parts`, the kernels' `ExpertParts` from
        which `partial` is assembled first. Returns the normed rows, in `normed_to` (T, E) if given, or None if norming
        is left to the caller.
        """
        rows += self.all_reduce(partial)
        return None

    def takes_parts(self, partial: torch.Tensor) -> bool:
        """Return whether `add_sum` can assemble rows like `partial` (T, E) from parts."""
        return False

    def gather_logits(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Gather each rank's logits (R, V / P), in the order of ranks, into contiguous logits (R, V) on every rank."""
        return logits

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """Return rank 0's values. Those of other ranks may be overwritten."""
        return values

    def least(self, number: int) -> int:
        """Return the smallest of all ranks' numbers."""
        return number

    def check(self) -> None:
        """Raise RankFailed if sums of the step that has ended did not include all ranks."""

    def close(self) -> None:
        """Free what the group holds; calls that wait in it fail. May be called from any thread, and more than once."""
