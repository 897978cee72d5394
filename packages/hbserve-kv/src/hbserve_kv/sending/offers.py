"""Transfers that their receivers fetch, because the blocks are there before anybody has room for them.

An offer whose last block is there waits `lease_s` for a receiver that wants it. That receiver keeps the offer alive
(KEEP) as long as its heartbeats come, and says where the blocks go (FETCH) once it has room. From then on the offer is
a transfer like any other. If the receiver leaves or dies before it has all blocks, the offer ends.

Under tensor parallelism several ranks of the receiver may need heads of this rank. Each says how many such ranks there
are; together they are one transfer, which begins when all of them have room. A rank that nobody needs, because another
one has the same heads, is told so.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NoReturn

from hbserve_kv.errors import FingerprintMismatch, TransferFailed
from hbserve_kv.memory.layout import checked_blocks
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.handshake import Identity
from hbserve_kv.protocol.messages import Fetch, Keep, Nothing, Offered, checked_payload
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult
from hbserve_kv.sending.transfer import SendTransfer, require_loop
from hbserve_rpc import InvalidRequest, RpcServer, calling_peer

MOST_ENDED = 1 << 12
"""Limit of ended offers that are remembered by id, so that a receiver that comes too late hears why."""
LATE_S = 10.0
"""How long an offer may come after its receiver, because an engine may tell others of a transfer before it offers it
here."""

_Open = Callable[[str, Sequence[bytes]], Awaitable[SendTransfer]]


class Offer:
    """One transfer that its receiver fetches. Made by `KVTransferManager.offer`.

    Source blocks belong to the offer from `push` until `wait` has returned COMPLETED or FAILED_DRAINED, or until
    `drained` has returned.
    """

    def __init__(
        self, transfer_id: str, open_send: _Open, num_pool_blocks: int, *, lease_s: float, expiry_s: float
    ) -> None:
        self.transfer_id = transfer_id
        self.grants: dict[bytes, bytes | None] = {}
        """Grant of each receiver that keeps the offer, by its connection; None until that receiver fetches it."""
        self.result: asyncio.Future[TransferResult] = asyncio.get_running_loop().create_future()
        self.sending: asyncio.Task[None] | None = None
        """The task that sends the blocks; None until all receivers have fetched the offer."""
        self._num_receivers = 1
        self._open = open_send
        self._num_pool_blocks = num_pool_blocks
        self._lease_s, self._expiry_s = lease_s, expiry_s
        self._pushed: list[tuple[int, list[int], Any]] = []
        """What each `push` offered: place of its first block, block ids, and the event after which to read them."""
        self._num_blocks = 0
        self._first = 0
        """Place of the first block that the receivers want."""
        self._payload: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._transfer: SendTransfer | None = None
        self._withdrawn = ""
        self._drained = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self.result.add_done_callback(lambda _: self._set_deadline())

    # ---- of its owner --------------------------------------------------------------------------------------------

    def push(self, block_ids: Sequence[int], ready: Any = None) -> None:
        """Offer the next blocks. They are sent at once if a receiver is there. `ready`: see `SendTransfer.push`.

        Does nothing if the offer has ended.

        Raises:
            ValueError: this side does not have the blocks, or the offer is committed.
        """
        if self.result.done() or self._payload.cancelled():
            return
        if self._payload.done():
            raise ValueError(f"transfer {self.transfer_id}: blocks {list(block_ids)} after the commit")
        require_loop(self.result.get_loop())
        blocks = checked_blocks(block_ids, self._num_pool_blocks)
        piece = (self._num_blocks, blocks, ready)
        self._num_blocks += len(blocks)
        self._pushed.append(piece)
        if self._transfer is not None:
            self._forward(*piece)

    def commit(self, payload: bytes = b"") -> None:
        """Offer no more blocks. Returns at once."""
        if not self._payload.done():
            self._payload.set_result(checked_payload(payload))
            self._set_deadline()

    def restart(self) -> bool:
        """Forget what was pushed, so that other blocks can be pushed from the first one on. Returns False if the offer
        is being fetched already, is committed, or has ended."""
        if self.sending is not None or self._payload.done() or self.result.done():
            return False
        self._pushed.clear()
        self._num_blocks = 0
        return True

    def withdraw(self, reason: str) -> None:
        """Stop offering the transfer. Returns at once; `wait` says how it ended."""
        if self.result.done():
            return
        self._withdrawn = self._withdrawn or reason
        if self.sending is None:
            self._end(TransferResult(Outcome.FAILED_DRAINED, error=reason))
        elif self._transfer is None:
            self.sending.cancel()  # nothing was pushed yet
        else:
            self._transfer.state.fail(reason)

    async def wait(self) -> TransferResult:
        """Wait until the offer has ended, and return how."""
        return await asyncio.shield(self.result)

    async def drained(self) -> None:
        """Wait, after UNKNOWN, until no block is read any more."""
        await self._drained.wait()

    # ---- of its receivers ----------------------------------------------------------------------------------------

    def keep(self, receiver: bytes, num_receivers: int) -> bool:
        """Note a receiver that wants the transfer. Returns False if it is kept for others. With `num_receivers` 0 the
        receiver does not need this rank, and the offer is completed."""
        if self.grants and (len(self.grants) >= self._num_receivers or num_receivers != self._num_receivers):
            return False
        if not num_receivers:
            if not self.result.done():
                self._end(TransferResult(Outcome.COMPLETED))
            return True
        self._num_receivers = num_receivers
        self.grants[receiver] = None
        self._set_deadline()
        return True

    def leave(self) -> None:
        """End the offer, because a receiver does not want it any more, or is gone."""
        self.withdraw("its receiver has left")

    def fetch(self, receiver: bytes, grant: bytes, first: int) -> bool:
        """Note where the blocks go for one of the receivers that keep the offer. Returns False if that one has fetched
        it already, or if receivers disagree on the first block."""
        is_first = not any(self.grants.values())
        if self.grants[receiver] is not None or not (is_first or first == self._first):
            return False
        self.grants[receiver], self._first = grant, first
        grants = [each for each in self.grants.values() if each is not None]
        if len(grants) == self._num_receivers:
            self.sending = asyncio.create_task(self._send(grants))
            self.sending.add_done_callback(self._sent)
            self._set_deadline()
        return True

    async def _send(self, grants: Sequence[bytes]) -> None:
        try:
            transfer = self._transfer = await self._open(self.transfer_id, grants)
        except (TransferFailed, FingerprintMismatch) as error:
            self._end(TransferResult(Outcome.FAILED_DRAINED, error=str(error)))
            return
        if not transfer.has_equal_blocks:
            transfer.state.fail("what is offered needs blocks of the same number of tokens on both sides")
        for piece in self._pushed:
            self._forward(*piece)
        transfer.result.add_done_callback(lambda _: self._payload.cancel())
        with contextlib.suppress(asyncio.CancelledError):  # the transfer has failed before the commit
            transfer.state.commit(await self._payload)
        result = await transfer.wait()
        self._end(result)
        if result.outcome is Outcome.UNKNOWN:
            await transfer.drained()
            self._drained.set()

    def _sent(self, sending: asyncio.Task[None]) -> None:
        if sending.cancelled():  # perhaps before it could begin
            self._end(TransferResult(Outcome.FAILED_DRAINED, error=self._withdrawn))

    def _forward(self, place: int, block_ids: list[int], ready: Any) -> None:
        """Push the blocks that the receiver wants, of those that begin at `place`."""
        assert self._transfer is not None
        end = self._first + self._transfer.num_blocks
        wanted = block_ids[max(0, self._first - place) : max(0, end - place)]
        if wanted and not self._transfer.state.failed:
            self._transfer.push(wanted, max(0, place - self._first), ready)

    # ---- its end -------------------------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        """Set, or cancel, the deadline of an offer whose blocks are there and that nobody fetches."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._payload.done() and self.sending is None and not self.result.done():
            kept, wait_s = bool(self.grants), self._expiry_s if self.grants else self._lease_s
            reason = f"it was {'kept' if kept else 'offered'} for {wait_s:.3g} s, and nobody has fetched it"
            self._deadline = asyncio.get_running_loop().call_later(wait_s, self.withdraw, reason)

    def _end(self, result: TransferResult) -> None:
        self.result.set_result(result)
        if result.outcome is not Outcome.UNKNOWN:
            self._drained.set()


