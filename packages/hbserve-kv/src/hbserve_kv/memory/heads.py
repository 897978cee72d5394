"""Ranges of KV heads: those that a rank's blocks hold, and what two ranks have in common. Imports no torch.

Under tensor parallelism each rank holds the heads [first, first + count) of `total`. A prefill and a decode instance
may be cut differently: each prefill rank then sends to each decode rank the heads that both hold.

    P, 1 rank    |  0  1  2  3  |        D, 2 ranks   |  0  1  |  2  3  |
"""

import msgspec


class HeadRange(msgspec.Struct, frozen=True, array_like=True):
    first: int = 0
    count: int = 1
    total: int = 1

    def __post_init__(self) -> None:
        if not (self.first >= 0 and self.count >= 1 and self.end <= self.total):
            raise ValueError(f"heads [{self.first}, {self.end}) of {self.total}: expected a part of them, not empty")

    @property
    def end(self) -> int:
        return self.first + self.count

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, total: int) -> "HeadRange":
        """An equal cut. Raises ValueError if `total` heads cannot be cut into `num_ranks` equal parts."""
        if total % num_ranks:
            raise ValueError(f"{total} heads cannot be cut into {num_ranks} equal parts")
        count = total // num_ranks
        return cls(rank * count, count, total)

    def common(self, other: "HeadRange") -> "HeadRange | None":
        """The heads that both hold; None if there are none."""
        first, end = max(self.first, other.first), min(self.end, other.end)
        return HeadRange(first, end - first, self.total) if first < end else None

    def slice_in(self, owner: "HeadRange") -> "HeadSlice | None":
        """Where these heads lie among the owner's; None if they are all that it has."""
        return None if self.count == owner.count else HeadSlice(self.first - owner.first, self.count)

    def heads(self) -> range:
        return range(self.first, self.end)


class HeadSlice(msgspec.Struct, frozen=True):
    """Heads [first, first + count) of a rank's own."""

    first: int
    count: int
