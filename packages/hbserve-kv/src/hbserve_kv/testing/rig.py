"""Managers that use the transport or backend under test, and what every check does with them."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hbserve_kv.config import KVTransferConfig
from hbserve_kv.manager import KVTransferManager
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.memory.pool_layout import AXES, PoolLayout
from hbserve_kv.protocol.transfer_state import Outcome
from hbserve_kv.receiving.transfer import PostedReceive
from hbserve_kv.transports.base import Transport

NUM_BLOCKS, NUM_LAYERS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM = 64, 2, 4, 4, 8
BLOCK_MAJOR = "block-major"
LAYOUTS = {
    BLOCK_MAJOR: "blocks layers kv tokens heads dim",
    "layer-major": "layers kv blocks tokens heads dim",
    "keys beside values": "layers blocks kv tokens heads dim",
    "heads first": "layers kv heads blocks tokens dim",
    "blocks last": "kv tokens layers heads blocks dim",
}
"""Layouts by name: the order in which the dimensions of a pool lie in memory, the one with the widest stride first."""


def of_layers(pool: torch.Tensor) -> PoolLayout:
    """Describe a pool as an engine has it, with keys and values of each layer in tensors of their own."""
    layers = [tuple(layer.unbind(1)) for layer in pool.unbind(1)]
    return PoolLayout(layers, "blocks tokens heads dim")


class Rig:
    """Maker of managers that use the transport or backend under test."""

    def __init__(
        self,
        backend: str,
        transport: Callable[[], Transport] | None,
        device: str,
        layouts: tuple[str, str] = (BLOCK_MAJOR, BLOCK_MAJOR),
    ) -> None:
        """`layouts` are names in LAYOUTS: that of pools that are sent from (`patterned`), and that of all others."""
        self.device = device
        self._layouts = layouts
        self._backend = backend
        self._transport = transport
        self._started: list[KVTransferManager] = []

    def pool(self, num_blocks: int = NUM_BLOCKS, block_size: int = BLOCK_SIZE, fill: float = -1.0) -> torch.Tensor:
        """Make a pool (num_blocks, NUM_LAYERS, 2, block_size, NUM_HEADS, HEAD_DIM), whose layout in memory may order
        these dimensions in another way."""
        shape = (num_blocks, NUM_LAYERS, 2, block_size, NUM_HEADS, HEAD_DIM)
        return self.laid_out(torch.full(shape, fill, device=self.device), self._layouts[1])

    def patterned(self, num_blocks: int = NUM_BLOCKS, block_size: int = BLOCK_SIZE) -> torch.Tensor:
        """Make a pool in which all numbers differ."""
        pool = self.pool(num_blocks, block_size)
        numbers = torch.arange(pool.numel(), dtype=torch.float32, device=self.device).view(pool.shape)
        return self.laid_out(numbers, self._layouts[0])

    @staticmethod
    def laid_out(pool: torch.Tensor, layout: str) -> torch.Tensor:
        """Return a tensor of the same shape and numbers, whose dimensions lie in memory in the order of a layout."""
        order = [AXES.index(axis) for axis in LAYOUTS[layout].split()]
        return pool.permute(*order).contiguous().permute(*(order.index(place) for place in range(len(order))))

    def heads_of(self, pool: torch.Tensor, heads: HeadRange, *, of_sender: bool) -> torch.Tensor:
        """Return the pool of a rank that holds these heads."""
        return self.laid_out(pool[..., heads.first : heads.end, :], self._layouts[0 if of_sender else 1])

    async def start(
        self, rank: int, pool: torch.Tensor, heads: HeadRange | None = None, *, is_raw: bool = True, **settings: Any
    ) -> KVTransferManager:
        """Start a manager. If `is_raw` and all pools are block-major, it gets the tensor alone, without a layout."""
        chosen: dict[str, Any] = {"backend": self._backend, "buffer_size": 1 << 20, "timeout_s": 10.0} | settings
        config = KVTransferConfig(**chosen)
        manager = KVTransferManager(
            rank=rank,
            pool=pool if self._layouts == (BLOCK_MAJOR, BLOCK_MAJOR) and is_raw else of_layers(pool),
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
        """Close a manager and forget it, and with it its pool."""
        self._started.remove(manager)
        await manager.close()

    async def close(self) -> None:
        await asyncio.gather(*(manager.close() for manager in self._started))

    async def until_empty(self) -> None:
        while not all(is_empty(manager) for manager in self._started):  # noqa: ASYNC110  no event says so
            await asyncio.sleep(0.01)


def is_empty(manager: KVTransferManager) -> bool:
    """Whether a manager has no transfer, no offer, no bytes in the lookup buffer, and no quarantine."""
    stats = manager.stats()
    return (stats.active_transfers, stats.num_offers, stats.buffered_bytes, stats.num_quarantined) == (0, 0, 0, 0)


async def send(
    sender: KVTransferManager, posted: PostedReceive, name: str, blocks: Sequence[int], part_size: int = 1 << 30
) -> None:
    """Send blocks to all granted ones, in parts, and assert that the sender's outcome is COMPLETED."""
    transfer = await sender.open_send(name, posted.grant)
    assert transfer.num_blocks == len(blocks)
    for first in range(0, len(blocks), part_size):
        transfer.push(blocks[first : first + part_size], first)
    sent = await transfer.commit(name.encode())
    assert sent.outcome is Outcome.COMPLETED, sent.error
