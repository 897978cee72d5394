"""A GPU kernel that copies blocks to blocks, possibly into the memory of another GPU. It reads and writes each byte
once, wherever the pieces of a block lie on either side.

This module is imported only where there is CUDA, because systems without CUDA may not have Triton.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from hbserve_kv.memory.layout import CopyPlan

_WORDS = 4096
_PIECE = 7
"""How many numbers describe a piece: see `hbserve_kv.memory.layout.Piece`."""


@triton.jit(do_not_specialize=["num_units"])
def _copy(
    source,
    target,
    pieces,
    units,
    num_units,
    num_pieces,
    num_chunks,
    source_ratio,
    target_ratio,
    PIECE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Copy units of pieces; each program copies WORDS words of one piece of one unit."""
    number = tl.program_id(0)
    chunk = number % num_chunks
    piece = pieces + number // num_chunks % num_pieces * PIECE
    place = number // num_chunks // num_pieces
    here, there = tl.load(units + place), tl.load(units + num_units + place)
    start = tl.load(piece) + here // source_ratio * tl.load(piece + 1) + here % source_ratio * tl.load(piece + 2)
    end = tl.load(piece + 3) + there // target_ratio * tl.load(piece + 4) + there % target_ratio * tl.load(piece + 5)
    word = chunk * WORDS + tl.arange(0, WORDS)
    # If one of the three hints is missing, each load and store takes only one word at once.
    start, end = tl.multiple_of(start, ALIGNED), tl.multiple_of(end, ALIGNED)
    inside = word < tl.multiple_of(tl.load(piece + 6), ALIGNED)
    tl.store(target + end + word, tl.load(source + start + word, mask=inside), mask=inside)


class _Table:
    """The pieces of a plan as a tensor on a device, counted in words."""

    def __init__(self, plan: CopyPlan, source: int, target: int, device: Any) -> None:
        numbers = [number for piece in plan.pieces for number in piece]
        together = [source, target, *numbers]
        self.word_bytes = 8 if all(number % 8 == 0 for number in together) else 1
        self.aligned = 2 if all(number % 16 == 0 for number in together) else 1
        """Alignment, in words: each position and length is a multiple of it."""
        longest = max(piece.length for piece in plan.pieces) // self.word_bytes
        self.words = min(_WORDS, triton.next_power_of_2(longest))
        self.num_chunks = triton.cdiv(longest, self.words)
        self.pieces = torch.tensor([number // self.word_bytes for number in numbers], dtype=torch.int64, device=device)


def copy_pieces(
    plan: CopyPlan,
    source: torch.Tensor,
    source_units: Sequence[int],
    target: torch.Tensor,
    target_units: Sequence[int],
) -> None:
    """Copy unit `source_units[i]` of one side to unit `target_units[i]` of the other. The copy is queued on the current
    stream of the device on which both tensors are used.

    `source` and `target` begin where the memory of their side begins; they may have any type and length.
    """
    device, alignment = source.device, (source.data_ptr() % 16, target.data_ptr() % 16)
    table = plan.device_tables.get(alignment)
    if table is None:
        table = plan.device_tables[alignment] = _Table(plan, *alignment, device)
    units = torch.tensor([[*source_units], [*target_units]], dtype=torch.int64, pin_memory=table.pieces.is_cuda)
    dtype = torch.int64 if table.word_bytes == 8 else torch.uint8
    kernel: Any = _copy[(len(source_units) * len(plan.pieces) * table.num_chunks,)]
    kernel(
        _first_word(source, dtype),
        _first_word(target, dtype),
        table.pieces,
        units.to(device, non_blocking=True),
        len(source_units),
        len(plan.pieces),
        table.num_chunks,
        plan.source_ratio,
        plan.target_ratio,
        PIECE=_PIECE,
        ALIGNED=table.aligned,
        WORDS=table.words,
        num_warps=max(1, min(8, table.words // 128)),
    )


def _first_word(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the first word of the memory as a tensor: the kernel uses only its address and its type."""
    return memory.view(-1).view(torch.uint8)[: dtype.itemsize].view(dtype)
