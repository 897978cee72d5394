"""A worker's side of the vLLM connector. It has one KVTransferManager in a thread with an event loop of its own, so
that transfers, leases and heartbeats go on while the model computes and while the engine is idle. Imports no vLLM.
"""

import asyncio
import logging
import threading
import uuid
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from hbserve_kv.config import KVTransferConfig
from hbserve_kv.errors import TransferFailed
from hbserve_kv.integrations.vllm_orders import Computed, Orders, Wanted
from hbserve_kv.integrations.vllm_ranks import sources_of
from hbserve_kv.manager import KVTransferManager
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult
from hbserve_kv.receiving.claims import Claim, SourceRank
from hbserve_kv.sending.offers import Offer

logger = logging.getLogger(__name__)


@dataclass
class Votes:
    """Votes of a worker, which say what has become of requests since the last step."""

    sent: set[str] = field(default_factory=set)
    """Requests whose blocks are read no more."""
    received: set[str] = field(default_factory=set)
    """Requests whose KV has come."""
    failed: set[str] = field(default_factory=set)
    """Requests whose KV has not come and will not. Nothing lands in their blocks any more."""
    invalid_block_ids: set[int] = field(default_factory=set)
    """Blocks that were to be fetched and were not. They are told as soon as that is known, and never after `failed`."""
    figures: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Sending:
    offer: Offer
    is_owed: bool = False
    """Whether a vote is to be given when the transfer is over."""
    is_over: bool = False


