"""GpuInstance: one engine behind RPC, with its KV transfers.

Two threads: the event loop (RPC, heartbeats, transfers) and the engine. Each request is one coroutine here, from its
first message to its last block.
"""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from hbserve_core.config import InstanceConfig
from hbserve_core.engine import Engine, Reservation, StepOutput
from hbserve_core.engine_thread import EngineThread
from hbserve_core.handover import Inbox, Sending, first_token
from hbserve_core.model_runner import ModelRunner
from hbserve_kv import KVTransferManager, Outcome, PostedReceive
from hbserve_rpc import InvalidRequest, Overloaded, RemoteError, RpcServer
from hbserve_rpc.messages import (
    DECODE,
    DESCRIBE,
    GENERATE,
    PREFILL,
    STATS,
    DecodeRequest,
    Empty,
    GenerateRequest,
    Granted,
    InstanceInfo,
    InstanceStats,
    InstanceStatus,
    PrefillRequest,
    TokenEvent,
    TransferDone,
)

logger = logging.getLogger(__name__)


class GpuInstance:
    """One prefill, decode or hybrid instance. Lives in the event loop that ran `start`."""

    def __init__(self, config: InstanceConfig) -> None:
        self.config = config
        self.epoch = uuid.uuid4().hex
        self.status: InstanceStatus = "starting"
        self.error = ""
        self._server = RpcServer(config.host, config.port, epoch=self.epoch)
        self._thread = EngineThread(
            self._make_engine,
            on_output=lambda output: self._deliver(output.request_id, output),
            on_reservation=lambda reservation: self._deliver(reservation.request_id, reservation),
            on_failure=self._fail,
        )
        self._inboxes: dict[str, Inbox] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._manager: KVTransferManager | None = None
        self._engine: Engine | None = None
        self._num_requests = 0

    @property
    def address(self) -> str:
        """`host:port` of the RPC server."""
        return self._server.address

    async def start(self) -> None:
        """Serve at once, and load the model in the background; see `status`.

        Raises:
            AddressInUse: the configured address is taken.
        """
        self._server.serve(DESCRIBE, self._describe)
        self._server.serve(STATS, self._stats)
        if self.config.role == "hybrid":
            self._server.serve_stream(GENERATE, self._generate)
        elif self.config.role == "prefill":
            self._server.serve_stream(PREFILL, self._prefill)
        else:
            self._server.serve_stream(DECODE, self._decode)
        await self._server.start()
        self._spawn(self._load())

    async def wait_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            RemoteError: it cannot be; says why.
        """
        while self.status == "starting":
            await asyncio.gather(*self._background)
        if self.status == "failed":
            raise RemoteError(self.error)

    async def stop(self) -> None:
        """End every request, give every block back, leave no thread, socket or task behind."""
        self.status = "draining"
        await self._server.stop()
        if self._manager is not None:
            await self._manager.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._thread.stop()

    def _make_engine(self) -> Engine:
        self._runner = ModelRunner(self.config)
        return Engine(self.config, self._runner)

    async def _load(self) -> None:
        try:
            self._engine = await self._thread.start()
            if self.config.role != "hybrid":
                manager = KVTransferManager(
                    rank=self.config.kv_rank, pool=self._runner.pool, fingerprint=self._runner.fingerprint,
                    config=self.config.kv_transfer, epoch=self.epoch,
                )  # fmt: skip
                await manager.start()
                self._manager = manager
        except Exception as error:  # whatever is wrong with the model or the machine, DESCRIBE tells it
            self._fail(error)
        else:
            self.status = "ready"
            logger.info("%s: ready on %s", self.config.instance_id, self.address)

    def _fail(self, error: Exception) -> None:
        self.status, self.error = "failed", f"{type(error).__name__}: {error}"
        logger.error("%s: %s", self.config.instance_id, self.error)
        for inbox in self._inboxes.values():
            inbox.put_nowait(RemoteError(f"{self.config.instance_id} failed: {self.error}"))

    def _deliver(self, request_id: str, item: StepOutput | Reservation) -> None:
        if inbox := self._inboxes.get(request_id):
            inbox.put_nowait(item)

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ---- one request ---------------------------------------------------------------------------------------------

    def _open(self, request_id: str) -> Inbox:
        if self.status != "ready":
            reason = f": {self.error}" if self.error else ""
            raise Overloaded(f"{self.config.instance_id} is {self.status}{reason}")
        if request_id in self._inboxes:
            raise InvalidRequest(f"request_id={request_id!r} is in use")
        self._num_requests += 1
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    async def _close(self, request_id: str) -> None:
        """No transfer touches the request's blocks any more: they go back, and so does its place."""
        self._inboxes.pop(request_id, None)
        if self.status == "ready":
            await self._thread.call(lambda engine: engine.release(request_id))

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        inbox = self._open(request.request_id)
        try:
            await self._thread.call(
                lambda engine: engine.add(
                    request.request_id, request.prompt_token_ids, request.params, request.output_token_ids
                )
            )
            async for event in self._tokens(inbox):
                yield event
        finally:
            self._spawn(self._close(request.request_id))

    async def _tokens(self, inbox: Inbox) -> AsyncIterator[TokenEvent]:
        """Events until the request ends; several steps' tokens in one if the client is slow."""
        finish_reason = None
        while finish_reason is None:
            output = await inbox.next()
            index, tokens, finish_reason = output.index, _tokens_of(output), output.finish_reason
            while finish_reason is None and not inbox.empty():
                output = await inbox.next()
                tokens += _tokens_of(output)
                finish_reason = output.finish_reason
            if tokens or finish_reason:
                yield TokenEvent(index, tokens, finish_reason)

    async def _prefill(self, request: PrefillRequest) -> AsyncIterator[TokenEvent | TransferDone]:
        inbox = self._open(request.request_id)
        sending = Sending(self._require_manager(), request, self.config.block_size, inbox)
        try:
            await self._thread.call(
                lambda engine: engine.add(
                    request.request_id, request.prompt_token_ids, request.params, request.output_token_ids,
                    prefill_only=True,
                )
            )  # fmt: skip
            output = await sending.follow(inbox)
            yield TokenEvent(output.index, _tokens_of(output), output.finish_reason)
            if request.grant and output.finish_reason is None:
                result = await sending.finish(output.token_id)
                num_cached = 0
                yield TransferDone(result.num_bytes, result.num_parts, result.time_s, num_cached)
        finally:
            self._spawn(self._end_prefill(request.request_id, sending))

    async def _end_prefill(self, request_id: str, sending: "Sending") -> None:
        if await sending.abort("the request has ended") is Outcome.UNKNOWN:
            # The blocks may still be read: they stay this request's for ever, which costs less than wrong text.
            logger.warning("%s: its blocks stay held, a failed transfer may still read them", request_id)
            return
        await self._close(request_id)

    async def _decode(self, request: DecodeRequest) -> AsyncIterator[Granted | TokenEvent]:
        inbox = self._open(request.request_id)
        manager = self._require_manager()
        posted: PostedReceive | None = None
        num_blocks = 0
        try:
            await self._thread.call(
                lambda engine: engine.reserve(
                    request.request_id, request.prompt_token_ids, request.params, request.output_token_ids
                )
            )
            reservation = await inbox.next()
            num_blocks = len(reservation.block_ids)
            posted = manager.post_receive(request.transfer_id, reservation.block_ids)
            yield Granted(posted.grant, reservation.num_cached_tokens)
            first = first_token(await posted.wait())
            await self._thread.call(lambda engine: engine.activate(request.request_id, first))
            async for event in self._tokens(inbox):
                yield event
        finally:
            self._spawn(self._end_decode(request.request_id, posted, num_blocks))

    async def _end_decode(self, request_id: str, posted: PostedReceive | None, num_blocks: int) -> None:
        if posted is not None and await posted.cancel("the request has ended") is Outcome.UNKNOWN:
            await self._thread.call(lambda engine: engine.quarantine(request_id, num_blocks))
            await posted.drained()
        await self._close(request_id)

    def _require_manager(self) -> KVTransferManager:
        assert self._manager is not None, "a ready prefill or decode instance has one"
        return self._manager

    # ---- what it says of itself ----------------------------------------------------------------------------------

    async def _describe(self, _: Empty) -> InstanceInfo:
        config, engine = self.config, self._engine
        known: dict[str, Any] = {}
        if engine is not None:
            known = {
                "max_model_len": self._runner.model_config.max_model_len,
                "max_prompt_len": engine.max_prompt_len,
                "vocab_size": self._runner.model_config.vocab_size,
                "num_blocks": engine.blocks.num_blocks,
                "device": str(self._runner.device),
                "dtype": str(self._runner.dtype).removeprefix("torch."),
            }
        return InstanceInfo(
            config.instance_id, config.role, self.epoch, self.status, model=config.model_path,
            block_size=config.block_size, kv_backend=config.kv_transfer.backend if config.role != "hybrid" else "",
            pid=os.getpid(), error=self.error, **known,
        )  # fmt: skip

    async def _stats(self, _: Empty) -> InstanceStats:
        engine = self._thread.stats
        transfers: dict[str, Any] = {}
        if self._manager is not None:
            kv = self._manager.stats()
            transfers = {
                "active_transfers": kv.active_transfers,
                "buffered_bytes": kv.buffered_bytes,
                "kv_bytes_sent": kv.bytes_sent,
                "kv_bytes_received": kv.bytes_received,
                "kv_transfer_time_s": kv.busy_time_s,
                "failed_transfers": kv.num_failed,
                "dropped_messages": kv.dropped_messages,
            }
        return InstanceStats(
            self.config.instance_id, self.config.role, self.status, self.epoch,
            active_requests=len(self._inboxes), waiting_requests=engine.num_waiting,
            running_requests=engine.num_running, num_blocks=engine.num_blocks, free_blocks=engine.num_free_blocks,
            quarantined_blocks=engine.num_quarantined_blocks, total_requests=self._num_requests,
            generated_tokens=engine.num_generated_tokens, prefill_tokens=engine.num_prefill_tokens,
            cached_tokens=engine.num_cached_tokens, preemptions=engine.num_preemptions, **transfers,
        )  # fmt: skip


def _tokens_of(output: StepOutput) -> list[int]:
    return [] if output.token_id is None else [output.token_id]
