"""Reports of an instance on itself: its description, its figures, and how much it was given by whom."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.engine import Engine
from hbserve_core.engine.step import EngineStats, Runner
from hbserve_core.instance.instance_stats import instance_info, instance_stats
from hbserve_core.transfers.instance_transfers import InstanceTransfers
from hbserve_rpc import calling_peer
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
    """What is looked at: a GpuInstance."""

    config: InstanceConfig
    epoch: str
    started_as: Role
    status: InstanceStatus
    error: str
    engine: Engine | None
    runner: Runner | None
    transfers: InstanceTransfers | None
    num_requests: int
    loop_lag: LoopLag

    @property
    def num_active(self) -> int: ...

    @property
    def engine_stats(self) -> EngineStats: ...


class Reports:
    """Answers DESCRIBE, STATS and REPORTS of one instance. Belongs to its event loop."""

    def __init__(self, instance: Reported) -> None:
        self._instance = instance
        self._given: dict[str, tuple[bytes, int, int]] = {}
        """Requests by their ids: who gave it, how many choices it has, and how many tokens came with it."""
        self._news = asyncio.Event()

    def begin(self, request: GenerateRequest | PrefillRequest | DecodeRequest) -> None:
        """A request has come from whoever asks now."""
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        self._given[request.request_id] = calling_peer().connection, request.params.n, num_tokens

    def end(self, request_id: str) -> None:
        """It holds nothing any more."""
        self._given.pop(request_id, None)

    @property
    def num_tokens(self) -> int:
        """That came with the requests which it has."""
        return sum(tokens for _, _, tokens in self._given.values())

    def tell(self) -> None:
        """Its status is another: whoever hears its reports hears so at once."""
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, request: ReportsRequest) -> AsyncGenerator[InstanceInfo | InstanceReport]:
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
            # It is late by something in every second, which is no news by itself.
            if told != (told := (msgspec.structs.replace(stats, loop_lag=None), sums)):
                yield InstanceReport(stats, *sums)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.interval_s):
                    await news.wait()

    async def describe(self, _: Empty) -> InstanceInfo:
        instance = self._instance
        receives = instance.transfers is not None and instance.config.role == "decode"
        return instance_info(
            instance.config,
            instance.engine,
            instance.runner,
            epoch=instance.epoch,
            status=instance.status,
            kv_endpoint=instance.transfers.endpoint if instance.transfers is not None and receives else b"",
            error=instance.error,
            serves_generate=instance.config.role != "prefill",
            started_as=instance.started_as if instance.started_as != instance.config.role else None,
        )

    async def stats(self, _: Empty) -> InstanceStats:
        instance = self._instance
        return instance_stats(
            instance.engine_stats,
            None if instance.transfers is None else await instance.transfers.stats(),
            instance_id=instance.config.instance_id,
            role=instance.config.role,
            status=instance.status,
            epoch=instance.epoch,
            active_requests=instance.num_active,
            total_requests=instance.num_requests,
            loop_lag=instance.loop_lag.histogram,
        )
