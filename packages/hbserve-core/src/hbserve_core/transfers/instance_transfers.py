"""The KV of a prefill or decode instance on its way: the transfers of all its ranks as one.

A grant of an instance is the list of its ranks' grants. Each rank of the sender connects by itself to those that want
heads of it; only what is said of a transfer goes through rank 0.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import astuple

import msgspec

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.runner import Runner
from hbserve_core.model.shard import Shard
from hbserve_core.transfers.joint_transfer import JointReceive, JointSend, all_or_none
from hbserve_core.transfers.rank_transfers import RankTransfers, Transfers
from hbserve_core.transfers.remote_transfers import RemoteTransfers
from hbserve_kv import TransferFailed, TransferStats


class InstanceTransfers:
    """Lives in the event loop that ran `start`."""

    def __init__(
        self, config: InstanceConfig, runner: Runner, epoch: str, on_lost: Callable[[Exception], None]
    ) -> None:
        """on_lost: called if a rank does not answer any more; the instance must end then.

        Raises:
            BackendUnavailable: see `KVTransferManager`.
        """
        self._others = [
            RemoteTransfers(rank, address, on_lost) for rank, address in enumerate(runner.transfer_addresses, 1)
        ]
        shard = Shard(0, 1 + len(self._others))
        self._ranks: list[Transfers] = [RankTransfers(config, runner, shard, epoch), *self._others]

    async def start(self) -> None:
        """Raises AddressInUse, BackendUnavailable."""
        for rank in self._ranks:
            await rank.start()

    async def post_receive(self, transfer_id: str, block_ids: Sequence[int]) -> JointReceive:
        """Expect one transfer into these blocks of every rank's pool; no blocks: only its commit.

        Raises:
            ValueError: the id is in use, or a block is outside the pool or there twice.
            TransferFailed: a rank is lost.
        """
        parts = await all_or_none(
            [rank.post_receive(transfer_id, block_ids) for rank in self._ranks],
            undo=lambda part: part.cancel("another rank cannot receive"),
        )
        return JointReceive(parts, msgspec.msgpack.encode([part.grant for part in parts]))

    async def open_send(self, transfer_id: str, grant: bytes) -> JointSend:
        """Begin the transfer that `grant`, of an instance with any number of ranks, allows.

        Raises:
            FingerprintMismatch: the receiver's KV means something else.
            TransferFailed: the receiver is not there, was restarted, or has given the transfer up; or a rank is lost.
        """
        grants = msgspec.msgpack.decode(grant, type=list[bytes])
        parts = await all_or_none(
            [rank.open_send(transfer_id, grants) for rank in self._ranks],
            undo=lambda part: part.abort("another rank cannot send") if part else _nothing(),
        )
        concerned = [part for part in parts if part is not None]
        if not concerned:
            raise TransferFailed(f"transfer {transfer_id}: no rank here has heads that it wants")
        return JointSend(concerned)

    async def stats(self) -> TransferStats:
        """Added up over ranks, so a transfer counts once for each pair of ranks."""
        found = await asyncio.gather(*(rank.stats() for rank in self._ranks))
        return TransferStats(*map(sum, zip(*map(astuple, found), strict=True)))

    def lose_ranks(self) -> None:
        """The instance has failed, perhaps because a rank is lost: nothing waits for other ranks any more."""
        for rank in self._others:
            rank.lose()

    async def close(self) -> None:
        """End every transfer, tell the peers, and leave no thread, socket or task behind. May be called twice."""
        await asyncio.gather(*(rank.close() for rank in self._ranks))


async def _nothing() -> None:
    """There is nothing to undo."""
