"""The KV lookup buffer, in which transfers wait that arrived before anybody asked for them.

It is bounded by its blocks. Because a message may have no bytes, there are also at most as many messages as blocks. A
sender waits until there is room (this is its credit), and a message that nobody takes expires. So neither the order of
requests nor a forgotten one can do harm.
"""

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve_kv.errors import BufferTooSmall, TransferFailed, TransferTimeout
from hbserve_kv.memory.memory import Memory
from hbserve_kv.protocol.messages import NotNegative
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult
from hbserve_kv.receiving.transfer import IncomingTransfer
from hbserve_rpc.plain_values import one_line

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class LookupBuffer:
    """Arrived messages by request id, and room for more."""

    def __init__(self, memory: Memory, *, timeout_s: float, expiry_s: float) -> None:
        self._memory = memory
        self._timeout_s = timeout_s
        self._expiry_s = expiry_s
        self._arrived: dict[str, tuple[list[int], TransferResult, asyncio.Task[None]]] = {}
        """Messages that nobody has taken yet: blocks, result, and the task that drops the message when it expires."""
        self._num_messages = 0
        """Number of messages that have been given room, including those that need none."""
        self._waiting: dict[str, asyncio.Future[None]] = {}
        """A future for each caller that waits for a message, by request id; done when the message has arrived."""
        self._room = asyncio.Condition()
        self._keeping: set[asyncio.Task[None]] = set()

    async def place(self, request_id: str, num_bytes: int) -> list[int]:
        """Allocate blocks of the arena for a message. Waits for room.

        Raises:
            BufferTooSmall: the message can never fit.
            TransferTimeout: there was no room before the deadline.
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
                await self._room.wait_for(
                    lambda: self._memory.num_free >= num_blocks and self._num_messages < max(1, capacity)
                )
                self._num_messages += 1
                return self._memory.allocate(num_blocks)
        except TimeoutError:
            raise TransferTimeout(
                f"{request_id}: no room for {num_bytes} bytes in the lookup buffer within {self._timeout_s} s"
            ) from None

    async def free(self, block_ids: list[int]) -> None:
        """Give back the blocks that `place` returned for one message."""
        async with self._room:
            self._num_messages -= 1
            self._memory.free(block_ids)
            self._room.notify_all()

    def __contains__(self, request_id: str) -> bool:
        """Whether there is a message with this id that nobody has taken."""
        return request_id in self._arrived

    def keep(self, transfer: IncomingTransfer) -> None:
        """Follow an arriving message until somebody takes it, it expires, or it has failed and is drained."""
        task = asyncio.create_task(self._keep(transfer))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def close(self) -> None:
        """Tell callers that wait for a message that none will come."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for request_id in self._waiting:
            self._wake(request_id, TransferFailed(f"{request_id}: the receiver was closed"))

    async def _keep(self, transfer: IncomingTransfer) -> None:
        request_id = transfer.transfer_id
        result = await asyncio.shield(transfer.result)
        if result.outcome is not Outcome.COMPLETED:
            # A failure that nobody waits for is only logged, because the sender may try again.
            logger.warning("message %s was lost: %s", request_id, result.error)
            self._wake(request_id, TransferFailed(f"{request_id}: {result.error}"))
            await transfer.drained.wait()
            await self.free(transfer.block_ids)
            return
        task = asyncio.current_task()
        assert task is not None
        arrived = self._arrived[request_id] = transfer.block_ids, result, task
        self._wake(request_id)
        await asyncio.sleep(self._expiry_s)
        if self._arrived.get(request_id) is arrived:
            logger.warning("message %s was dropped: nobody asked for it within %s s", request_id, self._expiry_s)
            del self._arrived[request_id]
            await self.free(transfer.block_ids)

    async def take(self, request_id: str) -> tuple[list[int], TransferResult]:
        """Return the blocks and the result of a message that has arrived, or arrives before the deadline. The caller
        must free the blocks.

        Raises:
            TransferTimeout: nothing arrived.
            TransferFailed: the sender failed, or somebody else already waits for the message.
        """
        if request_id in self._waiting:
            raise TransferFailed(f"{request_id}: another receive waits for it already")
        if request_id not in self._arrived:
            waiting = self._waiting[request_id] = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await waiting
            except TimeoutError:
                raise TransferTimeout(f"{request_id}: nothing arrived within {self._timeout_s} s") from None
            finally:
                del self._waiting[request_id]
        block_ids, result, keeping = self._arrived.pop(request_id)
        keeping.cancel()
        return block_ids, result

    def _wake(self, request_id: str, error: TransferFailed | None = None) -> None:
        waiting = self._waiting.get(request_id)
        if waiting is None or waiting.done():
            return
        if error is not None:
            waiting.set_exception(error)
        else:
            waiting.set_result(None)


class _Shape(msgspec.Struct, frozen=True):
    """Properties of a tensor besides its bytes."""

    dtype: str
    shape: list[NotNegative]


def shape_of(tensor: "torch.Tensor") -> bytes:
    """Return the payload that is committed with a tensor's bytes."""
    return msgspec.msgpack.encode(_Shape(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))


def tensor_of(request_id: str, shape: bytes, blocks: "torch.Tensor") -> "torch.Tensor":
    """Return the tensor whose bytes arrived in these blocks, with the shape that its sender reported.

    `blocks` is uint8 (num_blocks, block_bytes), contiguous; the tensor is a view of it.

    Raises:
        TransferFailed: no tensor of this many blocks has such a shape.
    """
    import torch

    num_blocks, block_bytes = blocks.shape
    try:
        what = msgspec.msgpack.decode(shape, type=_Shape)
        dtype: Any = getattr(torch, what.dtype)
        num_bytes = math.prod(what.shape) * dtype.itemsize
        if -(-num_bytes // block_bytes) != num_blocks:
            raise ValueError(f"{num_bytes} bytes in {num_blocks} blocks of {block_bytes}")
        return blocks.view(-1)[:num_bytes].view(dtype).view(what.shape)
    except (msgspec.DecodeError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TransferFailed(
            f"{request_id}: its sender describes another tensor than the one that came: {one_line(str(error))}"
        ) from error