@dataclass(eq=False)
class _Awaited:
    """A transfer that receivers want and that is not offered yet."""

    offer: asyncio.Future[Offer]
    num_waiting: int = 0


class Offers:
    """The offers of one rank, and the handlers for receivers that fetch them."""

    def __init__(self, me: Identity, open_send: _Open, expiry_s: float) -> None:
        self._me = me
        self._open = open_send
        self._expiry_s = expiry_s
        self.offers: dict[str, Offer] = {}
        """Offers by transfer id, until they have a result."""
        self.dropped_messages = 0
        self._ended: OrderedDict[str, str] = OrderedDict()
        """Why recent offers ended, by transfer id; at most MOST_ENDED."""
        self._awaited: dict[str, _Awaited] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def serve_on(self, server: RpcServer) -> None:
        server.serve_stream(messages.KEEP, self._serve_keep)
        server.serve(messages.FETCH, self._fetch)

    def make(self, transfer_id: str, lease_s: float) -> Offer:
        """Make an offer. Raises ValueError if the id is in use."""
        if transfer_id in self.offers:
            raise ValueError(f"transfer_id={transfer_id!r} is in use")
        offer = self.offers[transfer_id] = Offer(
            transfer_id, self._open, self._me.layout.num_blocks, lease_s=lease_s, expiry_s=self._expiry_s
        )
        offer.result.add_done_callback(lambda done: self._forget(offer, done.result()))
        if (awaited := self._awaited.pop(transfer_id, None)) is not None:
            awaited.offer.set_result(offer)
        return offer

    def _forget(self, offer: Offer, result: TransferResult) -> None:
        del self.offers[offer.transfer_id]
        if offer.sending is not None and not offer.sending.done():
            self._sending.add(offer.sending)
            offer.sending.add_done_callback(self._sending.discard)
        self._ended[offer.transfer_id] = _why_ended(result)
        if len(self._ended) > MOST_ENDED:
            self._ended.popitem(last=False)

    def close(self) -> None:
        for offer in list(self.offers.values()):
            offer.withdraw("the sender was closed")

    async def closed(self) -> None:
        """Wait until nothing is read any more. Call it after `close`, when no connection is left."""
        sending = [each.sending for each in self.offers.values() if each.sending]
        await asyncio.gather(*sending, *self._sending, return_exceptions=True)

    async def _serve_keep(self, keep: Keep) -> AsyncIterator[Offered]:
        """Handle KEEP: run for each receiver as long as it wants the transfer."""
        offer = await self._find(keep)
        if not offer.keep(calling_peer().connection, keep.num_receivers):
            self._drop(f"transfer {keep.transfer_id} is kept for another receiver")
        try:
            yield Offered(self._me.heads)
            result = await offer.wait()
        finally:
            offer.leave()
        if result.outcome is not Outcome.COMPLETED:
            raise InvalidRequest(f"transfer {keep.transfer_id} is not offered any more: {result.error}")

    async def _find(self, keep: Keep) -> Offer:
        name = keep.transfer_id
        if keep.epoch not in ("", self._me.epoch):
            self._drop(f"transfer {name} was offered by an earlier life of this instance")
        if name in self.offers:
            return self.offers[name]
        self._refuse_ended(name)
        awaited = self._awaited.setdefault(name, _Awaited(asyncio.get_running_loop().create_future()))
        if awaited.num_waiting >= max(1, keep.num_receivers):
            self._drop(f"transfer {name} is not offered: another receiver waits for it")
        awaited.num_waiting += 1
        patience_s = min(LATE_S, self._expiry_s) if keep.epoch else self._expiry_s
        try:
            async with asyncio.timeout(patience_s):
                return await asyncio.shield(awaited.offer)
        except TimeoutError:
            raise InvalidRequest(f"transfer {name} was not offered within {patience_s:.3g} s") from None
        finally:
            awaited.num_waiting -= 1
            if not awaited.num_waiting and self._awaited.get(name) is awaited:
                del self._awaited[name]

    async def _fetch(self, fetch: Fetch) -> Nothing:
        name, receiver = fetch.transfer_id, calling_peer().connection
        self._refuse_ended(name)
        offer = self.offers.get(name)
        if offer is None or receiver not in offer.grants:
            self._drop(f"transfer {name} is not kept for this receiver")
        if not offer.fetch(receiver, fetch.grant, fetch.first):
            self._drop(f"transfer {name} is being fetched already")
        return Nothing()

    def _refuse_ended(self, name: str) -> None:
        """Raise InvalidRequest if the transfer was offered and is not any more; the error says why."""
        offer, why = self.offers.get(name), self._ended.get(name)
        if offer is not None:  # perhaps with an id that was used before
            why = _why_ended(offer.result.result()) if offer.result.done() else None
        if why is not None:
            self._drop(f"transfer {name} is not offered: {why}")

    def _drop(self, what: str) -> NoReturn:
        self.dropped_messages += 1
        raise InvalidRequest(what)


def _why_ended(result: TransferResult) -> str:
    return result.error or "it was fetched"


def checked_seconds(name: str, seconds: object) -> float:
    """Return `seconds`. Raises ValueError if that is not a time to wait for. (A NaN would upset the order of an event
    loop's timers.)"""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not (isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name}={seconds!r}: expected seconds, 0 or more")
    return seconds
