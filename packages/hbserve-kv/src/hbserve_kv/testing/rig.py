"""Managers over the transport or backend that is checked, and what every check does with them."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hbserve_kv.config import KVTransferConfig
from hbserve_kv.manager import KVTransferManager
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.protocol.transfer_state import Outcome
from hbserve_kv.receiving.transfer import PostedReceive
from hbserve_kv.transports.base import Transport

NUM_BLOCKS, NUM_LAYERS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM = 64, 2, 4, 4, 8


class Rig:
    """Makes managers over what is checked."""

    def __init__(self, backend: str, transport: Callable[[], Transport] | None, device: str) -> None:
        self.device = device
        self._backend = backend
        self._transport = transport
        self._started: list[KVTransferManager] = []

    def pool(self, num_heads: int = NUM_HEADS, fill: float = -1.0) -> torch.Tensor:
        """(NUM_BLOCKS, NUM_LAYERS, 2, BLOCK_SIZE, num_heads, HEAD_DIM)"""
        shape = (NUM_BLOCKS, NUM_LAYERS, 2, BLOCK_SIZE, num_heads, HEAD_DIM)
        return torch.full(shape, fill, device=self.device)

    def patterned(self) -> torch.Tensor:
        """A pool in which every number is another."""
        pool = self.pool()
        return torch.arange(pool.numel(), dtype=torch.float32, device=self.device).view(pool.shape)

    async def start(
        self, rank: int, pool: torch.Tensor, heads: HeadRange | None = None, **settings: Any
    ) -> KVTransferManager:
        chosen: dict[str, Any] = {"backend": self._backend, "buffer_size": 1 << 20, "timeout_s": 10.0} | settings
        config = KVTransferConfig(**chosen)
        manager = KVTransferManager(
            rank=rank,
            pool=pool,
            fingerprint={"model": "conformance"},
            config=config,
            heads=heads,
            transport=self._transport() if self._transport else None,
        )
        await manager.start()
        self._started.append(manager)
        return manager

    async def pair(self, source: torch.Tensor, target: torch.Tensor) -> tuple[KVTransferManager, KVTransferManager]:
        return await self.start(0, source), await self.start(1, target)

    async def stop(self, manager: KVTransferManager) -> None:
        """Close it and forget it, and so its pool."""
        self._started.remove(manager)
        await manager.close()

    async def close(self) -> None:
        await asyncio.gather(*(manager.close() for manager in self._started))

    async def until_empty(self) -> None:
        while not all(is_empty(manager) for manager in self._started):  # noqa: ASYNC110  no event says so
            await asyncio.sleep(0.01)


def is_empty(manager: KVTransferManager) -> bool:
    """No transfer, no offer, no bytes in the lookup buffer, no quarantine."""
    stats = manager.stats()
    return (stats.active_transfers, stats.num_offers, stats.buffered_bytes, stats.num_quarantined) == (0, 0, 0, 0)


async def send(
    sender: KVTransferManager, posted: PostedReceive, name: str, blocks: Sequence[int], part_size: int = 1 << 30
) -> None:
    """Send blocks to all that was granted, in parts, and expect that both sides say COMPLETED."""
    transfer = await sender.open_send(name, posted.grant)
    assert transfer.num_blocks == len(blocks)
    for first in range(0, len(blocks), part_size):
        transfer.push(blocks[first : first + part_size], first)
    sent = await transfer.commit(name.encode())
    assert sent.outcome is Outcome.COMPLETED, sent.error
