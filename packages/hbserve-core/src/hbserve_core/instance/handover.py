"""Handover of a request from prefill to decode: sending its blocks as they are computed, and the messages between both
sides."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from hbserve_core.engine.block_manager import NO_BLOCK
from hbserve_core.engine.step import Reservation, StepOutput
from hbserve_core.transfers.instance_transfers import JointReceive, JointSend
from hbserve_kv import FingerprintMismatch, Outcome, PostedReceive, SendTransfer, TransferFailed, TransferResult
from hbserve_rpc import KVTransferFailed, RequestTimeout
from hbserve_rpc.messages import (
    DecodeRequest,
    FinishReason,
    GrantRequest,
    Milestone,
    PrefillRequest,
    TokenEvent,
    TokenLogprobs,
    TransferDone,
)
from hbserve_rpc.wire import UNREADABLE

GRANT_PATIENCE_S = 1.0
"""Longest time that a computed prompt keeps its blocks without a grant. Other prompts that have a grant may be waiting
for these blocks, and their decode instance has room again once they are done."""

OpenSend = Callable[[str, bytes], Awaitable[SendTransfer | JointSend]]
"""Function that opens a transfer, given its id and its grant: see `InstanceTransfers.open_send`."""


@contextmanager
def as_rpc_error() -> Iterator[None]:
    """Raise what hbserve_kv finds wrong with a peer as a KVTransferFailed, which the caller is told as such."""
    try:
        yield
    except (TransferFailed, FingerprintMismatch) as error:
        raise KVTransferFailed(str(error)) from error


class FirstToken(msgspec.Struct, frozen=True):
    """First token of one choice."""

    token_id: int
    finish_reason: FinishReason | None = None
    """Reason why the choice has ended, set if this is also its last token."""
    logprobs: list[TokenLogprobs] = []
    """Log-probabilities of this token, if the request asks for them: the client may get them from either side."""


class Handover(msgspec.Struct, frozen=True):
    """Payload that the prefill side commits with its blocks."""

    num_tokens: int
    """Number of tokens of the request before its first output token here. Their keys and values were sent, or were
    already there."""
    first_tokens: list[FirstToken]
    """First token of each choice. If all of them are also last tokens, nobody needs the blocks, and those not sent yet
    are not sent."""

    @property
    def has_more(self) -> bool:
        """Whether there is anything to decode."""
        return any(each.finish_reason is None for each in self.first_tokens)

    @property
    def tokens_to_go_on(self) -> list[int | None]:
        """First token of each choice; None for choices that have ended."""
        return [None if each.finish_reason is not None else each.token_id for each in self.first_tokens]

    def events(self, index: int) -> list[TokenEvent]:
        """Return the first tokens as the prefill side reports them. Each is output token `index` of its choice."""
        return [
            TokenEvent(index, [each.token_id], each.finish_reason, each.logprobs, choice=choice)
            for choice, each in enumerate(self.first_tokens)
        ]


class Inbox(asyncio.Queue[StepOutput | Reservation | TransferResult | GrantRequest | Exception]):
    """Queue of reports about one request from the engine, a transfer or the scheduler, and of its failure or
    deadline."""

    def __init__(self, left_s: float | None = None) -> None:
        """left_s: seconds after which the request ends by itself, because the caller may be frozen or cut off."""
        super().__init__()
        self._deadline: asyncio.TimerHandle | None = None
        if left_s is not None:
            late = RequestTimeout("it was not done before its deadline")
            self._deadline = asyncio.get_running_loop().call_later(left_s, self.put_nowait, late)

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    async def next(self) -> Any:
        item = await self.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def token_events(self, num_choices: int) -> AsyncIterator[TokenEvent]:
        """Yield events until this many choices have ended. If the client is slow, one event has the tokens of several
        steps.

        Raises LogitsNotFinite or InvalidRequest, as `StepOutput.raise_error` does, for the first choice that ends with
        such an error.
        """
        while num_choices:
            output: StepOutput = await self.next()
            outputs = {output.choice: [output]}
            while not (output.is_last or self.empty()):
                output = await self.next()
                outputs.setdefault(output.choice, []).append(output)
            for each in outputs.values():
                event = event_of(each)
                if event.token_ids or event.finish_reason:
                    yield event
            output.raise_error()
            num_choices -= output.is_last


def event_of(outputs: Sequence[StepOutput]) -> TokenEvent:
    """Make the event for one choice from the outputs of one or several steps."""
    first, last = outputs[0], outputs[-1]
    return TokenEvent(
        first.index,
        [token for each in outputs for token in each.token_ids],
        last.finish_reason,
        [logprobs for each in outputs for logprobs in each.all_logprobs],
        next((each.prompt_logprobs for each in outputs if each.prompt_logprobs), []),
        first.choice,
        last.num_preemptions,
    )


class PrefillSend:
    """Sender of the blocks of one prompt while it is being computed.

    Blocks of the prompt, and who owns them:

        [0, first)             the decode side has them already: not sent
        [first, pushed)        pushed: the transfer may read them, and the engine keeps them
        [pushed, num_blocks)   not computed, or the transfer is not open yet: the engine's alone

    The grant may come after the computation has begun, or has ended.
    """

    def __init__(self, open_send: OpenSend, request: PrefillRequest, block_size: int, inbox: Inbox) -> None:
        self._open_send = open_send
        self._transfer_id = request.transfer_id
        self._block_size = block_size
        self._num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        self._num_blocks = -(-self._num_tokens // block_size)
        self._num_choices = request.params.n
        self._first = self._pushed = 0
        self._output: StepOutput | None = None
        self._has_ended = False
        """Whether each choice has ended with its first token."""
        self._computed_at: list[tuple[float, int]] = []
        self._pushed_at: list[tuple[float, int]] = []
        self._inbox = inbox
        self._transfer: SendTransfer | JointSend | None = None
        self._is_committing = self._is_aborted = False
        self._error = KVTransferFailed(f"KV transfer {request.transfer_id} failed: it was given up")
        self._opening: asyncio.Task[None] | None = None
        self.is_granted = False
        """Whether the grant has come, so that it is known what is to be moved, which may be nothing."""
        if not request.grant_follows:
            self._take(request.grant)

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the transfer may read: those after the decode side's cached prefix."""
        return self._num_blocks - self._first

    def _take(self, grant: bytes) -> None:
        if self.is_granted:
            return
        self.is_granted = True
        if grant:
            # Connecting takes longer than computing a small prompt, so both go on at the same time.
            self._opening = asyncio.create_task(self._open(grant))

    async def _open(self, grant: bytes) -> None:
        try:
            transfer = await self._open_send(self._transfer_id, grant)
        except Exception as error:  # any error makes the request fail
            self._fail(str(error))
            return
        if self._is_aborted:
            await transfer.cancel("the request has ended")
        elif transfer.num_blocks > self._num_blocks:
            self._fail(f"{transfer.num_blocks} blocks were granted for a prompt of {self._num_blocks}")
            await transfer.cancel(str(self._error))
        else:
            self._first = self._pushed = self._num_blocks - transfer.num_blocks
            self._transfer = transfer
            self._push()

    def _fail(self, why: str) -> None:
        self._error = KVTransferFailed(f"KV transfer {self._transfer_id} failed: {why}")
        self._inbox.put_nowait(self._error)

    async def follow(self) -> list[StepOutput]:
        """Push the blocks that each step has filled or, if there is an event, will have filled. With the first token,
        push all the rest, so that they move while the token is sent. Returns the outputs with the first token, one for
        each choice.

        Raises:
            LogitsNotFinite: there is no first token.
            KVTransferFailed: the transfer has failed.
        """
        first: list[StepOutput] = []
        while len(first) < self._num_choices:
            output: StepOutput | GrantRequest = await self._inbox.next()
            if isinstance(output, GrantRequest):
                self._take(output.grant)
                continue
            # The launch of a step is reported before the result of the previous step.
            if self._output is None or output.num_computed_tokens >= self._output.num_computed_tokens:
                self._output = output
                self._computed_at.append((time.monotonic(), output.num_computed_tokens))
            output.raise_error()
            if output.token_id is not None:
                first.append(output)
                self._has_ended = all(each.finish_reason is not None for each in first)
            if len(first) in (0, self._num_choices):
                self._push()
        return first

    async def wait_for_grant(self, timeout_s: float | None) -> bool:
        """Wait for the grant, after `follow`. Returns False if it has not come in time; then the computed blocks are
        not pushed any more.

        Raises:
            KVTransferFailed: the transfer has failed.
            EngineFailed, RequestTimeout: the engine has failed, or the request's deadline has passed.
        """
        try:
            async with asyncio.timeout(timeout_s) as patience:
                while not self.is_granted:
                    item = await self._inbox.next()
                    assert isinstance(item, GrantRequest), f"the engine is done with it, and yet there is {item}"
                    self._take(item.grant)
        except TimeoutError:
            if not patience.expired():  # it is the request's own deadline
                raise
            self._output = None
        return self.is_granted

    def _push(self) -> None:
        """Push blocks that are full and, once the whole prompt is computed, its last block, which need not be full.
        Nothing is pushed if the request ends at its first token."""
        if self._transfer is None or self._output is None or self._has_ended:
            return
        computed = self._output.num_computed_tokens
        end = self._num_blocks if computed == self._num_tokens else computed // self._block_size
        if end > self._pushed:
            blocks = self._output.block_table[self._pushed : end]
            if NO_BLOCK in blocks:
                self._fail("blocks were granted that no layer of the model sees any more")
                return
            self._transfer.push(blocks, self._pushed - self._first, self._output.ready)
            self._pushed = end
            self._pushed_at.append((time.monotonic(), end - self._first))

    async def finish(self, outputs: Sequence[StepOutput]) -> TransferDone | None:
        """Commit, even if the request ends at its first token, so that the decode side does not take the end for a
        failure. Returns None if nothing was to be moved.

        Raises:
            KVTransferFailed: the transfer has failed.
        """
        await self.wait_for_grant(None)
        if self._opening is None:
            return None
        await asyncio.shield(self._opening)
        if self._transfer is None:
            raise self._error
        first = [
            FirstToken(token, each.finish_reason, each.all_logprobs) for each in outputs for token in each.token_ids
        ]
        self._is_committing = True
        result = await self._transfer.commit(msgspec.msgpack.encode(Handover(self._num_tokens, first)))
        if result.outcome is not Outcome.COMPLETED:
            raise KVTransferFailed(f"KV transfer {self._transfer_id} failed: {result.error}")
        computed, pushed = map(_ages, (self._computed_at, self._pushed_at))
        return TransferDone(
            result.num_bytes, result.num_parts, result.time_s, outputs[0].num_cached_tokens, computed, pushed
        )

    async def abort(self, reason: str) -> Outcome:
        """Stop the transfer, unless it has ended or is committing. Unless the outcome is UNKNOWN, no block is read any
        more.

        This is called once, at the end of every request.
        """
        self._is_aborted = True
        if self._transfer is None:  # nothing was ever read, and `_open` ends what it opens from now on
            return Outcome.FAILED_DRAINED
        if self._is_committing:
            return (await self._transfer.wait()).outcome
        return await self._transfer.cancel(reason)

    async def drained(self) -> None:
        """Wait, after an outcome of UNKNOWN, until no block is read any more."""
        if self._transfer is not None:
            await self._transfer.drained()

    async def close(self) -> None:
        """Wait, after `abort`, until a transfer that was just being opened has been ended too."""
        if self._opening is not None:
            await self._opening


