"""The memory that a transfer may touch: the engine's block pool, and the arena, which is the room of `LookupBuffer`.

A PoolLayout says where the pool's blocks lie. In the arena, blocks have as many bytes, and lie one after another. torch
is imported only where there is a GPU, and for `Rows`.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from hbserve_kv.errors import BufferTooLarge
from hbserve_kv.memory.layout import CopyPlan, HeadRange, Side
from hbserve_kv.memory.pool_layout import Extent, PoolLayout, extents_of
from hbserve_kv.memory.shared_memory import copy, shared_buffer

if TYPE_CHECKING:
    import torch

    from hbserve_kv.memory.events import EventWatch

Region = Literal["pool", "arena"]
REGIONS: tuple[Region, ...] = ("pool", "arena")
_MANY_UNITS = 17
"""Number of units from which on torch gathers with another kernel."""
WORD_BYTES = 8
"""Length of a tensor that only tells where memory begins."""


class Memory:
    """Pool and arena of one instance. The arena has `buffer_size` bytes, which this class hands out in blocks, for
    whole tensors that arrive or are sent (`hbserve_kv.receiving.lookup_buffer`)."""

    def __init__(self, pool: Any, buffer_size: int, heads: HeadRange | None = None) -> None:
        """Raises TypeError or ValueError if `pool` is no pool or does not have that many heads; BufferTooLarge."""
        found = pool if isinstance(pool, PoolLayout) else PoolLayout.of_blocks(pool, heads)
        layout = found.layout
        if heads is not None and heads.count != layout.num_heads:
            raise ValueError(f"pool: heads={heads}, and a pool of {layout.num_heads} heads")
        self.heads = heads or HeadRange(0, layout.num_heads, layout.num_heads)
        self.layout = layout
        self.block_bytes = layout.block_bytes
        self.device = found.device
        self.is_on_gpu = self.device is not None and self.device.type == "cuda"
        arena = _make_arena(buffer_size, self.block_bytes, self.device if self.is_on_gpu else None)
        self.extents: dict[Region, list[Extent]] = {"pool": found.extents, "arena": extents_of(arena)}
        self.num_arena_blocks = buffer_size // self.block_bytes
        # If blocks are small, there are so many that a list of all of them would be larger than the arena.
        self._num_used = 0
        self._free: list[int] = []
        self.locate()

    def locate(self) -> None:
        """Read the addresses of the memory again, after a transport has moved some of it."""
        self.addresses = {region: [each.address for each in extents] for region, extents in self.extents.items()}

    @cached_property
    def events(self) -> "EventWatch":
        """The watch that tells when blocks have been computed, or copied, on a device."""
        from hbserve_kv.memory.events import EventWatch

        return EventWatch()

    def num_blocks(self, region: Region) -> int:
        return self.layout.num_blocks if region == "pool" else self.num_arena_blocks

    def side(self, of_link: Side, region: Region, layers: range | None = None) -> Side:
        """Return what a link moves of a region. Of the arena, these are always whole blocks."""
        if region == "pool":
            return of_link.of_layers(layers)
        return Side(self.layout.in_rows(self.num_arena_blocks), 0, self.layout.num_heads)

    def tensor(self, region: Region) -> "torch.Tensor":
        """Return a view of the region as uint8 (num_blocks, block_bytes). A pool must have its blocks one after
        another."""
        layout = self.layout if region == "pool" else self.layout.in_rows(self.num_arena_blocks)
        assert layout.in_rows(layout.num_blocks).planes == layout.planes, "blocks are in several pieces"
        flat = tensor_at(self.addresses[region][0], layout.extents[0], self.device) if layout.extents[0] else _nothing()
        return flat.view(-1, self.block_bytes)

    @property
    def pool(self) -> "torch.Tensor":
        return self.tensor("pool")

    @property
    def arena(self) -> "torch.Tensor":
        return self.tensor("arena")

    def num_blocks_for(self, num_bytes: int) -> int:
        return -(-num_bytes // self.block_bytes)

    @property
    def num_free(self) -> int:
        return self.num_arena_blocks - self._num_used + len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks of the arena. The caller has checked that there is room."""
        assert num_blocks <= self.num_free
        again = [self._free.pop() for _ in range(min(num_blocks, len(self._free)))]
        first, self._num_used = self._num_used, self._num_used + num_blocks - len(again)
        return [*again, *range(first, self._num_used)]

    def free(self, block_ids: Sequence[int]) -> None:
        self._free.extend(block_ids)

    def release(self) -> None:
        """Give back the arena's memory."""
        self.extents["arena"], self.addresses["arena"], self.num_arena_blocks, self._num_used = [], [], 0, 0
        self._free.clear()

    @property
    def buffered_bytes(self) -> int:
        return (self.num_arena_blocks - self.num_free) * self.block_bytes


