"""The KV lookup buffer: where transfers wait that arrived before anybody asked for them.

Bounded by its blocks: a sender waits until there is room (that is its credit), and what nobody takes expires. So
neither the order of requests nor a forgotten one can do harm.
"""

import asyncio
import logging

from hbserve_kv.errors import BufferTooSmall, TransferFailed, TransferTimeout
from hbserve_kv.memory.memory import Memory
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult
from hbserve_kv.receiving.transfer import IncomingTransfer

logger = logging.getLogger(__name__)


class LookupBuffer:
    """Arrived messages by request id, and room for more."""

    def __init__(self, memory: Memory, *, timeout_s: float, expiry_s: float) -> None:
        self._memory = memory
        self._timeout_s = timeout_s
        self._expiry_s = expiry_s
        self._arrived: dict[str, asyncio.Future[tuple[list[int], TransferResult]]] = {}
        self._room = asyncio.Condition()
        self._keeping: set[asyncio.Task[None]] = set()

    async def place(self, request_id: str, num_bytes: int) -> list[int]:
        """Blocks of the arena for a message; waits for room.

        Raises:
            BufferTooSmall: it can never fit.
            TransferTimeout: no room before the deadline.
        """
        num_blocks = self._memory.num_blocks_for(num_bytes)
        capacity = self._memory.num_arena_blocks
        if num_blocks > capacity:
            raise BufferTooSmall(
                f"{request_id}: {num_bytes} bytes need {num_blocks} blocks of the lookup buffer, which has {capacity}; "
                "raise kv_transfer.buffer_size"
            )
        try:
            async with asyncio.timeout(self._timeout_s), self._room:
                await self._room.wait_for(lambda: self._memory.num_free >= num_blocks)
                return self._memory.allocate(num_blocks)
        except TimeoutError:
            raise TransferTimeout(
                f"{request_id}: no room for {num_bytes} bytes in the lookup buffer within {self._timeout_s} s"
            ) from None

    async def free(self, block_ids: list[int]) -> None:
        async with self._room:
            self._memory.free(block_ids)
            self._room.notify_all()

    def keep(self, transfer: IncomingTransfer) -> None:
        """Follow an arriving message until somebody takes it, or it expires, or it failed and is drained."""
        task = asyncio.create_task(self._keep(transfer))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def close(self) -> None:
        """Tell who waits for a message that is still arriving."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    async def _keep(self, transfer: IncomingTransfer) -> None:
        request_id = transfer.transfer_id
        try:
            result = await asyncio.shield(transfer.result)
            if result.outcome is not Outcome.COMPLETED:
                logger.warning("message %s was lost: %s", request_id, result.error)
                self._fail(request_id, TransferFailed(f"{request_id}: {result.error}"))
                await transfer.drained.wait()
                await self.free(transfer.block_ids)
                return
        except asyncio.CancelledError:
            self._fail(request_id, TransferFailed(f"{request_id}: the receiver was closed"))
            raise
        arrived = self._future(request_id)
        if not arrived.done():
            arrived.set_result((transfer.block_ids, result))
        await asyncio.sleep(self._expiry_s)
        if self._arrived.get(request_id) is arrived:
            logger.warning("message %s was dropped: nobody asked for it within %s s", request_id, self._expiry_s)
            del self._arrived[request_id]
            await self.free(transfer.block_ids)

    async def take(self, request_id: str) -> tuple[list[int], TransferResult]:
        """Blocks and result of a message that has arrived, or arrives before the deadline. The caller frees the blocks.

        Raises:
            TransferTimeout: nothing came.
            TransferFailed: its sender failed.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.shield(self._future(request_id))
        except TimeoutError:
            raise TransferTimeout(f"{request_id}: nothing arrived within {self._timeout_s} s") from None
        finally:
            self._arrived.pop(request_id, None)
        return found

    def _future(self, request_id: str) -> asyncio.Future[tuple[list[int], TransferResult]]:
        if request_id not in self._arrived:
            self._arrived[request_id] = asyncio.get_running_loop().create_future()
        return self._arrived[request_id]

    def _fail(self, request_id: str, error: TransferFailed) -> None:
        """Tell whoever waits; a failure that nobody waits for is only logged, because the sender may try again."""
        waiting = self._arrived.get(request_id)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