def _ages(milestones: list[tuple[float, int]]) -> list[Milestone]:
    now_s = time.monotonic()
    return [Milestone(now_s - at_s, count) for at_s, count in milestones]


async def wait_for_kv(
    posted: PostedReceive | JointReceive, inbox: Inbox, request: DecodeRequest, vocab_size: int
) -> tuple[Handover, bool]:
    """Wait until all blocks of a request have arrived, or none is needed: see `Handover.first_tokens`. Returns the
    handover, and whether it is known who sent the blocks: see `TransferResult.is_trusted`.

    Raises:
        KVTransferFailed: the transfer has failed, or did not bring what it should.
        Exception: what was put into the inbox meanwhile, for example because the engine has failed.
    """
    posted.when_ended(inbox.put_nowait)
    result: TransferResult = await inbox.next()
    if result.outcome is not Outcome.COMPLETED:
        raise KVTransferFailed(f"KV transfer failed: {result.error}")
    try:
        handover = msgspec.msgpack.decode(result.payload, type=Handover)
    except UNREADABLE as error:
        raise KVTransferFailed(f"KV transfer failed: what was committed is not a handover: {error}") from error
    if problem := _problem(handover, request, vocab_size, is_partial=result.is_partial):
        raise KVTransferFailed(f"KV transfer failed: {problem}")
    return handover, result.is_trusted


def _problem(handover: Handover, request: DecodeRequest, vocab_size: int, *, is_partial: bool) -> str:
    """Return why the request cannot continue with the handover, or "" if it can. The handover comes from another
    process, so nothing in it is trusted."""
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    if handover.num_tokens != num_tokens:
        return f"it holds {handover.num_tokens} tokens, the request has {num_tokens}"
    if (num_first := len(handover.first_tokens)) != request.params.n:
        return f"it has {num_first} first tokens, the request n={request.params.n}"
    if is_partial and handover.has_more:
        return "it was committed without all blocks that were granted"
    for each in handover.first_tokens:
        named = {each.token_id}.union(*each.logprobs)
        if wrong := [token for token in named if not 0 <= token < vocab_size]:
            return f"token {wrong[0]} is outside the vocabulary [0, {vocab_size})"
        if len(each.logprobs) != (request.params.logprobs is not None):
            return f"it has log-probabilities of {len(each.logprobs)} tokens"
    return ""
