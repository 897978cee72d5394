"""Processor time of the scheduler itself: to take in, abort and refuse requests, and to bring one through.

    python benchmarks/scheduler_cost.py

Instances are objects that answer at once, in the same event loop. So the figures are the scheduler's own work, and that
of the event loop for it.
"""

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from hbserve_rpc import Overloaded, SamplingParams
from hbserve_rpc.messages import (
    CACHED_PREFIXES,
    CONNECT,
    DECODE,
    PREFILL,
    CachedPrefixes,
    Empty,
    GenerateRequest,
    Granted,
    InstanceInfo,
    InstanceStats,
    Role,
    TokenEvent,
    TransferDone,
)
from hbserve_rpc.prompt_shape import shape_of
from hbserve_rpc.reports import REPORTS, InstanceReport
from hbserve_scheduler import CpuScheduler, EventStream, SchedulerConfig
from hbserve_scheduler.instance_client import InstanceStream

ROUNDS = 5
"""Number of rounds, of which each figure is the best. Other work makes processor time larger, and never smaller."""
BLOCK_SIZE = 16
PARAMS = SamplingParams(0, 2, ignore_eos=True)


class StubClient:
    """Replacement of an RpcClient: an instance that answers at once."""

    problem = ""

    def __init__(self, address: str, **_settings: object) -> None:
        self.role: Role = "prefill" if address.startswith("p") else "decode"
        self.instance_id, _, _ = address.partition(":")

    async def start(self) -> None: ...

    async def close(self, why: str = "") -> None: ...

    async def call(self, method: Any, request: Any, *, timeout_s: float) -> Any:
        if method is CONNECT:
            return Empty()
        if method is CACHED_PREFIXES:  # what `request_cost` has set stays
            return CachedPrefixes(0)
        return self._stats()

    def _info(self) -> InstanceInfo:
        endpoint = b"here" if self.role == "decode" else b""
        return InstanceInfo(
            self.instance_id, self.role, self.instance_id, "ready", max_model_len=1 << 20, max_prompt_len=1 << 20,
            vocab_size=1 << 17, num_blocks=1 << 20, block_size=BLOCK_SIZE, max_num_seqs=1 << 10,
            kv_endpoint=endpoint,
        )  # fmt: skip

    def _stats(self) -> InstanceStats:
        return InstanceStats(self.instance_id, self.role, "ready", self.instance_id)

    def stream(self, method: Any, request: Any) -> "StubStream":
        if method is REPORTS:
            return StubStream([self._info(), InstanceReport(self._stats())], ends=False)
        return StubStream(PREFILL_EVENTS if method is PREFILL else DECODE_EVENTS if method is DECODE else [])


PREFILL_EVENTS = [TokenEvent(0, [5]), TransferDone(0, 1, 0.0)]
DECODE_EVENTS = [Granted(b"grant"), TokenEvent(1, [6], "length")]


class StubStream(InstanceStream[Any]):
    def __init__(self, events: list[Any], *, ends: bool = True) -> None:
        self._events = iter(events)
        self._ends = ends

    async def __anext__(self) -> Any:
        try:
            return next(self._events)
        except StopIteration:
            if not self._ends:
                await asyncio.Event().wait()
            raise StopAsyncIteration from None

    async def __aenter__(self) -> "StubStream":
        return self

    async def __aexit__(self, *_: object) -> None: ...


@contextlib.asynccontextmanager
async def scheduling(
    num_instances: int, client: Callable[..., Any] = StubClient, **settings: Any
) -> AsyncIterator[CpuScheduler]:
    """Run a scheduler with so many instances, half of them of each role, all connected. With 0, no instance is
    started."""
    scheduler = CpuScheduler(SchedulerConfig(heartbeat_interval_s=600, **settings), client_factory=client)
    for i in range(num_instances):
        role: Role = "decode" if i % 2 else "prefill"
        await scheduler.add_instance(f"{role[0]}{i}", role, f"{role[0]}{i}:1")
    await scheduler.start()
    await scheduler.wait_ready(60)
    handles = scheduler.fleet.handles.values()
    while not all(handle.links for handle in handles if handle.role == "prefill"):  # noqa: ASYNC110  no event says so
        await asyncio.sleep(0.01)
    try:
        yield scheduler
    finally:
        await scheduler.stop()


