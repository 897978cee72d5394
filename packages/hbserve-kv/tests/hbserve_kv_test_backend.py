"""A custom backend as a third party would write it: messages cross by queues in this process."""

import asyncio
from collections import defaultdict
from typing import ClassVar

import torch

from hbserve_kv import KVTransferBase


class QueueTransfer(KVTransferBase):
    queues: ClassVar[dict[tuple[str, int, int], asyncio.Queue[torch.Tensor]]] = defaultdict(asyncio.Queue)

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        await self.queues[request_id, self.rank, target_rank].put(kv_buffer.clone())

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        return await self.queues[request_id, source_rank, self.rank].get()
