"""Loads for vllm_servers.py and http_burst.py: requests from several processes, at random moments or all at once, and
what their clients see. This is not a benchmark itself.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

NUM_CLIENTS = 4
"""Number of client processes. A single one reads only some 10,000 events a second, and would be what is measured."""


@dataclass(frozen=True)
class Work:
    """A load: requests a second, their number, tokens of each prompt, and tokens of each answer."""

    rate: float
    num: int
    num_input: int
    num_output: int

    @classmethod
    def read(cls, given: str) -> "Work":
        rate, *numbers = given.split(",")
        return cls(float(rate), *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.rate:g} a second of {self.num_input} + {self.num_output}"


@dataclass
class Seen:
    """Times and failures that the clients of a load see."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    """Failed requests: when each was sent, in seconds of the load, and what its client was told."""

    def add(self, other: "Seen") -> None:
        self.first_s += other.first_s
        self.gaps_s += other.gaps_s
        self.failures += other.failures

    def __str__(self) -> str:
        def ms(found: list[float], place: float) -> float:
            return 1e3 * sorted(found)[min(len(found) - 1, int(place * len(found)))]

        said = [f"{len(self.first_s)} served"]
        if first_s := self.first_s:
            mean_ms = 1e3 * sum(first_s) / len(first_s)
            said.append(f"TTFT p50 {ms(first_s, 0.5):.1f}, p99 {ms(first_s, 0.99):.0f}, mean {mean_ms:.1f} ms")
        if self.gaps_s:
            said.append(f"ITL p50 {ms(self.gaps_s, 0.5):.2f}, p99 {ms(self.gaps_s, 0.99):.2f} ms")
        if self.failures:
            said.append(f"{len(self.failures)} not served")
        return "; ".join(said)


async def load(ports: Sequence[int], work: Work) -> Seen:
    """Run a load by all clients together. Each has its share of the requests, and sends them to the ports in turn."""
    seen, loop = Seen(), asyncio.get_running_loop()
    share = Work(work.rate / NUM_CLIENTS, work.num // NUM_CLIENTS, work.num_input, work.num_output)
    with ProcessPoolExecutor(NUM_CLIENTS, get_context("spawn")) as clients:
        asked = [loop.run_in_executor(clients, _client, tuple(ports), share, seed) for seed in range(NUM_CLIENTS)]
        for each in await asyncio.gather(*asked):
            seen.add(each)
    return seen


async def burst(ports: Sequence[int], lengths: Sequence[tuple[int, int]]) -> tuple[float, list[tuple[float, str]]]:
    """Send requests of these lengths of input and output, all at once and to the ports in turn. Returns tokens a
    second, from the first request to the last token, and the failures.
    """
    loop, shares = asyncio.get_running_loop(), [lengths[number::NUM_CLIENTS] for number in range(NUM_CLIENTS)]
    with ProcessPoolExecutor(NUM_CLIENTS, get_context("spawn")) as clients:
        await asyncio.gather(*(loop.run_in_executor(clients, time.sleep, 0.5) for _ in shares))  # they have started
        asked = [
            loop.run_in_executor(clients, _burst_client, tuple(ports), share, seed) for seed, share in enumerate(shares)
        ]
        found = await asyncio.gather(*asked)
    time_s = max(ended for _, ended, _, _ in found) - min(began for began, _, _, _ in found)
    return sum(num for _, _, num, _ in found) / time_s, [each for *_, failures in found for each in failures]


def _burst_client(
    ports: Sequence[int], lengths: Sequence[tuple[int, int]], seed: int
) -> tuple[float, float, int, list[tuple[float, str]]]:
    """Run one client of a burst. Returns when it began and ended, by the clock that all processes of a host share, how
    many tokens were served, and the failures."""

    async def ask_all() -> tuple[float, float, int, list[tuple[float, str]]]:
        drawn, seen, turns = random.Random(seed), Seen(), itertools.cycle([*ports[seed % len(ports) :], *ports])
        prompts = [[drawn.randint(3, 10_000) for _ in range(num_input)] for num_input, _ in lengths]
        async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(300)) as session:
            began_s = time.monotonic()
            await asyncio.gather(
                *(
                    _ask(session, next(turns), prompt, num_output, 0.0, seen)
                    for prompt, (_, num_output) in zip(prompts, lengths, strict=True)
                )
            )
        num_tokens = sum(num_output for _, num_output in lengths) if not seen.failures else 0
        return began_s, time.monotonic(), num_tokens, seen.failures

    return asyncio.run(ask_all())


def _client(ports: Sequence[int], work: Work, seed: int) -> Seen:
    return asyncio.run(_ask_all(ports, work, seed))


async def _ask_all(ports: Sequence[int], work: Work, seed: int) -> Seen:
    drawn, delay_s, turns, seen = (
        random.Random(seed),
        0.0,
        itertools.cycle([*ports[seed % len(ports) :], *ports]),
        Seen(),
    )
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(300)) as session:
        asked = []
        for _ in range(work.num):
            delay_s += drawn.expovariate(work.rate)
            prompt = [drawn.randint(3, 10_000) for _ in range(work.num_input)]
            asked.append(_ask(session, next(turns), prompt, work.num_output, delay_s, seen))
        await asyncio.gather(*asked)
    return seen


async def _ask(
    session: ClientSession, port: int, prompt: list[int], num_output: int, delay_s: float, seen: Seen
) -> None:
    await asyncio.sleep(delay_s)
    body = {
        "model": "m", "prompt": prompt, "temperature": 0.6, "ignore_eos": True, "stream": True, "max_tokens": num_output
    }  # fmt: skip
    began_s, at_s = time.perf_counter(), []
    try:
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    at_s.append(time.perf_counter())
                if line.startswith(b'data: {"error"'):
                    raise ClientError(line.decode())
            if not at_s:
                raise ClientError("an answer without tokens")
    except (ClientError, TimeoutError) as error:
        seen.failures.append((delay_s, str(error)[:200] or type(error).__name__))
    else:
        seen.first_s.append(at_s[0] - began_s)
        seen.gaps_s += [after - before for before, after in itertools.pairwise(at_s)]
