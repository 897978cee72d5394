"""The transfers of another rank of this instance, as rank 0 directs them: see rank_transfer_protocol.py."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from hbserve_core.errors import RankFailed
from hbserve_core.transfers import rank_transfer_protocol as protocol
from hbserve_core.transfers.joint_transfer import Receive, Send
from hbserve_core.transfers.rank_transfer_protocol import (
    Committing,
    Ended,
    Ending,
    Opening,
    Posting,
    Pushing,
    Reply,
    Request,
)
from hbserve_kv import Outcome, TransferFailed, TransferResult, TransferStats
from hbserve_rpc import InvalidRequest, Method, PeerLost, RemoteError, RpcClient, RpcTimeout
from hbserve_rpc.messages import Empty

SILENCE_S = 5.0
"""A rank that is silent for longer is lost. Its reports say so earlier, see ranks/worker_handle.py."""
TIMEOUT_S = 10.0
"""For what a rank does at once."""
LONGEST_S = 3600.0
"""For what takes as long as a peer does. The rank has deadlines for those, and its heartbeats show that it lives."""


class Rank:
    """Calls to rank `rank`, whose process serves its transfers at `address`."""

    def __init__(self, rank: int, address: str, on_lost: Callable[[Exception], None]) -> None:
        self.name = f"rank {rank}"
        self._on_lost = on_lost
        self.client = RpcClient(address, heartbeat_interval_s=1.0, heartbeat_timeout_s=SILENCE_S)

    async def call(
        self, method: Method[Request, Reply], request: Request, timeout_s: float = LONGEST_S
    ) -> Reply | None:
        """None: the rank is lost, and `on_lost` was told. Raises InvalidRequest and RemoteError: it refuses."""
        try:
            return await self.client.call(method, request, timeout_s=timeout_s)
        except (PeerLost, RpcTimeout) as error:
            self._on_lost(RankFailed(f"{self.name} does not answer: {error}"))
            return None

    async def end(self, method: Method[Request, Ended], request: Request) -> TransferResult:
        """How a transfer ended. A lost rank's has failed, and is drained: its process is ended, and so is the instance,
        before a block is used again."""
        ended = await self.call(method, request)
        if ended is None:
            return TransferResult(Outcome.FAILED_DRAINED, error=f"{self.name} is lost")
        return ended.result


class RemoteTransfers:
    """Transfers of another rank."""

    def __init__(self, rank: int, address: str, on_lost: Callable[[Exception], None]) -> None:
        """on_lost: called when the rank does not answer; the instance must end then."""
        self._rank = Rank(rank, address, on_lost)
        self._losing: asyncio.Task[None] | None = None
        self._stats = TransferStats()

    async def start(self) -> None:
        await self._rank.client.start()

    async def post_receive(self, transfer_id: str, block_ids: Sequence[int]) -> Receive:
        receive = RemoteReceive(self._rank, transfer_id)
        try:
            posted = await self._rank.call(protocol.POST, Posting(transfer_id, list(block_ids)), TIMEOUT_S)
        except asyncio.CancelledError:
            await receive.cancel("rank 0 has given it up")
            raise
        if posted is None:
            raise TransferFailed(f"transfer {transfer_id}: {self._rank.name} is lost")
        receive.grant = posted.grant
        return receive

    async def open_send(self, transfer_id: str, grants: Sequence[bytes]) -> Send | None:
        try:
            opened = await self._rank.call(protocol.OPEN, Opening(transfer_id, list(grants)))
        except (InvalidRequest, RemoteError) as error:
            raise TransferFailed(f"{self._rank.name}: {error}") from error
        except asyncio.CancelledError:
            await self._rank.end(protocol.ABORT, Ending(transfer_id, "rank 0 has given it up"))
            raise
        if opened is None:
            raise TransferFailed(f"transfer {transfer_id}: {self._rank.name} is lost")
        return None if opened.num_blocks is None else RemoteSend(self._rank, transfer_id, opened.num_blocks)

    async def stats(self) -> TransferStats:
        figures = await self._rank.call(protocol.STATS, Empty(), TIMEOUT_S)
        if figures is not None:
            self._stats = figures.stats
        return self._stats

    def lose(self) -> None:
        """The instance has failed: what waits for the rank waits no longer, and what is asked from now on fails."""
        self._losing = asyncio.create_task(self._rank.client.close("the instance has failed"))

    async def close(self) -> None:
        if self._losing is not None:
            await self._losing
            return
        await self._rank.call(protocol.CLOSE, Empty(), TIMEOUT_S)
        await self._rank.client.close()


class RemoteReceive:
    """A Receive of another rank."""

    grant = b""

    def __init__(self, rank: Rank, transfer_id: str) -> None:
        self._rank = rank
        self._transfer_id = transfer_id

    async def wait(self) -> TransferResult:
        return await self._rank.end(protocol.WAIT, Ending(self._transfer_id))

    async def cancel(self, reason: str) -> Outcome:
        return (await self._rank.end(protocol.CANCEL, Ending(self._transfer_id, reason))).outcome

    async def drained(self) -> None:
        await self._rank.call(protocol.RECEIVE_DRAINED, Ending(self._transfer_id))


class RemoteSend:
    """A Send of another rank."""

    def __init__(self, rank: Rank, transfer_id: str, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._rank = rank
        self._transfer_id = transfer_id
        self._pushes: asyncio.Queue[Pushing | None] = asyncio.Queue()
        self._pushing = asyncio.create_task(self._push_in_order())
        self._ending: asyncio.Task[TransferResult] | None = None

    def push(self, block_ids: Sequence[int], first: int) -> None:
        """The blocks are computed on that rank too: rank 0's step ends after the sums to which it then contributed."""
        self._pushes.put_nowait(Pushing(self._transfer_id, list(block_ids), first))

    async def _push_in_order(self) -> None:
        while (push := await self._pushes.get()) is not None:
            with contextlib.suppress(PeerLost):  # this side is closed; the call that comes next is told
                self._rank.client.notify(protocol.PUSH, push)

    async def commit(self, payload: bytes) -> TransferResult:
        return await self._end(protocol.COMMIT, Committing(self._transfer_id, payload))

    async def abort(self, reason: str) -> Outcome:
        return (await self._end(protocol.ABORT, Ending(self._transfer_id, reason))).outcome

    async def _end(self, method: Method[Request, Ended], request: Request) -> TransferResult:
        # A task of its own: whoever waits may be cancelled, and the transfer must still end.
        if self._ending is None:
            self._ending = asyncio.create_task(self._finish(method, request))
        return await asyncio.shield(self._ending)

    async def _finish(self, method: Method[Request, Ended], request: Request) -> TransferResult:
        self._pushes.put_nowait(None)
        await self._pushing
        return await self._rank.end(method, request)

    async def drained(self) -> None:
        await self._rank.call(protocol.SEND_DRAINED, Ending(self._transfer_id))
