"""A checksum of KV blocks, the same on CPU and GPU: sum of word x weight modulo 2^64, with odd weights that differ.

Any change of one 8-byte word changes it (odd numbers are invertible), and so do words or blocks in another order. It
finds memory that was overwritten, lost or mixed up; it is no defence against somebody who wants to deceive.

The words of a block are taken from its bytes in an order that is the same for all layouts: see
`hbserve_kv.memory.layout`. A word is 8 bytes, or 1 byte if the length is not a multiple of 8. Without torch, checksums
take some 20 ms per megabyte.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import lru_cache
from operator import mul
from typing import TYPE_CHECKING, Any

from hbserve_kv.memory.layout import CopyPlan
from hbserve_kv.memory.memory import Memory, Region, copy_on_host
from hbserve_kv.transports.base import Link

if TYPE_CHECKING:
    import torch

MASK = (1 << 64) - 1
_FACTOR, _STEP = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def checksums(blocks: "torch.Tensor") -> list[int]:
    """Compute a number in [0, 2^64) for each row of a contiguous uint8 tensor (num_blocks, …)."""
    import torch

    rows = blocks.reshape(blocks.shape[0], -1)
    if rows.shape[1] % 8:
        words = rows.to(torch.int64)
    else:
        words = (rows.clone() if rows.data_ptr() % 8 else rows).view(torch.int64)
    sums = torch.empty(words.shape[0], dtype=torch.int64, device=words.device)
    weights = _weights(words.shape[1], words.device)
    for i in range(words.shape[0]):  # row by row, so that the product does not take as much memory as the part
        sums[i] = (words[i] * weights).sum()
    return [int(number) & MASK for number in sums.tolist()]


def link_checksums(memory: Memory, link: Link, region: Region, units: Sequence[int], ready: Any = None) -> list[int]:
    """Compute checksums of these units of this side, over the heads that both sides hold. This blocks, so it runs in
    the link's thread.

    On CUDA it runs in a stream of its own, after the event `ready`; it does not wait for other streams.
    """
    if not units:
        return []
    if "torch" not in sys.modules:
        return _without_torch(memory, link, region, units)
    if not memory.is_on_gpu:
        return checksums(link.rows(memory, region).gather(units))
    import torch

    from hbserve_kv.memory.events import on_stream

    new_stream: Any = torch.cuda.Stream
    stream = new_stream(memory.device)
    with on_stream(stream):
        if ready is not None:
            stream.wait_event(ready)
        return checksums(link.rows(memory, region).gather(units))


def _without_torch(memory: Memory, link: Link, region: Region, units: Sequence[int]) -> list[int]:
    side = memory.side(link.mine, region)
    plan = CopyPlan(side, memory.addresses[region], side.in_rows(1), [0])
    row = bytearray(side.unit_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(row))
    words = memoryview(row).cast("Q" if len(row) % 8 == 0 else "B")
    sums = []
    for unit in units:
        copy_on_host(plan, memory.addresses[region][0], [unit], address, [0])
        sums.append(sum(map(mul, words, _plain_weights(len(words)))) & MASK)
    return sums


@lru_cache(4)
def _plain_weights(count: int) -> list[int]:
    """Compute the same weights as `_weights`, where the second product is shifted as a signed number."""
    return [(place * _FACTOR & MASK ^ _signed(place * _STEP & MASK) >> 29 & MASK) | 1 for place in range(count)]


def _weights(count: int, device: Any) -> "torch.Tensor":
    import torch

    places = torch.arange(count, dtype=torch.int64, device=device)
    mixed = (places * _signed(_FACTOR)) ^ (places * _signed(_STEP) >> 29)
    return mixed | 1


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