def _make_arena(buffer_size: int, block_bytes: int, gpu: Any) -> Any:
    """Allocate as many blocks as fit into `buffer_size`. No page of host memory is touched, so only what is used of it
    costs memory."""
    if buffer_size < 0:
        raise ValueError(f"kv_transfer.buffer_size={buffer_size}: expected a number of bytes, 0 or more")
    num_bytes, total = buffer_size // block_bytes * block_bytes, _host_memory_bytes()
    if gpu is not None:
        import torch

        total = torch.cuda.mem_get_info(gpu)[1]
    reason = f"it has {total} bytes in all"
    if buffer_size <= total:
        try:
            if not num_bytes:
                return None
            return (
                torch.empty(num_bytes, dtype=torch.uint8, device=gpu) if gpu is not None else shared_buffer(num_bytes)
            )
        except (OSError, RuntimeError, MemoryError) as error:  # raised by the system, or by torch's allocators
            reason = str(error) or type(error).__name__
    raise BufferTooLarge(
        f"kv_transfer.buffer_size={buffer_size}: {gpu or 'cpu'} has no {buffer_size} bytes for the lookup buffer "
        f"({reason}); lower kv_transfer.buffer_size"
    )


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tensor_at(address: int, num_bytes: int, device: Any) -> "torch.Tensor":
    """Return a tensor uint8 (num_bytes,) over memory that someone else owns. `__cuda_array_interface__` would need
    numpy."""
    import torch

    storage = torch._C._construct_storage_from_data_pointer(address, torch.device(device or "cpu"), num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device or "cpu").set_(storage)


def _nothing() -> "torch.Tensor":
    import torch

    return torch.empty(0, dtype=torch.uint8)


def copy_on_host(
    plan: CopyPlan, source: int, source_units: Sequence[int], target: int, target_units: Sequence[int]
) -> None:
    """Copy units by memmove. `source` and `target` are the addresses where the memory of each side begins."""
    for here, there, length in plan.moves(source_units, target_units):
        copy(target + there, source + here, length)


