"""A checksum of KV blocks, the same on CPU and GPU: sum of word x weight modulo 2^64, with odd weights that differ.

Any change of one 8-byte word changes it (odd numbers are invertible), and so do words or blocks in another order. It
finds memory that was overwritten, lost or mixed up; it is no defence against somebody who wants to deceive.

Shapes: blocks are uint8 (num_blocks, block_bytes), or (num_blocks, places, bytes) if some heads of them. As words they
are int64 (num_blocks, W), W = block_bytes / 8; or W = block_bytes if that is not whole, a word for each byte.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hbserve_kv.memory.events import on_stream
from hbserve_kv.memory.memory import Memory, Region, gather
from hbserve_kv.transports.base import Link

MASK = (1 << 64) - 1
_FACTOR, _STEP = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def checksums(blocks: torch.Tensor) -> list[int]:
    """One number in [0, 2^64) for each row of a contiguous uint8 tensor (num_blocks, …)."""
    rows = blocks.reshape(blocks.shape[0], -1)
    is_even = rows.shape[1] % 8 == 0 and rows.data_ptr() % 8 == 0
    words = rows.view(torch.int64) if is_even else rows.to(torch.int64)
    sums = torch.empty(words.shape[0], dtype=torch.int64, device=words.device)
    weights = _weights(words.shape[1], words.device)
    for i in range(words.shape[0]):  # a row at a time: the product must not take as much memory as the part
        sums[i] = (words[i] * weights).sum()
    return [int(number) & MASK for number in sums.tolist()]


def link_checksums(
    memory: Memory, link: Link, region: Region, block_ids: Sequence[int], ready: Any = None
) -> list[int]:
    """Of these blocks of this side, or of the heads of them that both sides hold. Blocks; runs in the link's thread.

    On CUDA in a stream of its own, after the event `ready`; no other stream is waited for.
    """
    if not block_ids:
        return []
    rows = memory.part(region, link.heads)
    if memory.device.type == "cpu":
        return checksums(gather(rows, block_ids))
    new_stream: Any = torch.cuda.Stream
    stream = new_stream(memory.device)
    with on_stream(stream):
        if ready is not None:
            stream.wait_event(ready)
        return checksums(gather(rows, block_ids))


def _weights(count: int, device: torch.device) -> torch.Tensor:
    places = torch.arange(count, dtype=torch.int64, device=device)
    mixed = (places * _signed(_FACTOR)) ^ (places * _signed(_STEP) >> 29)
    return mixed | 1


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
