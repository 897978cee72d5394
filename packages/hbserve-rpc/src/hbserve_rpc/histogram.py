"""Counts of values by range, as Prometheus has them: summed over processes, they stay exact."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

FEW = 16
"""Values of which each is looked for among the bounds; of more, the bounds among them."""


class Histogram(msgspec.Struct, tag=True):
    """`counts[i]` values were at most `bounds[i]`, and more than the bound before it; the last count is of the rest."""

    bounds: list[float]
    counts: list[int]
    total: float = 0.0
    """Sum of the values."""

    @classmethod
    def over(cls, bounds: Sequence[float]) -> Self:
        """An empty one. The bounds ascend."""
        return cls(list(bounds), [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Iterable[float]) -> None:
        """Of many at once, which takes less time than one after the other."""
        ordered = sorted(values)
        if len(ordered) < FEW:
            for value in ordered:
                self.counts[bisect_left(self.bounds, value)] += 1
            self.total += sum(ordered)
            return
        below = 0
        for i, bound in enumerate(self.bounds):
            self.counts[i] -= below
            below = bisect_right(ordered, bound, below)
            self.counts[i] += below
        self.counts[-1] += len(ordered) - below
        self.total += sum(ordered)

    def copy(self) -> "Histogram":
        """As it is now."""
        return Histogram(self.bounds, list(self.counts), self.total)

    def __add__(self, other: "Histogram") -> "Histogram":
        """Of both. Raises ValueError: their bounds differ."""
        if self.bounds != other.bounds:
            raise ValueError(f"histograms over {self.bounds} and over {other.bounds} cannot be added")
        counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        return Histogram(list(self.bounds), counts, self.total + other.total)
