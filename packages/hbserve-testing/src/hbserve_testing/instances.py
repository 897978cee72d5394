"""Instances as a scheduler sees them: an address that takes prefill, decode or hybrid requests."""

import asyncio
import sys
from collections.abc import AsyncIterable, Sequence
from typing import Any

import msgspec

from hbserve_core import GpuInstance, InstanceConfig
from hbserve_rpc import RpcClient, RpcStream, SamplingParams
from hbserve_rpc.messages import (
    DECODE,
    DESCRIBE,
    GENERATE,
    GRANT,
    PREFILL,
    STATS,
    DecodeRequest,
    Empty,
    GenerateRequest,
    Granted,
    GrantRequest,
    InstanceStats,
    PrefillRequest,
    TokenEvent,
    TransferDone,
)
from hbserve_testing.narrowing import of_type

DEADLINE_S = 60.0


class InstanceClient:
    """A client of one instance, which is in this process or another one."""

    params = SamplingParams(0, 6, ignore_eos=True)
    """Sampling parameters of requests that bring none."""

    def __init__(self, address: str, *, server: GpuInstance | None = None, process: Any = None) -> None:
        """Pass `server` if the instance is in this process, or `process` if it is in another one."""
        self.client = RpcClient(address, heartbeat_interval_s=0.2, heartbeat_timeout_s=DEADLINE_S)
        self.server: Any = server
        self.process: Any = process

    def decode(
        self, name: str, ids: Sequence[int], params: SamplingParams | None = None
    ) -> "RpcStream[Granted | TokenEvent]":
        request = DecodeRequest(name, f"t-{name}", (*ids,), params or self.params)
        return self.client.stream(DECODE, request, timeout_s=DEADLINE_S)

    def prefill(
        self,
        name: str,
        ids: Sequence[int],
        grant: bytes,
        params: SamplingParams | None = None,
        output: Sequence[int] = (),
    ) -> "RpcStream[TokenEvent | TransferDone]":
        request = PrefillRequest(name, f"t-{name}", (*ids,), params or self.params, grant, [*output])
        return self.client.stream(PREFILL, request, timeout_s=DEADLINE_S)

    def prefill_before_grant(
        self, name: str, ids: Sequence[int], params: SamplingParams | None = None
    ) -> "RpcStream[TokenEvent | TransferDone]":
        request = PrefillRequest(name, f"t-{name}", (*ids,), params or self.params, grant_follows=True)
        return self.client.stream(PREFILL, request, timeout_s=DEADLINE_S)

    def grant(self, name: str, grant: bytes) -> None:
        self.client.notify(GRANT, GrantRequest(name, grant))

    async def hybrid(self, name: str, ids: Sequence[int], params: SamplingParams | None = None) -> list[int]:
        """Return all tokens of a request that this instance computes alone."""
        request = GenerateRequest(name, (*ids,), params or self.params)
        events = self.client.stream(GENERATE, request, timeout_s=DEADLINE_S)
        return await tokens_of(events)

    async def stats(self) -> InstanceStats:
        return await self.client.call(STATS, Empty(), timeout_s=DEADLINE_S)

    async def is_ready(self) -> bool:
        info = await self.client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
        assert info.status != "failed", info.error
        return info.status == "ready"

    async def is_empty(self) -> bool:
        """Whether the instance holds nothing of any request."""
        s = await self.stats()
        gauges = s.active_requests, s.waiting_requests, s.running_requests, s.active_transfers, s.quarantined_blocks
        return gauges == (0,) * 5 and s.free_blocks == s.num_blocks

    async def killed(self) -> None:
        """Kill the instance's process, unless it has ended already, and wait for its end."""
        if self.process.returncode is None:
            self.process.kill()
        async with asyncio.timeout(DEADLINE_S):
            await self.process.communicate()


async def tokens_of(events: AsyncIterable[object]) -> list[int]:
    """Return all tokens of the remaining events, which must all be TokenEvents."""
    return [token async for event in events for token in of_type(TokenEvent, event).token_ids]


async def start_process(config: InstanceConfig, command: Sequence[str] = ("-m", "hbserve_core")) -> tuple[Any, str]:
    """Start an instance in a process of its own. Returns the process, which the caller must end, and the address."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        async with asyncio.timeout(DEADLINE_S):
            line = await process.stdout.readline()
        return process, msgspec.json.decode(line)["address"]
    except BaseException:
        process.kill()
        await process.wait()
        raise
