"""The transfers of rank 1, 2, … in its own process, for rank 0 to direct: see rank_transfer_protocol.py."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.runner import Runner
from hbserve_core.model.shard import Shard
from hbserve_core.transfers import rank_transfer_protocol as protocol
from hbserve_core.transfers.joint_transfer import Receive, Send
from hbserve_core.transfers.rank_transfer_protocol import (
    Committing,
    Ended,
    Ending,
    Figures,
    Opened,
    Opening,
    Posted,
    Posting,
    Pushing,
)
from hbserve_core.transfers.rank_transfers import RankTransfers
from hbserve_kv import Outcome, TransferResult
from hbserve_rpc import InvalidRequest, RpcServer
from hbserve_rpc.messages import Empty

T = TypeVar("T", Receive, Send)
_LONG_AGO = Ended(TransferResult(Outcome.FAILED_DRAINED, error="it has ended before"))


class RankTransferServer:
    """Lives in the event loop that ran `start`."""

    def __init__(self, transfers: RankTransfers) -> None:
        self._transfers = transfers
        self._server = RpcServer("127.0.0.1", 0)
        self._receives: dict[str, Receive] = {}
        self._sends: dict[str, Send] = {}

    async def start(self) -> str:
        """The address. Raises what `RankTransfers.start` raises."""
        server = self._server
        server.serve(protocol.POST, self._post)
        server.serve(protocol.WAIT, self._wait)
        server.serve(protocol.CANCEL, self._cancel)
        server.serve(protocol.RECEIVE_DRAINED, self._receive_drained)
        server.serve(protocol.OPEN, self._open)
        server.serve_notification(protocol.PUSH, self._push)
        server.serve(protocol.COMMIT, self._commit)
        server.serve(protocol.ABORT, self._abort)
        server.serve(protocol.SEND_DRAINED, self._send_drained)
        server.serve(protocol.STATS, self._stats)
        server.serve(protocol.CLOSE, self._close)
        await self._transfers.start()
        await server.start()
        return server.address

    async def _post(self, request: Posting) -> Posted:
        posted = await self._transfers.post_receive(request.transfer_id, request.block_ids)
        self._receives[request.transfer_id] = posted
        return Posted(posted.grant)

    async def _wait(self, request: Ending) -> Ended:
        posted = self._receives.get(request.transfer_id)
        return Ended(await posted.wait()) if posted else _LONG_AGO

    async def _cancel(self, request: Ending) -> Ended:
        return await _end(self._receives, request.transfer_id, lambda posted: _result(posted.cancel(request.reason)))

    async def _receive_drained(self, request: Ending) -> Empty:
        return await _drained(self._receives, request.transfer_id)

    async def _open(self, request: Opening) -> Opened:
        if request.transfer_id in self._sends:
            raise InvalidRequest(f"transfer {request.transfer_id} is under way already")
        send = await self._transfers.open_send(request.transfer_id, request.grants)
        if send is None:
            return Opened(None)
        self._sends[request.transfer_id] = send
        return Opened(send.num_blocks)

    async def _push(self, request: Pushing) -> None:
        # What is not there was aborted meanwhile.
        if send := self._sends.get(request.transfer_id):
            send.push(request.block_ids, request.first)

    async def _commit(self, request: Committing) -> Ended:
        return await _end(self._sends, request.transfer_id, lambda send: send.commit(request.payload))

    async def _abort(self, request: Ending) -> Ended:
        return await _end(self._sends, request.transfer_id, lambda send: _result(send.abort(request.reason)))

    async def _send_drained(self, request: Ending) -> Empty:
        return await _drained(self._sends, request.transfer_id)

    async def _stats(self, _: Empty) -> Figures:
        return Figures(await self._transfers.stats())

    async def _close(self, _: Empty) -> Empty:
        await self._transfers.close()
        return Empty()


async def _end(transfers: dict[str, T], transfer_id: str, ending: Callable[[T], Awaitable[TransferResult]]) -> Ended:
    """End a transfer, and forget it unless it is UNKNOWN: `_drained` comes then."""
    transfer = transfers.get(transfer_id)
    if transfer is None:
        return _LONG_AGO
    result = await ending(transfer)
    if result.outcome is not Outcome.UNKNOWN:
        transfers.pop(transfer_id, None)
    return Ended(result)


async def _result(ending: Awaitable[Outcome]) -> TransferResult:
    return TransferResult(await ending)


async def _drained(transfers: dict[str, T], transfer_id: str) -> Empty:
    if transfer := transfers.get(transfer_id):
        await transfer.drained()
        transfers.pop(transfer_id, None)
    return Empty()


def serve_transfers(config: InstanceConfig, runner: Runner, shard: Shard) -> str:
    """Serve in a thread of its own, to the end of the process; returns the address.

    Raises:
        AddressInUse, BackendUnavailable.
    """
    address: Future[str] = Future()

    async def serve() -> None:
        try:
            address.set_result(await RankTransferServer(RankTransfers(config, runner, shard)).start())
        except BaseException as error:  # belongs to the caller
            address.set_exception(error)
            return
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), name="transfers", daemon=True).start()
    return address.result()
