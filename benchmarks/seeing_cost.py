"""Cost of records, metrics and the log line of each request: by token, by request, and for 256 streams.

    python benchmarks/seeing_cost.py

The streams go through a scheduler whose instances answer at once (see scheduler_cost.py), with all of it on and with
none of it, in turn. The ratio is of the scheduler's own processor time, which is a small part of a server's.
Then they go through two API servers (see api_server.py) over one mock engine, one with all of it and one with none, in
turn. The ratio of their processor times is what a client pays; the bar is 1.01.
"""

import argparse
import asyncio
import contextlib
import io
import logging
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from api_server import cpu_s, serve_api, stream
from mock_instances import started
from scheduler_cost import StubClient, StubStream, scheduling

from hbserve.server.http.http_figures import HttpFigures
from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import DECODE, PREFILL, GenerateRequest, Granted, TokenEvent, TransferDone
from hbserve_rpc.prompt_shape import shape_of
from hbserve_scheduler.figures import Figures
from hbserve_scheduler.request import ScheduledRequest

NUM_TOKENS, NUM_STREAMS, NUM_PAIRS, ROUNDS = 128, 256, 15, 7
SERVED_TOKENS, SERVED_RATE = 200, 12_000
PARAMS = SamplingParams(0, NUM_TOKENS, ignore_eos=True)
PROMPT = tuple(range(1, 65))


class Streaming(StubClient):
    """Instances that answer with NUM_TOKENS tokens, one message each."""

    def stream(self, method: Any, request: Any) -> StubStream:
        if method is PREFILL:
            return StubStream([TokenEvent(0, [5]), TransferDone(4096, 1, 0.001)])
        if method is not DECODE:
            return super().stream(method, request)
        tokens = [TokenEvent(i, [6], "length" if i + 1 == NUM_TOKENS else None) for i in range(1, NUM_TOKENS)]
        return StubStream([Granted(b"grant"), *tokens])


def request(name: str) -> GenerateRequest:
    return GenerateRequest(name, PROMPT, PARAMS, shape=shape_of(PROMPT))


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Switch all counting, recording and logging off, except the timings that clients get."""
    with (
        patch.object(Figures, "add", lambda self, record: None),
        patch.object(ScheduledRequest, "count", lambda self: None),
        patch.object(HttpFigures, "add", lambda self, *request: None),
    ):
        yield


async def answer_all(scheduler: Any, number: int) -> float:
    """Return the processor time of NUM_STREAMS streams at once."""

    async def read(events: Any) -> None:
        async for _ in events:
            pass

    began_s = time.process_time()
    await asyncio.gather(*(read(scheduler.submit(request(f"{number}-{i}"))) for i in range(NUM_STREAMS)))
    return time.process_time() - began_s


async def of_streams() -> float:
    """Return the median ratio of neighbouring runs: processor time with all of it, divided by that without."""
    ratios = []
    async with scheduling(4, Streaming, max_inflight_prefills=1024, max_pending_reservations=1024) as scheduler:
        await answer_all(scheduler, -1)
        for number in range(NUM_PAIRS):
            seen_s = await answer_all(scheduler, 2 * number)
            with unseen():
                unseen_s = await answer_all(scheduler, 2 * number + 1)
            ratios.append(seen_s / unseen_s)
    return statistics.median(ratios)


async def by_token_and_request() -> tuple[float, float]:
    """Return the microseconds that each token costs in the figures, and that the end of a request costs besides."""
    by_token = by_request = 1e9
    http = HttpFigures()
    for _ in range(ROUNDS):
        figures = Figures()
        entries = [ScheduledRequest(request(str(i)), figures) for i in range(200)]
        for entry in entries:
            for i in range(NUM_TOKENS):
                entry.deliver(TokenEvent(i, [6], "length" if i + 1 == NUM_TOKENS else None))
        began_s = time.process_time()
        for entry in entries:
            entry.count()
        counted_s = time.process_time()
        for entry in entries:
            figures.add(entry.record())
            http.add("POST", None, 200, 0.5, 100, 1000)
        ended_s = time.process_time()
        by_token = min(by_token, (counted_s - began_s) / len(entries) / NUM_TOKENS * 1e6)
        by_request = min(by_request, (ended_s - counted_s) / len(entries) * 1e6)
    return by_token, by_request


async def through_servers(core: int) -> float:
    """Return the median ratio of neighbouring runs at SERVED_RATE tokens/s: processor time of the server that sees,
    divided by that of the other one. Both are on one core, and everything else is on the others."""
    engine = [str(Path(__file__).parent / "api_server.py"), "--role", "engine"]
    others = os.sched_getaffinity(0) - {core} or {core}
    with started(*engine, core=min(others)) as (_, (address,)), contextlib.ExitStack() as servers:
        ports, pids = [], []
        for role in ("seen", "unseen"):
            pid, (url,) = servers.enter_context(started(__file__, "--role", role, "--address", address, core=core))
            pids.append(pid)
            ports.append(int(url.rpartition(":")[2]))
        os.sched_setaffinity(0, others)

        async def load(which: int) -> float:
            began_s, ms_a_token = cpu_s(pids[which]), round(1000 * NUM_STREAMS / SERVED_RATE)
            await asyncio.gather(*(stream(ports[which], SERVED_TOKENS, ms_a_token) for _ in range(NUM_STREAMS)))
            return cpu_s(pids[which]) - began_s

        ratios = []
        for number in range(-1, NUM_PAIRS):  # the first one compiles and fills caches
            first = number % 2  # neither is always the one that follows the other
            used_s = {which: await load(which) for which in (first, 1 - first)}
            if number >= 0:
                ratios.append(used_s[0] / used_s[1])
    print("ratios: " + " ".join(f"{ratio:.3f}" for ratio in sorted(ratios)))
    return statistics.median(ratios)


async def serve(role: str, address: str) -> None:
    """Run an API server whose log lines are written nowhere."""
    logging.basicConfig(level=logging.INFO, handlers=[logging.FileHandler(os.devnull)])
    with contextlib.nullcontext() if role == "seen" else unseen():
        await serve_api({"mock-0": ("hybrid", address)})


async def main() -> None:
    logging.basicConfig(level=logging.INFO, handlers=[logging.StreamHandler(io.StringIO())])
    logging.getLogger("hbserve_scheduler.instances").setLevel(logging.WARNING)
    by_token, by_request = await by_token_and_request()
    print(f"a token {by_token:.3f} us, a request {by_request:.1f} us, its line at INFO written")
    print(f"{NUM_STREAMS} streams of {NUM_TOKENS} tokens: scheduler {await of_streams():.4f} times as long")
    through = await through_servers(min(os.sched_getaffinity(0)))
    print(f"{NUM_STREAMS} streams of {SERVED_TOKENS} tokens through the API server: {through:.4f} times as long")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=["seen", "unseen"], help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.role, arguments.address) if arguments.role else main())
