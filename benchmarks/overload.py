"""Twice the load that a deployment sustains, over HTTP with default settings: the requests that are refused, how soon,
and how long the others wait.

    python benchmarks/overload.py                       60 s at twice the load
    python benchmarks/overload.py --load 4 --seconds 30 --max-queue-time 10

The front end of `hbserve serve` is a process. A prefill and a decode instance are another one, in which a step takes a
fixed time and nothing is computed. Requests arrive at random (Poisson), whether others are answered or not.

    refused      time from a request's first byte to the answer 503; the bar is 50 ms at p99
    TTFT         time to the first token of accepted requests; the bar at p99 is max_queue_time_s and "prefill", which
                 is the time of the prompts that a prefill instance may have at once, and of the request's own
    normal       time from the end of the load until requests, one after the other, have at most twice the TTFT of an
                 idle deployment again; the bar is max_queue_time_s + 2 s
"""

import argparse
import asyncio
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from api_server import serve_api
from mock_instances import LIMITS, mock_instance, serve_until_killed, started

from hbserve_rpc import RpcServer
from hbserve_rpc.messages import (
    CONNECT,
    DECODE,
    GRANT,
    PREFILL,
    ConnectRequest,
    DecodeRequest,
    Empty,
    Granted,
    GrantRequest,
    PrefillRequest,
    Role,
    TokenEvent,
    TransferDone,
)
from hbserve_scheduler import SchedulerConfig

PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 16
PREFILL_TOKENS_PER_S = 20_000.0
STEP_S = 0.02
"""Time of each step of the decode instance, whatever is in it."""
SUSTAINED_PER_S = PREFILL_TOKENS_PER_S / PROMPT_TOKENS
PROMPT = "[" + ", ".join(str(1000 + i) for i in range(PROMPT_TOKENS)) + "]"
RUN = 10
"""Number of requests in a run of `normal_again`, one after the other, at about half of the sustained load."""
REFUSED_MS, NORMAL_S = 50.0, 2.0
"""Most time for a refusal, and until all is normal again in addition to max_queue_time_s."""


class Instances:
    """A prefill and a decode instance without an engine."""

    def __init__(self) -> None:
        self._free_at_s = 0.0
        """Time at which all prompts that have arrived will be computed."""

    def servers(self) -> list[RpcServer]:
        """Return the servers of both instances."""
        sizes: dict[str, Any] = {"block_size": 16, "num_blocks": 1 << 20, "max_num_seqs": 1 << 10}
        prefill = mock_instance("prefill-0", "prefill", **LIMITS, **sizes)
        prefill.serve_stream(PREFILL, self._prefill)
        prefill.serve(CONNECT, self._connect)
        prefill.serve_notification(GRANT, self._grant)
        decode = mock_instance("decode-0", "decode", kv_endpoint=b"here", **LIMITS, **sizes)
        decode.serve_stream(DECODE, self._decode)
        return [prefill, decode]

    def _grant(self, _: GrantRequest) -> None: ...

    async def _connect(self, _: ConnectRequest) -> Empty:
        return Empty()

    async def _prefill(self, request: PrefillRequest) -> AsyncIterator[TokenEvent | TransferDone]:
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(now_s, self._free_at_s) + len(request.prompt_token_ids) / PREFILL_TOKENS_PER_S
        await asyncio.sleep(self._free_at_s - now_s)
        yield TokenEvent(0, [1000])
        yield TransferDone(1, 1, 0.0)

    async def _decode(self, request: DecodeRequest) -> AsyncIterator[Granted | TokenEvent]:
        yield Granted(b"grant")
        for index in range(1, request.params.max_tokens):
            await asyncio.sleep(STEP_S)
            yield TokenEvent(index, [1000 + index], "length" if index + 1 == request.params.max_tokens else None)


@dataclass
class Answer:
    began_s: float
    status: int
    first_s: float
    """Time from the request to the first token, or to the refusal."""


async def ask(port: int) -> Answer:
    began_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = f'{{"prompt": {PROMPT}, "max_tokens": {OUTPUT_TOKENS}, "ignore_eos": true, "stream": true}}'.encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    content = b""
    while b'"text"' not in content and b'"error"' not in content:
        part = await reader.read(1 << 16)
        assert part, content
        content += part
    first_s = time.perf_counter() - began_s
    while await reader.read(1 << 16):
        pass
    writer.close()
    return Answer(began_s, int(content.split(maxsplit=2)[1]), first_s)


