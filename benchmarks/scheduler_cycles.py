"""Memory of a scheduler whose clients leave at once, in the middle or by a deadline, or vanish.

    python benchmarks/scheduler_cycles.py [--cycles 50000] [--disconnects 3000]

The scheduler and an instance that answers at once are one process. Clients submit a request and leave: before the first
token, after it, by the request's own deadline, or without a word, as a killed process does. Memory, files, threads and
tasks of that process must be as before. The first fifth of the cycles is not counted: it makes what is made once.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from mock_instances import mock_instance, started

from hbserve_rpc import HBServeRpcError, Method, RpcClient, SamplingParams, own_process
from hbserve_rpc.messages import GENERATE, Empty, GenerateRequest, TokenEvent
from hbserve_scheduler import CpuScheduler, HBServeSchedulerError, RemoteScheduler, SchedulerConfig, SchedulerServer

MOST_GROWTH_MIB, MOST_FILES = 8.0, 8
AT_ONCE = 50
PROMPT = tuple(range(3, 60))


class State(msgspec.Struct, frozen=True, tag=True):
    mib: float
    files: int
    threads: int
    tasks: int
    requests: int
    clients: int


STATE: Method[Empty, State] = Method("bench.state", Empty, State)


def rss_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) / 1024


async def serve() -> None:
    async def generate(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        for index in range(request.params.max_tokens):
            yield TokenEvent(index, [5], "length" if index == request.params.max_tokens - 1 else None)
            await asyncio.sleep(0.005)

    async def state(_: Empty) -> State:
        mib = rss_mib()
        files, threads = (len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task"))
        requests = len(scheduler.running_requests) + len(scheduler.waiting_requests)
        clients = len(server._server._clients)
        return State(mib, files, threads, len(asyncio.all_tasks()), requests, clients)

    sizes = {"max_model_len": 4096, "max_num_seqs": 256, "max_prompt_len": 4096, "vocab_size": 1000}
    instance = mock_instance("h", "hybrid", drops_closed=True, block_size=16, num_blocks=4096, **sizes)
    instance.serve(STATE, state)
    instance.serve_stream(GENERATE, generate)
    await instance.start()
    scheduler = CpuScheduler(SchedulerConfig(port=0))
    server = SchedulerServer(scheduler)
    await server.start()
    await scheduler.add_instance("h", "hybrid", instance.address)
    await scheduler.wait_ready(60)
    print(server.address, instance.address, flush=True)
    await asyncio.Event().wait()


async def cycle(scheduler: RemoteScheduler, number: int, dice: random.Random) -> None:
    """Send one request, and leave it in one of several ways."""
    way = dice.randrange(5)
    params = SamplingParams(max_tokens=1 + dice.randrange(3), ignore_eos=True, timeout_s=0.001 if way == 3 else None)
    request = GenerateRequest(f"r{number}", PROMPT, params)
    events = scheduler.submit(request)
    with contextlib.suppress(HBServeRpcError, HBServeSchedulerError, TimeoutError):
        if way == 0:
            async with asyncio.timeout(0.0005):
                await anext(events)
        elif way == 1:
            await anext(events)
            await scheduler.abort(request.request_id)
        elif way != 2:
            async for _ in events:
                pass
        else:
            await anext(events)
    await events.aclose()


async def vanish(address: str, number: int) -> None:
    """Be a client that sends a request, and vanishes without a message."""
    scheduler = RemoteScheduler(address, heartbeat_timeout_s=1.0)
    await scheduler.start()
    events = scheduler.submit(GenerateRequest(f"v{number}", PROMPT, SamplingParams(max_tokens=50, ignore_eos=True)))
    with contextlib.suppress(HBServeRpcError):
        await anext(events)
    scheduler._client._socket.close()
    await scheduler.stop()


async def settled(watching: RpcClient, most_tasks: float) -> State:
    """Wait until there are no requests, the last vanished client has been noticed, and what ended has been cleared
    away; or until that takes too long. Returns the state then."""
    for _ in range(100):
        state = await watching.call(STATE, Empty(), timeout_s=60)
        if not state.requests and state.clients <= 1 and state.tasks <= most_tasks:
            break
        await asyncio.sleep(0.2)
    return state


async def run(addresses: list[str], cycles: int, disconnects: int) -> bool:
    dice = random.Random(1)
    states: list[State] = []
    scheduler = RemoteScheduler(addresses[0])
    await scheduler.start()
    async with RpcClient(addresses[1]) as watching:
        print("         MiB  files  threads  tasks  requests")
        for fifth in range(6):
            numbers = range(fifth * cycles // 6, (fifth + 1) * cycles // 6)
            for start in range(numbers.start, numbers.stop, AT_ONCE):
                await asyncio.gather(
                    *(cycle(scheduler, number, dice) for number in range(start, min(start + AT_ONCE, numbers.stop)))
                )
            vanishing = range(fifth * disconnects // 6, (fifth + 1) * disconnects // 6)
            for start in range(vanishing.start, vanishing.stop, AT_ONCE):
                some = range(start, min(start + AT_ONCE, vanishing.stop))
                await asyncio.gather(*(vanish(addresses[0], number) for number in some))
            most_tasks = states[0].tasks + MOST_FILES if states else 2 * MOST_FILES
            states.append(await settled(watching, most_tasks))
            last = states[-1]
            print(f"{last.mib:12.1f} {last.files:6d} {last.threads:8d} {last.tasks:6d} {last.requests:9d}", flush=True)
    await scheduler.stop()
    first = states[0]
    is_well = (
        last.mib - states[1].mib < MOST_GROWTH_MIB
        and last.files - first.files <= MOST_FILES
        and (last.threads, last.requests) == (first.threads, 0)
        and last.tasks - first.tasks <= MOST_FILES
    )
    print("well" if is_well else "NOT as it must be")
    return is_well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50_000)
    parser.add_argument("--disconnects", type=int, default=3_000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    own_process.set_up()
    if arguments.serve:
        logging.disable(logging.WARNING)  # a line for each request that fails, as most of these do
        asyncio.run(serve())
        return
    with started(__file__, "--serve") as (_, addresses):
        is_well = asyncio.run(run(addresses, arguments.cycles, arguments.disconnects))
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