class Rows:
    """Units of one side as rows of bytes, (len(units), unit_bytes): this is how they are sent, and what checksums
    cover."""

    def __init__(self, memory: Memory, side: Side, region: Region) -> None:
        self.unit_bytes = side.unit_bytes
        self.device = memory.device if memory.is_on_gpu else None
        self._start = memory.addresses[region][0]
        self._plan = CopyPlan(side, memory.addresses[region], side.in_rows(1), [0])
        self._memory = tensor_at(self._start, WORD_BYTES, self.device)
        self._whole: torch.Tensor | None = None
        """All blocks, if each of them is one piece; else None."""
        if (piece := self._plan.whole) is not None:
            num_bytes = (side.num_units - 1) * piece.source_block + piece.length
            flat = tensor_at(self._start + piece.source, num_bytes, self.device)
            self._whole = flat.as_strided((side.num_units, piece.length), (piece.source_block, 1))
            self._wide = _wide(self._whole)

    def neighbours(self, units: Sequence[int]) -> "torch.Tensor | None":
        """Return a contiguous view of these units if they are neighbours in this order; else None."""
        if self._whole is None:
            return None
        first, last = units[0], units[-1]
        if last - first + 1 != len(units) or list(units) != list(range(first, last + 1)):
            return None
        view = self._whole[first : last + 1]
        return view if view.is_contiguous() else None

    def empty(self, num_units: int, **options: Any) -> "torch.Tensor":
        """Allocate room for some units, on this memory's device unless `options` for torch say otherwise."""
        import torch

        return torch.empty((num_units, self.unit_bytes), dtype=torch.uint8, **({"device": self.device} | options))

    def gather(self, units: Sequence[int]) -> "torch.Tensor":
        """Return these units: a view if they are neighbours, else a copy. On a GPU, one kernel copies them, on the
        current stream."""
        if (view := self.neighbours(units)) is not None:
            return view
        if self.device is not None and self._whole is not None:
            import torch

            return self._wide.index_select(0, _indices(units, self.device)).view(torch.uint8)
        blocks = self.empty(len(units))
        if self.device is None:
            copy_on_host(self._plan, self._start, units, blocks.data_ptr(), range(len(units)))
        else:
            from hbserve_kv.memory.block_copy import copy_pieces

            copy_pieces(self._plan, self._memory, units, blocks, range(len(units)))
        return blocks

    def places(self, units: Sequence[int]) -> Any:
        """Return these units in another form that `scatter` takes, as it does any slice of it: on a GPU they are then
        sent to the device once for several calls."""
        return units if self.device is None or self._whole is None else _indices(units, self.device)

    def scatter(self, units: Any, blocks: "torch.Tensor") -> None:
        """Write what `gather` returned: uint8, of any shape, contiguous, on the same device. `units` are unit numbers,
        or `places` of them."""
        if self.device is None:
            copy_on_host(self._plan.reversed, blocks.data_ptr(), range(len(units)), self._start, units)
        elif self._whole is not None:
            new = blocks if blocks.dim() == 2 else blocks.view(len(units), -1)
            _write(self._whole, self._wide, _indices(units, self.device), new)
        else:
            from hbserve_kv.memory.block_copy import copy_pieces

            copy_pieces(self._plan.reversed, blocks, range(len(units)), self._memory, units)

    def load_kernels(self) -> None:
        """Have the GPU load the kernels of `gather` and `scatter`, which takes longer than running them. No block is
        changed."""
        if self._whole is not None:
            for units in ([0] * 2, [0] * _MANY_UNITS):
                some = self._whole[:1].clone()
                _write(some, _wide(some), _indices(units, self.device), self.gather(units))
        elif self.device is not None:
            from hbserve_kv.memory.block_copy import copy_pieces

            room = self.empty(1)
            copy_pieces(self._plan, self._memory, [], room, [])
            copy_pieces(self._plan.reversed, room, [], self._memory, [])


def _write(rows: "torch.Tensor", wide: "torch.Tensor", places: "torch.Tensor", new: "torch.Tensor") -> None:
    """Write rows (len(places), row_bytes) over some of `rows`. `wide` is another view of `rows`."""
    new_wide = _wide(new)
    if wide.dtype == new_wide.dtype:
        wide.index_copy_(0, places, new_wide)
    else:
        rows.index_copy_(0, places, new)


def _wide(blocks: "torch.Tensor") -> "torch.Tensor":
    """View the same bytes as larger elements, if they are aligned for that: kernels move these faster."""
    import torch

    is_even = all(size % 8 == 0 for size in (*blocks.stride()[:-1], blocks.shape[-1], blocks.storage_offset()))
    return blocks.view(torch.int64) if is_even and blocks.data_ptr() % 8 == 0 else blocks


def _indices(units: "Sequence[int] | torch.Tensor", device: Any) -> "torch.Tensor":
    """Send indices to the device on its current stream, without the host waiting for anything."""
    import torch

    if isinstance(units, torch.Tensor):
        return units
    return torch.tensor(units, pin_memory=True).to(device, non_blocking=True)
