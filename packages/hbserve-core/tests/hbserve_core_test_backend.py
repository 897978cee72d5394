"""A KV backend of somebody else's, found as `module:Class`: parts cross by queues in this process, through a gate."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from hbserve_kv import KVTransferBase


class Gate:
    """What the instances of one test have in common: parts under way, and whether they may pass."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.sending, self.receiving = asyncio.Event(), asyncio.Event()
        self.queues: dict[tuple[str, int, int], asyncio.Queue[torch.Tensor]] = defaultdict(asyncio.Queue)
        self.ids: list[str] = []


GATES: dict[str, Gate] = {}


class GatedTransfer(KVTransferBase):
    def __init__(self, rank: int, options: Mapping[str, Any]) -> None:
        super().__init__(rank, options)
        self._gate = GATES[options["gate"]]

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        self._gate.ids.append(request_id)
        self._gate.sending.set()
        await self._gate.is_open.wait()
        await self._gate.queues[request_id, self.rank, target_rank].put(kv_buffer.clone())

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        self._gate.receiving.set()
        return await self._gate.queues[request_id, source_rank, self.rank].get()
