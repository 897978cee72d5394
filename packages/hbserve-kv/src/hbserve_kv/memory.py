"""The memory that a transfer may touch: the engine's block pool and the lookup buffer, both as rows of one block.

Shapes: pool and arena are uint8 (num_blocks, block_bytes). One row is one KV block, contiguous.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

Region = Literal["pool", "arena"]
REGIONS: tuple[Region, ...] = ("pool", "arena")

STAGING_BYTES = 16 << 20
"""At most so much of the arena is kept apart for what is being sent."""


class Memory:
    """Pool and arena of one instance.

    The arena holds the lookup buffer (`arrivals`) and, apart from it, room for tensors that are being sent
    (`staging`): two instances whose lookup buffers are full can still send, so they cannot wait for each other.
    """

    def __init__(self, pool: torch.Tensor, buffer_size: int) -> None:
        if pool.dim() < 1 or pool.numel() == 0 or not pool.is_contiguous():
            raise ValueError(f"pool: expected a contiguous tensor (num_blocks, …), got shape {tuple(pool.shape)}")
        if buffer_size < 0:
            raise ValueError(f"buffer_size={buffer_size}: expected a number of bytes >= 0")
        self.pool = pool.view(pool.shape[0], -1).view(torch.uint8)
        self.block_bytes = self.pool.shape[1]
        self.device = pool.device
        capacity = buffer_size // self.block_bytes
        staging = min(capacity, max(1, STAGING_BYTES // self.block_bytes))
        # torch.empty touches no page of host memory: the arena costs what is used of it.
        self.arena = torch.empty((capacity + staging, self.block_bytes), dtype=torch.uint8, device=pool.device)
        self.arrivals = Room(range(capacity))
        self.staging = Room(range(capacity, capacity + staging))

    def rows(self, region: Region) -> torch.Tensor:
        return self.pool if region == "pool" else self.arena

    def check(self, block_ids: Sequence[int], region: Region = "pool") -> None:
        """Raises ValueError for blocks that are not there, or are named twice."""
        num_blocks = self.rows(region).shape[0]
        for block_id in block_ids:
            if not 0 <= block_id < num_blocks:
                raise ValueError(f"block_ids: {block_id} is not a block of the {region}, which has {num_blocks}")
        if len(set(block_ids)) != len(block_ids):
            raise ValueError("block_ids: a block is named twice")

    def num_blocks_for(self, num_bytes: int) -> int:
        return -(-num_bytes // self.block_bytes)


class Room:
    """Blocks that are handed out first come, first served; who asks for more than is free waits."""

    def __init__(self, block_ids: Sequence[int]) -> None:
        self.capacity = len(block_ids)
        self._free = list(reversed(block_ids))
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()

    @property
    def num_used(self) -> int:
        return self.capacity - len(self._free)

    async def take(self, num_blocks: int, timeout_s: float) -> list[int]:
        """`num_blocks` blocks, at most `capacity`.

        Raises:
            TimeoutError: they did not become free.
        """
        assert num_blocks <= self.capacity
        granted: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_blocks, granted))
        self._serve()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(granted)
        except (TimeoutError, asyncio.CancelledError):
            if granted.done():
                self.give(granted.result())
            else:
                self._waiting.remove((num_blocks, granted))
                self._serve()
            raise

    def give(self, block_ids: Sequence[int]) -> None:
        """Blocks are free again."""
        self._free.extend(block_ids)
        self._serve()

    def _serve(self) -> None:
        # In order, even if a later one would fit: a large tensor must not wait for ever behind small ones.
        while self._waiting and self._waiting[0][0] <= len(self._free):
            num_blocks, granted = self._waiting.popleft()
            granted.set_result([self._free.pop() for _ in range(num_blocks)])


def runs(*block_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Split parallel lists of blocks into runs that are neighbours in all of them: (first of each list …, length)."""
    start = 0
    for i in range(1, len(block_ids[0]) + 1):
        if i == len(block_ids[0]) or any(ids[i] != ids[i - 1] + 1 for ids in block_ids):
            yield (*(ids[start] for ids in block_ids), i - start)
            start = i


def are_neighbours(block_ids: Sequence[int]) -> bool:
    return all(block_ids[i] == block_ids[0] + i for i in range(len(block_ids)))


def gather(rows: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor:
    """The blocks as one contiguous tensor, (len(ids), block_bytes): a view if they are neighbours, else a copy."""
    if are_neighbours(block_ids):
        return rows[block_ids[0] : block_ids[0] + len(block_ids)]
    return rows.index_select(0, torch.tensor(block_ids, device=rows.device))


def scatter(rows: torch.Tensor, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
    """Write the rows of `blocks`, of any shape and dtype but the right size, to the blocks of those ids."""
    blocks = blocks.contiguous().view(-1).view(torch.uint8).view(len(block_ids), -1)
    rows.index_copy_(0, torch.tensor(block_ids, device=rows.device), blocks)
