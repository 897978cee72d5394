"""Transfers that this side fetches: it tells the sender that it wants them, and later where they go.

Under tensor parallelism the sender is several ranks, and this rank fetches from those that have heads of it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hbserve_kv.errors import TransferFailed
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.messages import Fetch, Keep
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult
from hbserve_kv.receiving.transfer import PostedReceive
from hbserve_rpc import HBServeRpcError, Keys, RpcClient
from hbserve_rpc.address import nobody_listens

ANSWER_TIMEOUT_S = 1.0


@dataclass(eq=False)
class _Sender:
    """The connection to one life of a sender."""

    client: RpcClient
    starting: asyncio.Task[None]
    num_claims: int = 0
    is_lost: bool = False


class Senders:
    """Connections to senders: one to each sender from which something is claimed, until it ends."""

    def __init__(self, timeout_s: float, keys: Keys | None) -> None:
        self.timeout_s = timeout_s
        self._keys = keys
        self._senders: dict[str, _Sender] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[RpcClient]:
        """Connect to a sender, or use the connection that there is. Raises TransferFailed if nobody is there."""
        sender = self._senders.get(address) or self._make(address)
        sender.num_claims += 1
        try:
            await asyncio.shield(sender.starting)
            yield sender.client
        finally:
            sender.num_claims -= 1
            self._close_if_over(sender)

    def _make(self, address: str) -> _Sender:
        beat_s = min(2.0, self.timeout_s / 4)
        client = RpcClient(address, heartbeat_interval_s=beat_s, heartbeat_timeout_s=self.timeout_s, keys=self._keys)
        sender = self._senders[address] = _Sender(client, asyncio.create_task(_start(client)))

        def lost(*_: object) -> None:
            sender.is_lost = True
            if self._senders.get(address) is sender:
                del self._senders[address]
            self._close_if_over(sender)

        client.on_lost = lost
        sender.starting.add_done_callback(lambda done: lost() if done.exception() else None)
        return sender

    def _close_if_over(self, sender: _Sender) -> None:
        if sender.is_lost and not sender.num_claims:
            task = asyncio.create_task(sender.client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        senders, self._senders = list(self._senders.values()), {}
        await asyncio.gather(*(each.starting for each in senders), return_exceptions=True)
        await asyncio.gather(*(each.client.close() for each in senders), *self._closing)


async def _start(client: RpcClient) -> None:
    """Start a client, or fail if nobody listens. An RPC client would wait for a server that comes later, but a sender
    that offers something is there already."""
    if await nobody_listens(client.address, ANSWER_TIMEOUT_S):
        raise TransferFailed(f"{client.address} has ended: nobody listens there")
    await client.start()


class SourceRank(NamedTuple):
    """One rank of a sender, and its part in a transfer that this rank claims."""

    address: str
    epoch: str = ""
    num_receivers: int = 1
    """Number of ranks on this side that fetch from it, including this one. 0: none does, and the sender is told that it
    may forget the transfer."""


class Claim:
    """An offer that this side wants. Its sender keeps it until `release` or the end of a fetch. Made by
    `KVTransferManager.claim`."""

    def __init__(
        self,
        transfer_id: str,
        sources: Sequence[SourceRank],
        heads: HeadRange,
        senders: Senders,
        post: Callable[[str, Sequence[int]], PostedReceive],
    ) -> None:
        """`heads` are those that must come."""
        self.transfer_id = transfer_id
        self.address = ", ".join(each.address for each in sources)
        self._heads = heads
        self._senders = senders
        self._post = post
        self._num_silent = len(sources)
        """Number of sources that have not answered yet."""
        self._clients: list[RpcClient] = []
        """Clients of sources that have answered and are fetched from."""
        self._offered: list[HeadRange] = []
        self._kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._posted: PostedReceive | None = None
        self._cause = ""
        """Why the claim has ended; "" while it has not."""
        self._fetching: asyncio.Task[None] | None = None
        self.task = asyncio.create_task(self._run(sources))

    async def _run(self, sources: Sequence[SourceRank]) -> None:
        cause = "the sender has ended it"
        keeping = [asyncio.create_task(self._keep(source)) for source in sources]
        try:
            await asyncio.gather(*keeping)
        except (HBServeRpcError, TransferFailed) as error:
            cause = str(error)
        except asyncio.CancelledError:
            cause = "it was released"
        for each in keeping:  # if one sender is lost, the claim ends at the others too
            each.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
        self._cause = cause
        self._kept.cancel()
        if self._posted is not None:
            self._posted.fail(cause)  # does nothing if all has come

    async def _keep(self, source: SourceRank) -> None:
        """Keep the offer at one sender until it has ended there."""
        keep, has_offered = Keep(self.transfer_id, source.epoch, source.num_receivers), False
        async with self._senders.use(source.address) as client, client.stream(messages.KEEP, keep) as kept:
            async for offered in kept:
                if has_offered:  # a second offer would be counted for a source that has not answered
                    raise TransferFailed(f"transfer {self.transfer_id}: {source.address} offers it a second time")
                has_offered = True
                self._num_silent -= 1
                if source.num_receivers:
                    self._clients.append(client)
                    self._offered.append(offered.heads)
                if not self._num_silent:
                    self._check_heads()
                    self._kept.set_result(None)

    def _check_heads(self) -> None:
        """Raise TransferFailed unless the senders have all heads that are needed, each once."""
        common = [heads for each in self._offered if (heads := self._heads.common(each))]
        if sorted(head for each in common for head in each.heads()) != list(self._heads.heads()):
            found, needed = ", ".join(map(_named, self._offered)), _named(self._heads)
            what = f"transfer {self.transfer_id} is offered at {self.address}"
            raise TransferFailed(f"{what} with heads {found}, where {needed} are needed, each once")

    async def kept(self) -> bool:
        """Wait until all senders keep the offer. Returns False if that will not happen."""
        await asyncio.wait([self._kept])
        return not self._kept.cancelled()

    def fetch(self, block_ids: Sequence[int], *, first: int = 0) -> PostedReceive:
        """Fetch the offered blocks, from position `first` on, into these blocks of the pool. Returns at once.

        Raises:
            ValueError: it was fetched already; otherwise see `KVTransferManager.post_receive`.
        """
        if self._posted is not None:
            raise ValueError(f"transfer {self.transfer_id} was fetched already")
        posted = self._posted = self._post(self.transfer_id, block_ids)
        if self._cause:
            posted.fail(self._cause)
            return posted
        self._fetching = asyncio.create_task(self._fetch(posted, first))
        posted.when_ended(self._received)
        return posted

    async def _fetch(self, posted: PostedReceive, first: int) -> None:
        if not await self.kept():
            return  # `_run` says why
        fetch, timeout_s = Fetch(self.transfer_id, posted.grant, first), self._senders.timeout_s
        try:
            await asyncio.gather(*(each.call(messages.FETCH, fetch, timeout_s=timeout_s) for each in self._clients))
        except HBServeRpcError as error:
            posted.fail(str(error))

    def _received(self, result: TransferResult) -> None:
        """Release the claim after a failure. If all has come, each sender is about to hear so and ends the claim
        itself; if this side left before that, the transfer would fail there."""
        if result.outcome is not Outcome.COMPLETED:
            self.release()

    def release(self) -> None:
        """Give up the claim. The sender hears so, even if it has yet to offer the transfer, and gets its blocks back.
        This ends a fetch that is under way."""
        self._cause = self._cause or "it was released"
        if self._posted is not None:
            self._posted.fail(self._cause)
        if self._kept.done():
            self.task.cancel()
        else:
            self._kept.add_done_callback(lambda _: self.task.cancel())

    async def close(self) -> None:
        tasks = [self.task, *([self._fetching] if self._fetching else [])]
        for each in tasks:
            each.cancel()  # a frozen sender does not answer the fetch
        await asyncio.gather(*tasks, return_exceptions=True)


def _named(heads: HeadRange) -> str:
    return f"[{heads.first}, {heads.end}) of {heads.total}"