class OwnLag:
    """Measures how late this process itself is at most. All times that it measures may be too long by that."""

    def __init__(self) -> None:
        self.most_s = 0.0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(0.01)
            self.most_s = max(self.most_s, time.perf_counter() - before_s - 0.01)

    def end(self) -> float:
        self._task.cancel()
        return self.most_s


async def load(port: int, per_s: float, seconds: float, idle_s: float) -> list[Answer]:
    """Send requests at a rate, for so many seconds. Returns the answers, in the order in which the requests came."""
    lag, asking, end_s = OwnLag(), [], time.perf_counter() + seconds
    due_s = time.perf_counter()
    while (due_s := due_s + random.expovariate(per_s)) < end_s:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        asking.append(asyncio.create_task(ask(port)))
    await asyncio.sleep(max(0.0, end_s - time.perf_counter()))
    print(f"this process was late by {1e3 * lag.end():.0f} ms at most")
    later = asyncio.create_task(normal_again(port, end_s, idle_s))
    answers = await asyncio.gather(*asking)
    print(f"normal again: {await later:.1f} s after the end of the load")
    return answers


async def normal_again(port: int, end_s: float, idle_s: float) -> float:
    """Return the seconds until a run of requests begins, half of which have at most twice the TTFT of an idle
    deployment."""
    asked: list[Answer] = []
    while len(asked) < RUN or not _is_normal([each.first_s for each in asked[-RUN:]], idle_s):
        answer = await ask(port)
        asked = [*asked, answer] if answer.status == 200 else []
        await asyncio.sleep(2 / SUSTAINED_PER_S)
    return asked[-RUN].began_s - end_s


def _is_normal(first_s: list[float], idle_s: float) -> bool:
    return max(first_s[0], statistics.median(first_s)) <= 2 * idle_s


def at(part: float, values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0


async def measure(port: int, times: float, seconds: float, max_queue_time_s: float) -> None:
    idle_s = statistics.median([(await ask(port)).first_s for _ in range(RUN)])
    answers = await load(port, times * SUSTAINED_PER_S, seconds, idle_s)
    refused = [each.first_s * 1e3 for each in answers if each.status == 503]
    accepted = [each.first_s for each in answers if each.status == 200]
    others = len(answers) - len(refused) - len(accepted)
    prefill_s = (SchedulerConfig().max_inflight_prefills + 1) / SUSTAINED_PER_S
    print(
        f"{len(answers)} requests in {seconds:g} s, {times:g} times the load: {len(accepted)} accepted, "
        f"{len(refused)} refused, {others} others\n"
        f"refused in: p50 {at(0.5, refused):.1f} ms, p99 {at(0.99, refused):.1f} ms (bar {REFUSED_MS:g})\n"
        f"TTFT of the accepted: p50 {at(0.5, accepted):.2f} s, p99 {at(0.99, accepted):.2f} s, "
        f"most {max(accepted):.2f} s (bar {max_queue_time_s:g} + {prefill_s:.2f})\n"
        f"bar of normal again: {max_queue_time_s + NORMAL_S:g} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=2.0, help="times what is sustained")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-queue-time", type=float, default=SchedulerConfig().max_queue_time_s)
    parser.add_argument("--role", choices=["instances", "api"], help=argparse.SUPPRESS)
    parser.add_argument("--addresses", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "instances":
        asyncio.run(serve_until_killed(*Instances().servers()))
    elif arguments.role == "api":
        prefill, decode = arguments.addresses
        instances: dict[str, tuple[Role, str]] = {"prefill-0": ("prefill", prefill), "decode-0": ("decode", decode)}
        asyncio.run(serve_api(instances, max_queue_time_s=arguments.max_queue_time))
    else:
        longest = str(arguments.max_queue_time)
        with (
            started(__file__, "--role", "instances") as (_, addresses),
            started(__file__, "--role", "api", "--addresses", *addresses, "--max-queue-time", longest) as (_, (url,)),
        ):
            port = int(url.rpartition(":")[2])
            asyncio.run(measure(port, arguments.load, arguments.seconds, arguments.max_queue_time))


if __name__ == "__main__":
    main()
