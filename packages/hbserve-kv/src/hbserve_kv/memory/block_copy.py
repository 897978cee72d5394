"""Blocks to blocks in one kernel of one GPU, which may write into another: each byte is read once and written once,
wherever the blocks lie.

Imported on CUDA only: Triton is not there on every system that has no CUDA.
Shapes: N blocks are copied; a block is W words of 8 bytes, or P places of W words that do not touch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from hbserve_kv.memory.memory import same_words

_WORDS = 4096


@triton.jit
def _copy(source, target, ids, count, source_block, target_block, source_place, target_place, width, words,
          IS_WHOLE: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    number = tl.program_id(1)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    from_block = tl.load(ids + number).to(tl.int64) * source_block
    to_block = tl.load(ids + count + number).to(tl.int64) * target_block
    if IS_WHOLE:
        tl.store(target + to_block + word, tl.load(source + from_block + word, mask=inside), mask=inside)
    else:
        place, column = word // width, word % width
        values = tl.load(source + from_block + place * source_place + column, mask=inside)
        tl.store(target + to_block + place * target_place + column, values, mask=inside)


def copy_blocks(
    source: torch.Tensor, block_ids: Sequence[int], target: torch.Tensor, target_block_ids: Sequence[int]
) -> None:
    """target[target_block_ids[i]] = source[block_ids[i]], queued on the current stream of the device that has both.

    source, target: uint8, (num_blocks, block_bytes), or (num_blocks, P, bytes) with a block's places apart; the bytes
    of a block are as many in both.
    """
    source, target = same_words(*_same_places(source, target))
    is_whole = source.dim() == 2
    num_places, width = (1, source.shape[1]) if is_whole else source.shape[1:]
    words = num_places * width
    ids = torch.tensor([block_ids, target_block_ids], dtype=torch.int32, pin_memory=source.is_cuda)
    grid = (triton.cdiv(words, _WORDS), len(block_ids))
    kernel: Any = _copy[grid]
    kernel(
        source, target, ids.to(source.device, non_blocking=True), len(block_ids), source.stride(0), target.stride(0),
        source.stride(1), target.stride(1), width, words, IS_WHOLE=is_whole, WORDS=_WORDS, num_warps=8,
    )  # fmt: skip


def _same_places(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if source.dim() == target.dim():
        return source, target
    if source.dim() == 2:
        return source.unflatten(1, target.shape[1:]), target
    return source, target.unflatten(1, source.shape[1:])
