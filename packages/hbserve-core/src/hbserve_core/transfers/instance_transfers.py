"""KV transfers of a prefill or decode instance.

P, 2 ranks              D, 1 rank             Each rank sends by itself to those that want heads of it. Only what is
  rank 0 ──heads 0, 1──▶ rank 0               said of a transfer goes through rank 0, for which the transfers of all
  rank 1 ──heads 2, 3──▶                      ranks are one: its blocks are free, or there, when every rank says so.

An instance of one rank has nothing to join: its transfers are those of its KVTransferManager.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import astuple
from typing import Any, Generic, TypeVar

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.step import Runner
from hbserve_core.model.shard import Shard
from hbserve_core.transfers.launched_steps import LaunchedStep
from hbserve_core.transfers.rank_transfers import RemoteRank, RemoteTransfer, make_manager
from hbserve_kv import Outcome, PostedReceive, SendTransfer, TransferResult, TransferStats, join_grants
from hbserve_kv.protocol.transfer_state import joint_result, worst

_Receive = PostedReceive | RemoteTransfer
_Send = SendTransfer | RemoteTransfer
T = TypeVar("T", bound=_Receive | _Send)


class InstanceTransfers:
    """Transfers of an instance, whatever its number of ranks. Belongs to the event loop that ran `start`."""

    def __init__(
        self, config: InstanceConfig, runner: Runner, epoch: str, on_lost: Callable[[Exception], None]
    ) -> None:
        """on_lost: called if a rank no longer answers. The instance must end then.

        Raises:
            BackendUnavailable: see `KVTransferManager`.
        """
        self.endpoint = b""
        """Endpoint at which all ranks of the instance receive, for a sender's `open_link`; set by `start`."""
        addresses = runner.transfer_addresses
        num_kv_heads, size = runner.model_config.num_kv_heads, 1 + len(addresses)
        self._manager = make_manager(config, runner, Shard(0, size), epoch)
        self._others = [RemoteRank(rank, address, on_lost, config.keys) for rank, address in enumerate(addresses, 1)]
        self._other_senders = [
            each for rank, each in enumerate(self._others, 1) if Shard(rank, size).is_first_with_kv_heads(num_kv_heads)
        ]

    async def start(self) -> None:
        """Start the transfers of all ranks, and move a block from each rank to itself: an instance that then reports
        ready can move KV, as far as that can be known without a peer.

        Raises AddressInUse, BackendUnavailable, or TransferFailed if a rank is lost.
        """
        await self._manager.start()
        for rank in self._others:
            await rank.client.start()
        try:
            await self._manager.transfer_to_itself()
            self.endpoint = join_grants([self._manager.endpoint, *[await rank.endpoint() for rank in self._others]])
        except BaseException:
            await self.close()
            raise

    async def open_link(self, endpoint: bytes) -> None:
        """Connect each rank to the ranks of a receiver that want heads of it, before any transfer.

        Raises:
            FingerprintMismatch: the receiver's KV means something else.
            TransferFailed: the receiver is not there, or was restarted; or a rank is lost.
        """
        opening = [self._manager.open_link(endpoint), *(rank.open_link(endpoint) for rank in self._other_senders)]
        await asyncio.gather(*opening)

    async def post_receive(
        self, transfer_id: str, block_ids: Sequence[int], sender: str = ""
    ) -> "PostedReceive | JointReceive":
        """Expect one transfer into these blocks of every rank's pool or, if there are no blocks, only its commit. It
        may bring fewer blocks if the request ends with its first token: see `TransferResult.is_partial`.

        Raises:
            ValueError: the id is in use, or a block is outside the pool or appears twice.
            TransferFailed: a rank is lost.
        """

        async def post() -> PostedReceive:
            return self._manager.post_receive(transfer_id, block_ids, may_be_partial=True, sender=sender)

        if not self._others:
            return await post()
        posting: list[Coroutine[Any, Any, _Receive]] = [
            post(),
            *(rank.post_receive(transfer_id, block_ids, sender) for rank in self._others),
        ]
        return JointReceive(await _all_or_none(posting))

    async def open_send(self, transfer_id: str, grant: bytes) -> "SendTransfer | JointSend":
        """Begin the transfer that `grant`, from an instance with any number of ranks, allows.

        Raises:
            FingerprintMismatch: the receiver's KV means something else.
            TransferFailed: the receiver is not there, was restarted, or has given up the transfer; or a rank is lost.
        """
        own = self._manager.open_send(transfer_id, grant)
        if not self._others:
            return await own
        opening: list[Coroutine[Any, Any, _Send]] = [
            own,
            *(rank.open_send(transfer_id, grant) for rank in self._other_senders),
        ]
        return JointSend(await _all_or_none(opening))

    async def stats(self) -> TransferStats:
        """Return the figures summed over ranks, so that a transfer counts once for each rank."""
        found = [self._manager.stats(), *await asyncio.gather(*(rank.stats() for rank in self._others))]
        return TransferStats(*map(sum, zip(*map(astuple, found), strict=True)))

    def lose_ranks(self) -> None:
        """Stop waiting for other ranks, because the instance has failed, perhaps because a rank is lost."""
        for rank in self._others:
            rank.lose()

    async def close(self) -> None:
        """End every transfer, tell the peers, and leave no thread, socket or task behind. May be called twice."""
        await asyncio.gather(self._manager.close(), *(rank.close() for rank in self._others))


