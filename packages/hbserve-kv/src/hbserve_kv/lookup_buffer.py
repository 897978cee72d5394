"""The KV lookup buffer: where tensors wait that arrived before anybody asked for them.

Bounded by its blocks: a sender waits until there is room (that is its credit), and what nobody takes expires. So
neither the order of requests nor a forgotten one can do harm.
"""

import asyncio
import logging
from collections import defaultdict, deque
from dataclasses import dataclass

from hbserve_kv.errors import BufferTooSmall, TransferFailed, TransferTimeout
from hbserve_kv.memory import Memory
from hbserve_kv.messages import Tensor

logger = logging.getLogger(__name__)

Key = tuple[int, str]
"""Rank of the sender, and request id."""


@dataclass(eq=False)
class Arrived:
    """A tensor that lies in blocks of the arena."""

    tensor: Tensor
    block_ids: list[int]
    expiry: asyncio.TimerHandle | None = None


class LookupBuffer:
    """Arrived tensors by their key, those who wait for one, and room for more."""

    def __init__(self, memory: Memory, *, timeout_s: float, expiry_s: float) -> None:
        self.num_expired = 0
        self._memory = memory
        self._timeout_s = timeout_s
        self._expiry_s = expiry_s
        self._arrived: defaultdict[Key, deque[Arrived]] = defaultdict(deque)
        self._takers: defaultdict[Key, deque[asyncio.Future[Arrived]]] = defaultdict(deque)

    async def place(self, tensor: Tensor) -> list[int]:
        """Blocks of the arena for a tensor; waits for room.

        Raises:
            BufferTooSmall: it can never fit.
            TransferTimeout: no room before the deadline.
        """
        room, num_blocks = self._memory.arrivals, self._memory.num_blocks_for(tensor.num_bytes)
        if num_blocks > room.capacity:
            raise BufferTooSmall(
                f"{tensor.request_id}: {tensor.num_bytes} bytes need {num_blocks} blocks of the lookup buffer, which "
                f"has {room.capacity}; raise kv_transfer.buffer_size"
            )
        try:
            return await room.take(num_blocks, self._timeout_s)
        except TimeoutError:
            raise TransferTimeout(
                f"{tensor.request_id}: no room for {tensor.num_bytes} bytes in the lookup buffer within "
                f"{self._timeout_s} s"
            ) from None

    def free(self, block_ids: list[int]) -> None:
        self._memory.arrivals.give(block_ids)

    def put(self, key: Key, tensor: Tensor, block_ids: list[int]) -> None:
        """A tensor is complete: it goes to who waits for it, or waits itself until it expires."""
        arrived = Arrived(tensor, block_ids)
        while takers := self._takers.get(key):
            taker = takers.popleft()
            if not taker.done():
                taker.set_result(arrived)
                return
        arrived.expiry = asyncio.get_running_loop().call_later(self._expiry_s, self._expire, key, arrived)
        self._arrived[key].append(arrived)

    def fail(self, key: Key, cause: str) -> None:
        """A tensor was lost on its way. Who waits is told; else it is only logged, since the sender knows."""
        logger.warning("%s from rank %d was lost: %s", key[1], key[0], cause)
        for taker in self._takers.pop(key, ()):
            if not taker.done():
                taker.set_exception(TransferFailed(f"{key[1]}: {cause}"))

    async def take(self, key: Key, timeout_s: float | None = None) -> Arrived:
        """The tensor if it is here, else when it comes. The caller frees its blocks.

        Raises:
            TransferTimeout: nothing came.
            TransferFailed: it was lost on its way.
        """
        if key in self._arrived:
            arrived = self._arrived[key].popleft()
            if not self._arrived[key]:
                del self._arrived[key]
            assert arrived.expiry is not None
            arrived.expiry.cancel()
            return arrived
        return await self._wait_for(key, timeout_s or self._timeout_s)

    async def _wait_for(self, key: Key, timeout_s: float) -> Arrived:
        taker: asyncio.Future[Arrived] = asyncio.get_running_loop().create_future()
        self._takers[key].append(taker)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(taker)
        except (TimeoutError, asyncio.CancelledError) as error:
            if taker.done() and taker.exception() is None:  # it came at the last moment: it is there for the next
                found = taker.result()
                self.put(key, found.tensor, found.block_ids)
            taker.cancel()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"{key[1]}: nothing arrived from rank {key[0]} within {timeout_s} s") from None
            raise
        finally:
            if taker in self._takers.get(key, ()):
                self._takers[key].remove(taker)
            if not self._takers.get(key):
                self._takers.pop(key, None)

    def _expire(self, key: Key, arrived: Arrived) -> None:
        logger.warning("%s from rank %d was dropped: nobody asked for it within %s s", key[1], key[0], self._expiry_s)
        self.num_expired += 1
        self._arrived[key].remove(arrived)
        if not self._arrived[key]:
            del self._arrived[key]
        self.free(arrived.block_ids)

    def close(self) -> None:
        """Drop everything; who waits is told."""
        for key in list(self._takers):
            self.fail(key, "the receiver was closed")
        for arrived in [each for queue in self._arrived.values() for each in queue]:
            assert arrived.expiry is not None
            arrived.expiry.cancel()
            self.free(arrived.block_ids)
        self._arrived.clear()
