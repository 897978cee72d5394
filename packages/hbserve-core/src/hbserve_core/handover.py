"""From prefill to decode: how the blocks of one request follow its computation, and what is said at the end."""

import asyncio
import logging
from typing import Any

import msgspec

from hbserve_core.engine import Reservation, StepOutput
from hbserve_kv import KVTransferManager, Outcome, OutgoingTransfer, TransferResult
from hbserve_rpc import RemoteError
from hbserve_rpc.messages import PrefillRequest

logger = logging.getLogger(__name__)


class Handover(msgspec.Struct, frozen=True):
    """What the prefill side commits with its blocks."""

    first_token: int


class Inbox(asyncio.Queue[StepOutput | Reservation | Exception]):
    """What the engine says of one request."""

    async def next(self) -> Any:
        item = await self.get()
        if isinstance(item, Exception):
            raise item
        return item


class Sending:
    """The blocks of one prefill on their way, behind its computation.

    blocks of the prompt   [0 .... first)  held by the decode side already
                           [first .. pushed)  handed to the transfer
                           [pushed .. num_blocks)  not computed, or the transfer is not open yet
    """

    def __init__(self, manager: KVTransferManager, request: PrefillRequest, block_size: int, inbox: Inbox) -> None:
        self._block_size = block_size
        self._num_blocks = -(-(len(request.prompt_token_ids) + len(request.output_token_ids)) // block_size)
        self._pushed: int | None = None
        self._first = 0
        self._block_table: list[int] = []
        self._opening: asyncio.Task[OutgoingTransfer] | None = None
        self._ended = not request.grant
        if request.grant:
            # Connecting takes longer than a small prompt computes, so it goes on beside.
            self._opening = asyncio.create_task(manager.open_send(request.transfer_id, request.grant))
            self._opening.add_done_callback(lambda task: _report_failure(task, inbox))

    async def follow(self, inbox: Inbox) -> StepOutput:
        """Push what each step has filled; returns the output that has the first token."""
        while True:
            output: StepOutput = await inbox.next()
            self._block_table = output.block_table
            if output.token_id is not None:
                return output
            if self._opening is not None and self._opening.done():
                self._push(self._opening.result(), output.num_computed_tokens // self._block_size)

    def _push(self, transfer: OutgoingTransfer, full: int) -> None:
        if self._pushed is None:
            self._first = self._pushed = self._num_blocks - transfer.num_blocks
        if full > self._pushed:
            transfer.push(self._block_table[self._pushed : full], self._pushed - self._first)
            self._pushed = full

    async def finish(self, first_token: int | None) -> TransferResult:
        """Push the rest and commit. Raises RemoteError if the transfer has failed."""
        assert self._opening is not None
        assert first_token is not None
        transfer = await self._opening
        self._push(transfer, self._num_blocks)
        result = await transfer.commit(msgspec.msgpack.encode(Handover(first_token)))
        self._ended = result.outcome is not Outcome.UNKNOWN
        if result.outcome is not Outcome.COMPLETED:
            raise RemoteError(f"KV transfer failed: {result.error}")
        return result

    async def abort(self, reason: str) -> Outcome:
        """Stop, unless it has ended already. After anything but UNKNOWN the blocks are no longer read."""
        if self._ended or self._opening is None:
            return Outcome.FAILED_DRAINED
        try:
            transfer = await self._opening
        except Exception as error:  # reported to the request already; nothing was ever sent
            logger.debug("the transfer was never opened: %s", error)
            return Outcome.FAILED_DRAINED
        return await transfer.abort(reason)


def _report_failure(task: "asyncio.Task[OutgoingTransfer]", inbox: Inbox) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        inbox.put_nowait(RemoteError(f"KV transfer failed: {error}"))


def first_token(result: TransferResult) -> int:
    if result.outcome is not Outcome.COMPLETED:
        raise RemoteError(f"KV transfer failed: {result.error}")
    return msgspec.msgpack.decode(result.payload, type=Handover).first_token