class JointTransfer(Generic[T]):
    """Transfer of all ranks of an instance."""

    def __init__(self, parts: Sequence[T]) -> None:
        self._parts = parts

    async def wait(self) -> TransferResult:
        """Wait for the transfers of all ranks. As soon as one has failed, the others are cancelled, because nobody
        wants them without it."""
        waiting = [asyncio.ensure_future(part.wait()) for part in self._parts]
        try:
            cause = ""
            for ended in asyncio.as_completed(waiting):
                result = await ended
                if result.outcome is not Outcome.COMPLETED and not cause:
                    cause = result.error
                    await self.cancel(cause)
            return joint_result([await each for each in waiting], cause)
        finally:
            for each in waiting:
                each.cancel()

    async def cancel(self, reason: str) -> Outcome:
        return worst(await asyncio.gather(*(part.cancel(reason) for part in self._parts)))

    async def drained(self) -> None:
        await asyncio.gather(*(part.drained() for part in self._parts))


class JointReceive(JointTransfer[_Receive]):
    """PostedReceive of all ranks."""

    def __init__(self, parts: Sequence[_Receive]) -> None:
        super().__init__(parts)
        self.grant = join_grants([part.grant for part in parts])

    def when_ended(self, call: Callable[[TransferResult], None]) -> None:
        """Call `call` with the result, once, from the event loop."""
        self._ending = asyncio.create_task(self.wait())
        self._ending.add_done_callback(lambda done: call(done.result()))


class JointSend(JointTransfer[_Send]):
    """SendTransfer of all ranks that have heads to send, rank 0 first."""

    def __init__(self, parts: Sequence[_Send]) -> None:
        super().__init__(parts)
        self.num_blocks = parts[0].num_blocks

    def push(self, block_ids: Sequence[int], first: int, ready: LaunchedStep | None = None) -> None:
        """Push blocks on each rank, which reads them after its own event of the step `ready`. None means that they are
        computed."""
        for send in self._parts:
            if isinstance(send, SendTransfer):
                send.push(block_ids, first, ready and ready.computed)
            else:
                send.push(block_ids, first, ready.number if ready else 0)

    async def commit(self, payload: bytes = b"") -> TransferResult:
        # The commits are kept but not awaited here: the caller may be cancelled, and every rank must still be told.
        self._committing = asyncio.gather(*(send.commit(payload) for send in self._parts))
        return await self.wait()


async def _all_or_none(opening: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Open the transfers of all ranks. If one fails, the others are cancelled, and the first error is raised."""
    tasks = [asyncio.ensure_future(each) for each in opening]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        opened = await asyncio.gather(*tasks, return_exceptions=True)
        others = [each for each in opened if not isinstance(each, BaseException)]
        await asyncio.gather(*(each.cancel("another rank has no part in it") for each in others))
        raise
