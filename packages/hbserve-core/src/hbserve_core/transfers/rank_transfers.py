"""The KV of one rank on its way to and from ranks of other instances, in that rank's process."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.runner import Runner
from hbserve_core.model.shard import Shard
from hbserve_core.transfers.joint_transfer import JointSend, Receive, Send, all_or_none
from hbserve_kv import KVTransferManager, TransferStats

RANK_STRIDE = 1 << 16
"""Between the numbers by which hbserve_kv knows the ranks of one instance: `kv_rank + rank * RANK_STRIDE`."""


class Transfers(Protocol):
    """What an instance asks of each of its ranks, of this process or another."""

    async def start(self) -> None:
        """Raises AddressInUse, BackendUnavailable."""

    async def post_receive(self, transfer_id: str, block_ids: Sequence[int]) -> Receive:
        """Expect this rank's heads of one transfer. Raises ValueError: see `KVTransferManager.post_receive`."""

    async def open_send(self, transfer_id: str, grants: Sequence[bytes]) -> Send | None:
        """Begin to send to all of these ranks that want heads of this one; None: no one does.

        Raises:
            FingerprintMismatch, TransferFailed: one of them cannot be sent to.
        """

    async def stats(self) -> TransferStats:
        """Of a rank that is lost, those that were last heard."""

    async def close(self) -> None:
        """End every transfer, and tell the peers."""


class RankTransfers:
    """Transfers of this process. Lives in the event loop that ran `start`."""

    def __init__(self, config: InstanceConfig, runner: Runner, shard: Shard, epoch: str | None = None) -> None:
        """Raises BackendUnavailable."""
        num_kv_heads = runner.model_config.num_kv_heads
        self._is_sender = shard.is_first_with_kv_heads(num_kv_heads)
        settings = config.kv_transfer
        if shard.rank:  # the next ports are those of other instances
            settings = msgspec.structs.replace(settings, port=0)
        self._manager = KVTransferManager(
            rank=config.kv_rank + shard.rank * RANK_STRIDE, pool=runner.pool, fingerprint=runner.fingerprint,
            config=settings, epoch=epoch, heads=shard.kv_heads(num_kv_heads),
        )  # fmt: skip

    async def start(self) -> None:
        await self._manager.start()

    async def post_receive(self, transfer_id: str, block_ids: Sequence[int]) -> Receive:
        return self._manager.post_receive(transfer_id, block_ids)

    async def open_send(self, transfer_id: str, grants: Sequence[bytes]) -> Send | None:
        manager = self._manager
        concerned = [grant for grant in grants if manager.concerns(grant)] if self._is_sender else []
        if not concerned:
            return None
        sends = await all_or_none(
            [manager.open_send(transfer_id, grant) for grant in concerned],
            undo=lambda send: send.abort("another rank cannot be sent to"),
        )
        return JointSend(sends)

    async def stats(self) -> TransferStats:
        return self._manager.stats()

    async def close(self) -> None:
        await self._manager.close()