def new_requests(prefix: str, count: int, num_tokens: int = 16, block_size: int = 0) -> list[GenerateRequest]:
    """Make requests as entries submit them, with the shape of the prompt, which they have already computed."""
    prompt = tuple(range(1, 1 + num_tokens))
    shape = shape_of(prompt, block_size)
    return [GenerateRequest(f"{prefix}{i}", prompt, PARAMS, shape=shape) for i in range(count)]


def microseconds(job: Callable[[], object], count: int) -> float:
    began_s = time.process_time()
    job()
    return (time.process_time() - began_s) / count * 1e6


async def queue_cost(num_waiting: int, count: int) -> dict[str, float]:
    """Return the microseconds to submit, to abort and to refuse one request while so many wait because there is no
    instance."""
    best = {"submit": 1e9, "abort": 1e9, "refuse": 1e9}
    async with scheduling(0, max_queue_size=num_waiting + count) as scheduler:
        streams = [scheduler.submit(request) for request in new_requests("before", num_waiting)]
        for number in range(ROUNDS):
            requests, refused = new_requests(f"{number}-", count), new_requests("more", count)
            best["submit"] = min(best["submit"], microseconds(partial(submit_all, scheduler, requests, streams), count))
            best["refuse"] = min(best["refuse"], microseconds(partial(refuse_all, scheduler, refused), count))
            began_s = time.process_time()
            for request in reversed(requests):
                await scheduler.abort(request.request_id)
            best["abort"] = min(best["abort"], (time.process_time() - began_s) / count * 1e6)
    return best


def submit_all(scheduler: CpuScheduler, requests: list[GenerateRequest], streams: list[EventStream]) -> None:
    streams.extend(map(scheduler.submit, requests))


def refuse_all(scheduler: CpuScheduler, requests: list[GenerateRequest]) -> None:
    for request in requests:
        try:
            scheduler.submit(request)
        except Overloaded:
            continue
        raise AssertionError("the queue is full, and takes another")


async def request_cost(num_instances: int, num_tokens: int, count: int, policy: str) -> float:
    """Return the microseconds of one request from `submit` to its end."""
    best = 1e9
    async with scheduling(num_instances, prefill_policy=policy, decode_policy=policy) as scheduler:
        for handle in scheduler.fleet.handles.values():  # all have the half of every prompt: the most that can be found
            scheduler.fleet.prefixes.set(handle, shape_of([*range(1, 1 + num_tokens // 2)], BLOCK_SIZE).digests)
        for number in range(ROUNDS):
            requests = new_requests(f"{number}-", count, num_tokens, scheduler.digest_block_size)
            began_s = time.process_time()
            await asyncio.gather(*(drain(scheduler, request) for request in requests))
            best = min(best, (time.process_time() - began_s) / count * 1e6)
    return best


async def drain(scheduler: CpuScheduler, request: GenerateRequest) -> None:
    async for _ in scheduler.submit(request):
        pass


async def measure(waiting: list[int], fleets: list[int], prompts: list[int], count: int, policy: str) -> None:
    for num_waiting in waiting:
        costs = await queue_cost(num_waiting, count)
        print(f"{num_waiting:6} waiting: " + ", ".join(f"{what} {us:.1f} us" for what, us in costs.items()))
    for num_tokens in prompts:
        for num_instances in fleets:
            cost_us = await request_cost(num_instances, num_tokens, count, policy)
            print(f"{num_instances:6} instances, prompts of {num_tokens}: {cost_us:.0f} us a request")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 4000, 20000])
    parser.add_argument("--instances", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 1000, 16000])
    parser.add_argument("--policy", default=SchedulerConfig().prefill_policy, help="of both roles")
    parser.add_argument("--count", type=int, default=400, help="requests of each measurement")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.waiting, arguments.instances, arguments.prompts, arguments.count, arguments.policy))


if __name__ == "__main__":
    main()
