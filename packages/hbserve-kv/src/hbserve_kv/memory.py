"""The memory that a transfer may touch: the engine's block pool and the lookup buffer, both as rows of one block.

Shapes: pool and arena are uint8 (num_blocks, block_bytes). One row is one KV block, contiguous.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

Region = Literal["pool", "arena"]


class Memory:
    """Pool and arena of one instance. The arena is the lookup buffer; its blocks are handed out here."""

    def __init__(self, pool: torch.Tensor, buffer_size: int) -> None:
        if not pool.is_contiguous():
            raise ValueError("pool: expected a contiguous tensor, whose first dimension counts the blocks")
        self.pool = pool.view(pool.shape[0], -1).view(torch.uint8)
        self.block_bytes = self.pool.shape[1]
        self.device = pool.device
        num_blocks = buffer_size // self.block_bytes
        # torch.empty touches no page of host memory: the arena costs what is used of it.
        self.arena = torch.empty((num_blocks, self.block_bytes), dtype=torch.uint8, device=pool.device)
        self._free = list(range(num_blocks - 1, -1, -1))

    def rows(self, region: Region) -> torch.Tensor:
        return self.pool if region == "pool" else self.arena

    def num_blocks_for(self, num_bytes: int) -> int:
        return -(-num_bytes // self.block_bytes)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks of the arena; the caller has seen that there is room."""
        assert num_blocks <= self.num_free
        return [self._free.pop() for _ in range(num_blocks)]

    def free(self, block_ids: Sequence[int]) -> None:
        self._free.extend(block_ids)

    @property
    def buffered_bytes(self) -> int:
        return (self.arena.shape[0] - len(self._free)) * self.block_bytes


def runs(*block_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Split parallel lists of blocks into runs that are neighbours in all of them: (first of each list …, length)."""
    start = 0
    for i in range(1, len(block_ids[0]) + 1):
        if i == len(block_ids[0]) or any(ids[i] != ids[i - 1] + 1 for ids in block_ids):
            yield (*(ids[start] for ids in block_ids), i - start)
            start = i


def gather(rows: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor:
    """The blocks as one contiguous tensor, (len(ids), block_bytes): a view if they are neighbours, else a copy."""
    first, last = block_ids[0], block_ids[-1]
    if list(block_ids) == list(range(first, last + 1)):
        return rows[first : last + 1]
    return rows.index_select(0, torch.tensor(block_ids, device=rows.device))


def scatter(rows: torch.Tensor, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
    """Write the rows of `blocks` to the blocks of those ids."""
    rows.index_copy_(0, torch.tensor(block_ids, device=rows.device), blocks.view(torch.uint8).view(len(block_ids), -1))
