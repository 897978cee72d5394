"""A transport that moves parts by a user's KVTransferBase, with one send and one receive for each part."""

import inspect
from typing import Any

import torch

from hbserve_kv.base import KVTransferBase
from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.memory.memory import Memory
from hbserve_kv.transports.base import Link, Part, Transport


class CustomTransport(Transport):
    one_sided = False

    def __init__(self, backend: KVTransferBase, name: str) -> None:
        self.name = name  # type: ignore[misc]  # a class constant in other transports, here it differs by object
        self._backend = backend

    async def start(self, memory: Memory) -> None:
        """Start the backend. Raises BackendUnavailable if its description is not bytes."""
        self._memory = memory
        await self._call("start")
        try:
            self.describe()
        except BaseException:
            await self.close()
            raise

    def describe(self) -> bytes:
        description = self._backend.describe()
        if not isinstance(description, bytes):
            raise BackendUnavailable(f"{self.name}.describe() returned {description!r}; it must return bytes")
        return description

    async def connect(self, link: Link) -> None:
        await self._call("connect", link.peer_rank, link.peer_description)

    async def push(self, link: Link, part: Part) -> None:
        blocks = link.rows(self._memory, part.region, part.layers).gather(part.block_ids)
        await self._call("send_kv_cache", _message_id(link, part), blocks, link.peer_rank)

    async def accept(self, link: Link, part: Part) -> None:
        blocks = await self._call("receive_kv_cache", _message_id(link, part), link.peer_rank)
        rows = link.rows(self._memory, part.region, part.layers)
        expected = len(part.block_ids) * rows.unit_bytes
        if not isinstance(blocks, torch.Tensor) or blocks.nbytes != expected:
            what = f"a tensor of {blocks.nbytes} bytes" if isinstance(blocks, torch.Tensor) else repr(blocks)
            raise ValueError(
                f"{self.name}.receive_kv_cache({_message_id(link, part)!r}, {link.peer_rank}) returned {what}; it must "
                f"return the torch.Tensor of {expected} bytes that send_kv_cache got there for the same request_id"
            )
        rows.scatter(part.block_ids, blocks.contiguous().view(-1).view(torch.uint8).to(self._memory.device or "cpu"))

    async def _call(self, method: str, *arguments: Any) -> Any:
        result = getattr(self._backend, method)(*arguments)
        if not inspect.isawaitable(result):
            raise TypeError(
                f"{self.name}.{method} returned {result!r}, which is not a coroutine; write it with `async def`"
            )
        return await result

    async def disconnect(self, link: Link) -> None:
        """Do nothing: the backend knows ranks, not links, and is told of a new peer by `connect`."""

    async def close(self) -> None:
        await self._backend.close()


def _message_id(link: Link, part: Part) -> str:
    """Return an id that is never used again. A transfer id may be, after a failure or a restart."""
    return f"{part.transfer_id}:{part.index}:{link.key}"
