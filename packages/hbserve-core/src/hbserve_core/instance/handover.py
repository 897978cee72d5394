"""From prefill to decode: how the blocks of one request follow its computation, and what is said at the end."""

import asyncio
from typing import Any

import msgspec

from hbserve_core.engine.outputs import Reservation, StepOutput
from hbserve_core.transfers.instance_transfers import InstanceTransfers, JointReceive, JointSend
from hbserve_kv import Outcome, PostedReceive, SendTransfer, TransferResult
from hbserve_rpc import RemoteError
from hbserve_rpc.messages import DecodeRequest, FinishReason, PrefillRequest, TokenEvent, TokenLogprobs


class Handover(msgspec.Struct, frozen=True):
    """What the prefill side commits with its blocks."""

    first_token: int
    num_tokens: int
    """Of the request before its first token. Their keys and values were sent, or were there already."""
    finish_reason: FinishReason | None = None
    """Set if the first token is the last one too: nobody needs the blocks, and those not sent yet are not sent."""
    logprobs: list[TokenLogprobs] = []
    """Of the first token, if the request asks for them: the client may hear of it from either side."""

    def event(self, index: int) -> TokenEvent:
        """The first token, as the prefill side says it; it is the request's output token `index`."""
        return TokenEvent(index, [self.first_token], self.finish_reason, self.logprobs)


class Inbox(asyncio.Queue[StepOutput | Reservation | TransferResult | Exception]):
    """What the engine, a transfer, or a failure says of one request."""

    async def next(self) -> Any:
        item = await self.get()
        if isinstance(item, Exception):
            raise item
        return item


class PrefillSend:
    """The blocks of one prefill on their way, behind its computation.

    blocks of the prompt   [0 .... first)  held by the decode side already
                           [first .. pushed)  handed to the transfer
                           [pushed .. num_blocks)  not computed, or the transfer is not open yet
    """

    def __init__(self, transfers: InstanceTransfers, request: PrefillRequest, block_size: int, inbox: Inbox) -> None:
        self._transfer_id = request.transfer_id
        self._block_size = block_size
        self._num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        self._num_blocks = -(-self._num_tokens // block_size)
        self._first = self._pushed = 0
        self._output: StepOutput | None = None
        self._inbox = inbox
        self._transfer: SendTransfer | JointSend | None = None
        self._is_committing = False
        self._outcome: Outcome | None = None
        self._error = RemoteError(f"KV transfer {request.transfer_id} failed: it was given up")
        # Connecting takes longer than a small prompt computes, so it goes on beside.
        self._opening = asyncio.create_task(self._open(transfers, request.grant)) if request.grant else None

    @property
    def num_blocks(self) -> int:
        """Blocks that the transfer may read: those after the decode side's cached prefix."""
        return self._num_blocks - self._first

    async def _open(self, transfers: InstanceTransfers, grant: bytes) -> None:
        try:
            transfer = await transfers.open_send(self._transfer_id, grant)
        except Exception as error:  # whatever it is, the request fails by it
            self._fail(str(error))
            return
        if self._outcome is not None:
            await transfer.cancel("the request has ended")
        elif transfer.num_blocks > self._num_blocks:
            self._fail(f"{transfer.num_blocks} blocks were granted for a prompt of {self._num_blocks}")
            await transfer.cancel(str(self._error))
        else:
            self._first = self._pushed = self._num_blocks - transfer.num_blocks
            self._transfer = transfer
            self._push()

    def _fail(self, why: str) -> None:
        self._error = RemoteError(f"KV transfer {self._transfer_id} failed: {why}")
        self._inbox.put_nowait(self._error)

    async def follow(self) -> StepOutput:
        """Push the blocks that each step has filled; returns the output that has the first token.

        Raises:
            LogitsNotFinite: there is none.
            RemoteError: the transfer has failed.
        """
        while True:
            output: StepOutput = await self._inbox.next()
            self._output = output
            output.raise_error()
            if output.token_id is not None:
                return output
            self._push()

    def _push(self, *, last_one_too: bool = False) -> None:
        """Full blocks, and the last one of the prompt only when it is all that is missing."""
        if self._transfer is None or self._output is None:
            return
        end = self._num_blocks if last_one_too else self._output.num_computed_tokens // self._block_size
        if end > self._pushed:
            self._transfer.push(self._output.block_table[self._pushed : end], self._pushed - self._first)
            self._pushed = end

    async def finish(self, output: StepOutput) -> TransferResult:
        """Push the rest, the last block too if it is not full, and commit. If the request ends at its first token, only
        commit, so that the decode side need not take the end for a failure.

        Raises:
            RemoteError: the transfer has failed.
        """
        assert self._opening is not None
        assert output.token_id is not None
        await asyncio.shield(self._opening)
        if self._transfer is None:
            raise self._error
        if output.finish_reason is None:
            self._push(last_one_too=True)
        handover = Handover(output.token_id, self._num_tokens, output.finish_reason, output.all_logprobs)
        self._is_committing = True
        result = await self._transfer.commit(msgspec.msgpack.encode(handover))
        if result.outcome is not Outcome.COMPLETED:
            raise RemoteError(f"KV transfer {self._transfer_id} failed: {result.error}")
        return result

    async def abort(self, reason: str) -> Outcome:
        """Stop, unless it has ended already or is about to. After anything but UNKNOWN no block is read any more.

        Called once, at the end of every request.
        """
        if self._transfer is None:
            # Nothing was ever read, and `_open` ends what it opens from now on.
            self._outcome = Outcome.FAILED_DRAINED
        elif self._is_committing:
            self._outcome = (await self._transfer.wait()).outcome
        else:
            self._outcome = await self._transfer.cancel(reason)
        return self._outcome

    async def drained(self) -> None:
        """After UNKNOWN: wait until no block is read any more."""
        if self._transfer is not None:
            await self._transfer.drained()

    async def close(self) -> None:
        """After `abort`: wait until a transfer that was being opened then has been ended too."""
        if self._opening is not None:
            await self._opening


async def _receive(posted: PostedReceive | JointReceive, inbox: Inbox) -> None:
    inbox.put_nowait(await posted.wait())


async def wait_for_kv(
    posted: PostedReceive | JointReceive, inbox: Inbox, request: DecodeRequest, vocab_size: int
) -> Handover:
    """Wait until all blocks of a request are here, or none is needed: see `Handover.finish_reason`.

    Raises:
        RemoteError: the transfer has failed, or brought something else than it should.
        Exception: what was put into the inbox meanwhile: the engine has failed.
    """
    receiving = asyncio.create_task(_receive(posted, inbox))
    try:
        result: TransferResult = await inbox.next()
    finally:
        receiving.cancel()
    if result.outcome is not Outcome.COMPLETED:
        raise RemoteError(f"KV transfer failed: {result.error}")
    handover = msgspec.msgpack.decode(result.payload, type=Handover)
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    if handover.num_tokens != num_tokens:
        raise RemoteError(f"KV transfer failed: it holds {handover.num_tokens} tokens, the request has {num_tokens}")
    if not 0 <= handover.first_token < vocab_size:
        raise RemoteError(
            f"KV transfer failed: token {handover.first_token} is outside the vocabulary [0, {vocab_size})"
        )
    return handover
