"""The memory that a transfer may touch: the engine's block pool and the lookup buffer, both as rows of one block.

Under tensor parallelism each rank's blocks hold the KV heads [first, first + count) of `total`. A prefill and a decode
instance may be cut differently: each prefill rank then sends to each decode rank the heads that both hold.

    P, 1 rank    |  0  1  2  3  |        D, 2 ranks   |  0  1  |  2  3  |

Shapes: pool and arena are uint8 (num_blocks, block_bytes). One row is one KV block, contiguous. Of a block that has
the shape (..., num_heads, head_dim), a HeadSlice takes the part (..., heads, head_dim), which is not contiguous.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import msgspec
import torch

from hbserve_kv.errors import BufferTooLarge
from hbserve_kv.memory.events import EventWatch
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.memory.shared_memory import copy, shared_empty

Region = Literal["pool", "arena"]
REGIONS: tuple[Region, ...] = ("pool", "arena")


class HeadSlice(msgspec.Struct, frozen=True):
    """Heads [first, first + count) of a rank's own."""

    first: int
    count: int

    @classmethod
    def of(cls, common: HeadRange, owner: HeadRange) -> "HeadSlice | None":
        """Where common heads lie among the owner's; None if they are all that it has."""
        return None if common.count == owner.count else cls(common.first - owner.first, common.count)


class Memory:
    """Pool and arena of one instance. The arena is the lookup buffer; its blocks are handed out here."""

    def __init__(self, pool: torch.Tensor, buffer_size: int, heads: HeadRange | None = None) -> None:
        if not pool.is_contiguous() or pool.dim() < 2 or not pool.numel():
            raise ValueError("pool: expected a contiguous tensor (num_blocks, …) that is not empty")
        if heads is not None and (pool.dim() < 3 or pool.shape[-2] != heads.count):
            raise ValueError(
                f"pool: heads={heads} need a pool of shape (num_blocks, …, {heads.count}, head_dim), "
                f"got {tuple(pool.shape)}"
            )
        self.pool = pool.view(pool.shape[0], -1).view(torch.uint8)
        self.block_bytes = self.pool.shape[1]
        self.device = pool.device
        self.head_bytes = pool.shape[-1] * pool.element_size() if heads is not None else self.block_bytes
        """Bytes of one head in one place of a block."""
        self.num_heads = heads.count if heads is not None else 1
        self.arena = _make_arena(buffer_size, self.block_bytes, pool.device)
        self._free = list(range(self.arena.shape[0] - 1, -1, -1))

    @cached_property
    def events(self) -> EventWatch:
        """When blocks have been computed, or copied, on a device."""
        return EventWatch()

    def rows(self, region: Region) -> torch.Tensor:
        return self.pool if region == "pool" else self.arena

    def part(self, region: Region, heads: HeadSlice | None) -> torch.Tensor:
        """View of all blocks: (num_blocks, block_bytes), or of some heads (num_blocks, places, heads x head_bytes)."""
        return head_view(self.rows(region), heads, self.num_heads, self.head_bytes)

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

    def release(self) -> None:
        """Give the arena's memory back."""
        self.arena = self.arena[:0].clone()
        self._free.clear()

    @property
    def buffered_bytes(self) -> int:
        return (self.arena.shape[0] - len(self._free)) * self.block_bytes


