"""Collective operations of the ranks of one instance: sums, gathered logits, and agreement on a number.

Shapes: T rows of one step, R of them sampled, E hidden_size, V vocab_size, P ranks.
"""

from collections.abc import Callable
from typing import Any

import torch

from hbserve_core.model.shard import Shard


class RankGroup:
    """The ranks of an instance, as one of them sees them. This class itself is a group of one."""

    shard = Shard()
    seed: int | None = None
    """All ranks draw the same numbers from it for requests without a seed; None: nobody has to agree."""
    on_close: Callable[[], None] | None = None
    """Called by `close`, to free the CUDA graphs that contain operations of the group: NCCL waits for their end."""

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """(T, E): the sum of every rank's `partial`, which may be overwritten.

        Raises:
            RankFailed: a rank is lost. This applies to all methods.
        """
        return partial

    def partial(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for the next `partial` (T, E) of `add_sum`; None: it may be anywhere."""
        return None

    def rows_at_once(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """How many of the rows (T, E) for `add_sum` to compute and sum at a time."""
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

        norm: weights (E,) and eps of an RMS norm. parts: where the group `takes_parts`, what `partial` is to be made of
        first, `ExpertParts` of the kernels. Returns the rows normed, in `normed_to` (T, E) if given, or None where that
        is left to the caller.
        """
        rows += self.all_reduce(partial)
        return None

    def takes_parts(self, partial: torch.Tensor) -> bool:
        """Whether `add_sum` of such rows (T, E) can assemble them from parts."""
        return False

    def gather_logits(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """(R, V) contiguous, on every rank, from each rank's (R, V / P) in the order of ranks."""
        return logits

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's values; those of other ranks may be overwritten."""
        return values

    def least(self, number: int) -> int:
        """The smallest of every rank's numbers."""
        return number

    def check(self) -> None:
        """Raise RankFailed if sums of the step that has ended did not include all ranks."""

    def close(self) -> None:
        """Free what the group holds; whoever waits in it fails. May be called from any thread, and more than once."""
