"""A transfer of an instance to itself, which shows that its backend moves KV before anybody relies on that."""

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hbserve_kv.errors import TransferFailed
from hbserve_kv.memory.layout import Side
from hbserve_kv.memory.memory import Memory, Region, Rows
from hbserve_kv.protocol.messages import Begin
from hbserve_kv.protocol.transfer_state import Outcome
from hbserve_kv.sending.peers import Peers
from hbserve_kv.sending.transfer import SendTransfer

if TYPE_CHECKING:
    import torch

Expect = Callable[[str, Region, list[int]], Any]
"""Type of the method `Receiver.expect`."""


async def transfer_to_itself(peers: Peers, address: str, epoch: str, memory: Memory, expect: Expect) -> None:
    """Send the pool's first block to its last one, over a link to this instance's own `address`, and check that it has
    arrived.

    Afterwards both blocks are as they were, unless this fails. In a pool of one block there is nowhere to send it, so
    only a commit is sent. Closes `peers`.

    Raises:
        TransferFailed: the block did not arrive; says why.
    """
    source, target = _ends(memory.layout.num_blocks)
    rows = Rows(memory, Side(memory.layout, 0, memory.layout.num_heads), "pool")
    _settle(memory)  # other streams may have computed there, or will
    sent, before = _read(rows, source), _read(rows, target)
    _write(rows, target, ~sent)  # so that the target certainly differs from what is sent
    name = uuid.uuid4().hex
    expected = expect(name, "pool", target)
    transfer = SendTransfer(Begin(name, link=""), memory, peers, [(address, epoch)])
    try:
        await transfer.open()
        transfer.push(source, 0)
        result = await transfer.commit()
        if result.outcome is not Outcome.COMPLETED:
            raise TransferFailed(result.error)
        if not _read(rows, target).equal(sent):
            raise TransferFailed("what arrived is not what was sent")
        _write(rows, target, before)
        _settle(memory)
    finally:
        expected.fail("the transfer to itself is over")  # does nothing if it was completed
        await peers.close()
        await asyncio.gather(*transfer.tasks)


def _settle(memory: Memory) -> None:
    """Wait until the GPU, if there is one, has done what was queued."""
    if memory.is_on_gpu:
        import torch

        torch.cuda.synchronize(memory.device)


def _ends(num_blocks: int) -> tuple[list[int], list[int]]:
    return ([0], [num_blocks - 1]) if num_blocks > 1 else ([], [])


def _read(rows: Rows, block_ids: list[int]) -> "torch.Tensor":
    """Return a copy of the blocks, uint8 (len(block_ids), bytes of a block)."""
    return rows.gather(block_ids).clone() if block_ids else rows.empty(0)


def _write(rows: Rows, block_ids: list[int], blocks: "torch.Tensor") -> None:
    if block_ids:
        rows.scatter(block_ids, blocks)