def _make_arena(buffer_size: int, block_bytes: int, device: torch.device) -> torch.Tensor:
    """(num_blocks, block_bytes), as many blocks as fit. Touches no page of host memory: it costs what is used of it."""
    if buffer_size < 0:
        raise ValueError(f"kv_transfer.buffer_size={buffer_size}: expected a number of bytes, 0 or more")
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _host_memory_bytes()
    reason = f"it has {total} bytes in all"
    if buffer_size <= total:
        make = shared_empty if device.type == "cpu" else torch.empty
        try:
            return make((buffer_size // block_bytes, block_bytes), dtype=torch.uint8, device=device)
        except (OSError, RuntimeError, MemoryError) as error:  # of the system, or of torch's allocators
            reason = str(error) or type(error).__name__
    raise BufferTooLarge(
        f"kv_transfer.buffer_size={buffer_size}: {device} has no {buffer_size} bytes for the lookup buffer ({reason}); "
        "lower kv_transfer.buffer_size"
    )


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def head_view(rows: torch.Tensor, heads: HeadSlice | None, num_heads: int, head_bytes: int) -> torch.Tensor:
    """`rows` (num_blocks, block_bytes) as they are, or some heads of them (num_blocks, places, heads x head_bytes)."""
    if heads is None:
        return rows
    places = rows.view(rows.shape[0], -1, num_heads * head_bytes)
    return places[:, :, heads.first * head_bytes : (heads.first + heads.count) * head_bytes]


def runs(*block_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Split parallel lists of blocks into runs that are neighbours in all of them: (first of each list …, length)."""
    start = 0
    for i in range(1, len(block_ids[0]) + 1):
        if i == len(block_ids[0]) or any(ids[i] != ids[i - 1] + 1 for ids in block_ids):
            yield (*(ids[start] for ids in block_ids), i - start)
            start = i


def _wide(blocks: torch.Tensor) -> torch.Tensor:
    """The same bytes in larger elements, which kernels move faster."""
    is_even = all(size % 8 == 0 for size in (*blocks.stride()[:-1], blocks.shape[-1], blocks.storage_offset()))
    return blocks.view(torch.int64) if is_even and blocks.data_ptr() % 8 == 0 else blocks


def same_words(some: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in elements of 8 bytes, if that is possible for both; else as they are."""
    wide = _wide(some), _wide(others)
    return wide if wide[0].dtype == wide[1].dtype else (some, others)


def neighbours(rows: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor | None:
    """A contiguous view of these blocks, if they are neighbours in this order."""
    first, last = block_ids[0], block_ids[-1]
    if last - first + 1 == len(block_ids) and list(block_ids) == list(range(first, last + 1)):
        view = rows[first : last + 1]
        return view if view.is_contiguous() else None
    return None


def _indices(block_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """On the device, behind what its current stream does: the host waits for nothing."""
    return torch.tensor(block_ids, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def gather(rows: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor:
    """The blocks as one contiguous tensor, (len(ids), …): a view if they are neighbours, else a copy."""
    view = neighbours(rows, block_ids)
    if view is not None:
        return view
    if rows.device.type == "cpu" and rows.is_contiguous():
        blocks = torch.empty((len(block_ids), *rows.shape[1:]), dtype=torch.uint8)
        size, place = rows[0].numel(), blocks.data_ptr()
        for first, count in runs(block_ids):
            copy(place, rows.data_ptr() + first * size, count * size)
            place += count * size
        return blocks
    wide = _wide(rows)
    return wide.index_select(0, _indices(block_ids, rows.device)).view(torch.uint8)


def scatter(rows: torch.Tensor, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
    """Write the rows of `blocks`, any shape with the right bytes, to the blocks of those ids."""
    new = blocks.view(torch.uint8).view(len(block_ids), *rows.shape[1:])
    if rows.device.type == new.device.type == "cpu" and rows.is_contiguous() and new.is_contiguous():
        size, place = rows[0].numel(), new.data_ptr()
        for first, count in runs(block_ids):
            copy(rows.data_ptr() + first * size, place, count * size)
            place += count * size
        return
    wide_rows, wide_new = same_words(rows, new)
    wide_rows.index_copy_(0, _indices(block_ids, rows.device), wide_new)


def pieces(
    memory: "Memory",
    heads: HeadSlice | None,
    peer_heads: HeadSlice | None,
    peer_num_heads: int,
    block_ids: Sequence[int],
    target_block_ids: Sequence[int],
) -> Iterator[tuple[int, int, int]]:
    """(source offset, target offset, length) in bytes of each contiguous piece; runs of blocks are one.

    Some heads of a block are many small pieces: one for each layer, key or value, and token.
    """
    if heads is None and peer_heads is None:
        for first, place, count in runs(block_ids, target_block_ids):
            yield first * memory.block_bytes, place * memory.block_bytes, count * memory.block_bytes
        return
    mine, theirs = heads or HeadSlice(0, memory.num_heads), peer_heads or HeadSlice(0, peer_num_heads)
    assert mine.count == theirs.count
    my_step, their_step = memory.num_heads * memory.head_bytes, peer_num_heads * memory.head_bytes
    places = memory.block_bytes // my_step
    for source, target in zip(block_ids, target_block_ids, strict=True):
        for place in range(places):
            yield (
                (source * places + place) * my_step + mine.first * memory.head_bytes,
                (target * places + place) * their_step + theirs.first * memory.head_bytes,
                mine.count * memory.head_bytes,
            )
