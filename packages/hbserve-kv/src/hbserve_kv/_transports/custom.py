"""Carries parts by a KVTransferBase of somebody else: one send and one receive for each part."""

from hbserve_kv.base import KVTransferBase
from hbserve_kv.memory import Memory, gather, scatter
from hbserve_kv.transport import Link, Part, Transport


class CustomTransport(Transport):
    one_sided = False

    def __init__(self, backend: KVTransferBase, name: str) -> None:
        self.name = name  # type: ignore[misc]  # a constant of the class for built-in ones, of the object here
        self._backend = backend

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        await self._backend.start()

    def describe(self) -> bytes:
        return self._backend.describe()

    async def connect(self, link: Link) -> None:
        await self._backend.connect(link.peer_rank, link.peer_description)

    async def push(self, link: Link, part: Part) -> None:
        if part.ready is not None:
            await link.run(part.ready.synchronize)
        blocks = gather(self._memory.part(part.region, link.heads), part.block_ids).flatten(1)
        await self._backend.send_kv_cache(_message_id(link, part), blocks, link.peer_rank)

    async def accept(self, link: Link, part: Part) -> None:
        blocks = await self._backend.receive_kv_cache(_message_id(link, part), link.peer_rank)
        rows = self._memory.part(part.region, link.heads)
        expected = len(part.block_ids) * rows[0].numel()
        if blocks.nbytes != expected:
            raise ValueError(
                f"{self.name} received {blocks.nbytes} bytes for {part.transfer_id}:{part.index}, expected {expected}"
            )
        scatter(rows, part.block_ids, blocks.contiguous().view(-1).to(rows.device))

    async def disconnect(self, link: Link) -> None:
        """The backend knows ranks, not links; it hears of a new peer by `connect`."""

    async def close(self) -> None:
        await self._backend.close()


def _message_id(link: Link, part: Part) -> str:
    """Never used again: a transfer id may be, after a failure or a restart."""
    return f"{part.transfer_id}:{part.index}:{link.key}"