class WorkerSide:
    def __init__(
        self,
        rank: int,
        tp_size: int,
        heads: HeadRange,
        pool: Any,
        fingerprint: Mapping[str, str | int],
        config: KVTransferConfig,
        *,
        pieces_of_block: int = 1,
        lease_s: float = 30.0,
        device: torch.device | None = None,
    ) -> None:
        """`heads` are those of this rank. `pieces_of_block` is how many blocks of the pool make one of vLLM's. `device`
        is where the pool is, and where the calling threads compute; None: the CPU. Returns when peers can connect.

        Raises: see KVTransferManager and its `start`.
        """
        self._tp_size = tp_size
        self._pieces = pieces_of_block
        self._lease_s = lease_s
        self._patience_s = 4 * config.timeout_s
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._claims: dict[str, Claim] = {}
        self._sending: dict[str, _Sending] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._votes = Votes()
        self._lock = threading.Lock()
        """Protects the votes: the calling threads take them, and the loop adds to them."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hbserve-kv", daemon=True)
        self._thread.start()
        try:
            self.manager = self._run(self._start(rank, heads, pool, fingerprint, config)).result()
        except BaseException:
            self._stop_loop()
            raise

    async def _start(
        self, rank: int, heads: HeadRange, pool: Any, fingerprint: Mapping[str, str | int], config: KVTransferConfig
    ) -> KVTransferManager:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # applies to this thread only
        manager = KVTransferManager(rank=rank, pool=pool, fingerprint=fingerprint, config=config, heads=heads)
        await manager.start()
        return manager

    def _run(self, job: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(job, self._loop)

    # ---- called by vLLM's worker, once a step --------------------------------------------------------------------

    def begin_step(self, orders: Orders) -> None:
        """Carry out the orders that concern earlier steps."""
        event = self._event() if orders.finished else None
        if orders:
            self._loop.call_soon_threadsafe(self._begin, orders, event)

    def _event(self) -> Any:
        """Return an event that happens after what the calling thread has queued on its current stream; None on the
        CPU."""
        if self._gpu is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    def end_step(self, orders: Orders) -> None:
        """Offer the blocks of a step whose computation is queued. They are sent when the device has done it."""
        if orders.computed:
            self._loop.call_soon_threadsafe(self._push_computed, orders.computed, self._event())

    def preempt(self, names: set[str]) -> None:
        """Wait until the blocks of these requests are not read any more.

        Raises:
            TimeoutError: some may still be read. Overwriting them would send data of other requests.
        """
        if names:
            self._run(self._preempt(names)).result(timeout=self._patience_s)

    def take_votes(self) -> Votes:
        with self._lock:
            votes, self._votes = self._votes, Votes()
        return votes

    def take_received(self) -> set[str]:
        """Take only the votes `received`, which may be told at any time. `failed` waits for `take_votes`, and so does
        `sent`, because vLLM's MultiConnector counts there who else still reads the blocks."""
        with self._lock:
            received, self._votes.received = self._votes.received, set()
        return received

    def close(self) -> None:
        """End every transfer, and tell the peers. May be called twice."""
        if self._thread.is_alive():
            self._run(self._close()).result()
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        await self.manager.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- in the loop: what comes ---------------------------------------------------------------------------------

    def _begin(self, orders: Orders, event: Any) -> None:
        for name, transfer_id in orders.offers.items():
            self._sending_of(name, transfer_id)
        for name, source in orders.claims.items():
            ranks = sources_of(self.manager.rank, self._tp_size, len(source.ranks), self.manager.heads.total)
            sources = [SourceRank(*source.ranks[rank], num_receivers) for rank, num_receivers in ranks]
            self._claims[name] = self.manager.claim(source.transfer_id, sources)
        for name, wanted in orders.fetches.items():
            self._begin_task(self._fetch(name, self._claims[name], wanted))
        for name in orders.releases:
            if (claim := self._claims.pop(name, None)) is not None:
                claim.release()
        for name, computed in orders.finished.items():
            self._push(name, computed, event).is_owed = True
            self._vote_if_over(name)
        for name, (transfer_id, reason) in orders.withdrawn.items():
            sending = self._sending_of(name, transfer_id)
            sending.is_owed = True
            sending.offer.withdraw(reason)
            self._vote_if_over(name)

    def _begin_task(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, name: str, claim: Claim, wanted: Wanted) -> None:
        try:
            posted = claim.fetch(self._pool_blocks(wanted.block_ids), first=wanted.first * self._pieces)
            result = await posted.wait()
        except ValueError as refusal:  # a router has given the same transfer id to two requests
            claim.release()
            result = TransferResult(Outcome.FAILED_DRAINED, error=str(refusal))
        error = result.error
        if result.outcome is Outcome.COMPLETED and result.payload != wanted.digest.encode():
            error = "its prompt has other tokens on the side that prefilled it"
        self._count(result, error)
        if error:
            logger.warning("KV of request %s was not fetched from %s: %s", name, claim.address, error)
            with self._lock:
                self._votes.invalid_block_ids.update(wanted.block_ids)
        if result.outcome is Outcome.UNKNOWN:
            try:
                await posted.drained()
            except TransferFailed:
                return  # this side is being closed
        self._claims.pop(name, None)
        with self._lock:
            (self._votes.failed if error else self._votes.received).add(name)

    def _pool_blocks(self, block_ids: list[int]) -> list[int]:
        return [block_id * self._pieces + piece for block_id in block_ids for piece in range(self._pieces)]

    # ---- in the loop: what goes ----------------------------------------------------------------------------------

    def _push_computed(self, computed: Mapping[str, Computed], event: Any) -> None:
        for name, each in computed.items():
            self._push(name, each, event)

    def _push(self, name: str, computed: Computed, event: Any) -> _Sending:
        sending = self._sending_of(name, computed.transfer_id)
        if computed.block_ids:
            sending.offer.push(self._pool_blocks(computed.block_ids), event)
        if computed.digest:
            sending.offer.commit(computed.digest.encode())
        return sending

    def _sending_of(self, name: str, transfer_id: str) -> _Sending:
        if name not in self._sending:
            try:
                offer = self.manager.offer(transfer_id, lease_s=self._lease_s)
            except ValueError as error:  # a router has given the same transfer id to two requests
                offer = self.manager.offer(uuid.uuid4().hex)
                offer.withdraw(str(error))
            self._sending[name] = _Sending(offer)
            self._begin_task(self._wait(name, self._sending[name]))
        return self._sending[name]

    async def _wait(self, name: str, sending: _Sending) -> None:
        result = await sending.offer.wait()
        if result.outcome is Outcome.UNKNOWN:
            await sending.offer.drained()
        if result.outcome is not Outcome.COMPLETED:
            logger.warning("KV of request %s was not delivered: %s", name, result.error)
            with self._lock:
                self._votes.figures.setdefault("num_not_delivered", []).append(1)
        sending.is_over = True
        self._vote_if_over(name)

    def _vote_if_over(self, name: str) -> None:
        """Vote if the request has finished here and its blocks are read no more, of which either may come later."""
        sending = self._sending[name]
        if sending.is_over and sending.is_owed:
            del self._sending[name]
            with self._lock:
                self._votes.sent.add(name)

    async def _preempt(self, names: set[str]) -> None:
        for name in names & self._sending.keys():
            sending = self._sending[name]
            if not sending.offer.restart():
                sending.offer.withdraw("its prompt was preempted while it was computed, and is computed anew")
                await sending.offer.drained()

    # ---- figures -------------------------------------------------------------------------------------------------

    def _count(self, result: TransferResult, error: str) -> None:
        """Add the figures of one transfer to this worker."""
        if error:
            figures = {"num_failed_transfers": 1.0}
        else:
            figures = {
                "transfer_duration": result.time_s,
                "bytes_transferred": float(result.num_bytes),
                "num_parts": float(result.num_parts),
            }
        with self._lock:
            for name, number in figures.items():
                self._votes.figures.setdefault(name, []).append(number)
