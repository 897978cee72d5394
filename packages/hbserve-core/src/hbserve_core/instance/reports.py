"""Reports of an instance on itself: its description, its figures, and how much work each client has given it."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.engine import Engine
from hbserve_core.engine.step import EngineStats, Runner
from hbserve_core.transfers.instance_transfers import InstanceTransfers
from hbserve_kv import TransferStats
from hbserve_rpc import RpcServer, calling_peer
from hbserve_rpc.counts import RpcFaults
from hbserve_rpc.loop_lag import LoopLag
from hbserve_rpc.messages import (
    DecodeRequest,
    Empty,
    GenerateRequest,
    InstanceInfo,
    InstanceStats,
    InstanceStatus,
    PrefillRequest,
    Role,
)
from hbserve_rpc.reports import InstanceReport, ReportsRequest


class Reported(Protocol):
    """Part of a GpuInstance that its reports need."""

    config: InstanceConfig
    epoch: str
    started_as: Role
    status: InstanceStatus
    error: str
    engine: Engine | None
    runner: Runner | None
    transfers: InstanceTransfers | None
    loop_lag: LoopLag

    @property
    def num_active(self) -> int: ...

    @property
    def engine_stats(self) -> EngineStats: ...


class Reports:
    """Handlers of one instance's DESCRIBE, STATS and REPORTS. Belong to its event loop."""

    def __init__(self, instance: Reported, server: RpcServer) -> None:
        """server: the RPC server through which others ask the instance."""
        self._instance, self._server = instance, server
        self._given: dict[str, tuple[bytes, int, int]] = {}
        """Requests by their ids: the connection of the client that gave it, its number of choices, and the number of
        tokens that came with it."""
        self._num_requests = 0
        """Number of requests that have ever come."""
        self._news = asyncio.Event()
        """Event that is set, and replaced, when followers of the reports are not to wait for the end of their
        interval."""

    def begin(self, request: GenerateRequest | PrefillRequest | DecodeRequest) -> None:
        """Count a request that comes from the caller being served."""
        self._num_requests += 1
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        self._given[request.request_id] = calling_peer().connection, request.params.n, num_tokens

    def end(self, request_id: str) -> None:
        """Forget a request, which holds nothing any more."""
        self._given.pop(request_id, None)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that came with the requests that the instance has."""
        return sum(tokens for _, _, tokens in self._given.values())

    def tell(self) -> None:
        """Report a new status at once."""
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, request: ReportsRequest) -> AsyncGenerator[InstanceInfo | InstanceReport]:
        """Yield what has changed every `interval_s`, or when `tell` is called. This is the handler of REPORTS."""
        client = calling_peer().connection
        info: InstanceInfo | None = None
        told: tuple[InstanceStats, tuple[int, int]] | None = None
        while True:
            news = self._news
            if info != (info := await self.describe(Empty())):
                yield info
            others = [each for each in self._given.values() if each[0] != client]
            sums = sum(each[1] for each in others), sum(each[2] for each in others)
            stats = await self.stats(Empty())
            # The loop is late by a little in every second, which is no news by itself.
            if told != (told := (msgspec.structs.replace(stats, loop_lag=None), sums)):
                yield InstanceReport(stats, *sums)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.interval_s):
                    await news.wait()

    async def describe(self, _: Empty) -> InstanceInfo:
        instance, config = self._instance, self._instance.config
        engine, runner, transfers = instance.engine, instance.runner, instance.transfers
        info = InstanceInfo(
            config.instance_id,
            config.role,
            epoch=instance.epoch,
            status=instance.status,
            model=config.model_path,
            block_size=config.block_size,
            kv_backend=config.kv_transfer.backend if config.role != "hybrid" else "",
            kv_endpoint=transfers.endpoint if transfers is not None and config.role == "decode" else b"",
            pid=os.getpid(),
            error=instance.error,
            serves_generate=config.role != "prefill",
            started_as=instance.started_as if instance.started_as != config.role else None,
        )
        if engine is None or runner is None:  # what it can do is not known yet
            return info
        return msgspec.structs.replace(
            info,
            max_model_len=runner.model_config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_prompt_len=engine.limits.max_prompt_len,
            vocab_size=runner.model_config.vocab_size,
            num_blocks=engine.blocks.num_blocks,
            device=str(runner.device),
            dtype=str(runner.dtype).removeprefix("torch."),
        )

    async def stats(self, _: Empty) -> InstanceStats:
        instance = self._instance
        engine = instance.engine_stats
        moved = TransferStats() if instance.transfers is None else await instance.transfers.stats()
        return InstanceStats(
            instance_id=instance.config.instance_id,
            role=instance.config.role,
            status=instance.status,
            epoch=instance.epoch,
            active_requests=instance.num_active,
            total_requests=self._num_requests,
            loop_lag=instance.loop_lag.histogram,
            waiting_requests=engine.num_waiting,
            running_requests=engine.num_running,
            num_blocks=engine.num_blocks,
            free_blocks=engine.num_free_blocks,
            cached_blocks=engine.num_cached_blocks,
            reserved_blocks=engine.num_reserved_blocks,
            quarantined_blocks=engine.num_quarantined_blocks,
            generated_tokens=engine.num_generated_tokens,
            prefill_tokens=engine.num_prefill_tokens,
            cached_tokens=engine.num_cached_tokens,
            preemptions=engine.num_preemptions,
            iteration_tokens=engine.iteration_tokens,
            active_transfers=moved.active_transfers,
            buffered_bytes=moved.buffered_bytes,
            kv_bytes_sent=moved.bytes_sent,
            kv_bytes_received=moved.bytes_received,
            kv_transfer_time_s=moved.busy_time_s,
            failed_transfers=moved.num_failed,
            dropped_messages=moved.dropped_messages,
            rpc=self._server.faults + RpcFaults(moved.dropped_frames, moved.failed_notifications),
        )
