"""vLLM's own servers on two GPUs: prefill and decode apart, over hbserve-kv and its router, beside two plain servers.

    pip install vllm==0.24.0 'hbserve-kv[router]'; python benchmarks/vllm_servers.py --model FOLDER

Four servers share two cards: a plain one and the one that prefills on the first, a plain one and the one that decodes
on the second; a phase asks one pair only. Tokens: greedy ones of prompts around block borders, apart and of one server,
and as a measure of what batches alone change, of one server and the other in wider batches; where two differ, by how
much the first choice of the reference led its second. Loads: what clients see. Deaths: the prefill server is frozen,
goes on, is killed and restarted under a load; who is not served, and vLLM's own counters.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

PLAIN, PREFILL, DECODE, ROUTER, KV_PORT = (18100, 18200), 18300, 18400, 18500, 17100
LENGTHS = [1, 2, 3, *(border + i for border in (16, 32, 64, 128, 256, 512, 1024, 2048) for i in (-1, 0, 1))]
NUM_PROMPTS, NUM_TOKENS = 200, 24
START_S = 240.0


class Servers:
    """The processes, each with its log in a folder."""

    def __init__(self, model: str, cards: Sequence[str], folder: Path, options: Sequence[str]) -> None:
        self._model, self._cards, self._folder, self._options = model, cards, folder, options
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def _start(self, port: int, command: list[str], environment: dict[str, str]) -> None:
        with (self._folder / f"{port}.log").open("ab") as log:
            self.processes[port] = subprocess.Popen(
                [sys.executable, "-m", *command], env=os.environ | environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def start(self, port: int) -> None:
        card = self._cards[port in (PLAIN[1], DECODE)]
        command = [
            "vllm.entrypoints.openai.api_server", "--model", self._model, "--served-model-name", "m", "--host",
            "127.0.0.1", "--port", str(port), "--max-model-len", "4096", "--seed", "0", "--disable-uvicorn-access-log",
            "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(24 << 30), *self._options,
        ]  # fmt: skip
        if port not in PLAIN:
            transfer = {
                "kv_connector": "HBServeConnector",
                "kv_connector_module_path": "hbserve_kv.integrations.vllm",
                "kv_role": "kv_producer" if port == PREFILL else "kv_consumer",
                "kv_connector_extra_config": {"port": KV_PORT + 100 * (port == DECODE), "timeout_s": 4},
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        self._start(port, command, {"CUDA_VISIBLE_DEVICES": card})

    def start_router(self) -> None:
        urls = [f"http://127.0.0.1:{PREFILL},{KV_PORT}", "--decode", f"http://127.0.0.1:{DECODE}"]
        self._start(ROUTER, ["hbserve_kv.integrations.router", "--port", str(ROUTER), "--prefill", *urls], {})

    async def until_up(self, session: ClientSession, *ports: int) -> None:
        deadline_s = time.monotonic() + START_S
        for port in ports:
            while not await is_up(session, port):
                if self.processes[port].poll() is not None or time.monotonic() > deadline_s:
                    tail = (self._folder / f"{port}.log").read_text(errors="replace").splitlines()[-30:]
                    raise SystemExit("\n".join([*tail, f"the server at {port} did not start"]))
                await asyncio.sleep(0.5)

    def signal(self, port: int, number: signal.Signals) -> None:
        """To all of its processes."""
        os.killpg(self.processes[port].pid, number)
        if number is signal.SIGKILL:
            self.processes.pop(port).wait()

    def end(self) -> None:
        for port in list(self.processes):
            self.signal(port, signal.SIGKILL)


async def is_up(session: ClientSession, port: int) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{port}/health", timeout=ClientTimeout(2)) as answer:
            return answer.status == 200
    except (ClientError, TimeoutError):
        return False


async def counters(session: ClientSession, port: int) -> str:
    """vLLM's own, that say what is under way and which blocks are in use."""
    async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    wanted = ("num_requests_running", "kv_cache_usage_perc", "hbserve_xfer_time_seconds_count", "hbserve_num_failed")
    found = [line for line in lines if line.startswith(tuple(f"vllm:{name}" for name in wanted))]
    return ", ".join(f"{line.partition('{')[0].removeprefix('vllm:')} {line.split()[-1]}" for line in found)


# ---- tokens ----------------------------------------------------------------------------------------------------------

Greedy = tuple[list[str], list[float]]
"""The tokens, and by how much each led the next best one."""


async def greedy(session: ClientSession, port: int, prompt: list[int], gate: asyncio.Semaphore) -> Greedy:
    body = {
        "model": "m", "prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 2,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    async with gate, session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        found = (await answer.json())["choices"][0]["logprobs"]
    best = [sorted(each.values(), reverse=True) for each in found["top_logprobs"]]
    return found["tokens"], [each[0] - each[1] for each in best]


async def all_of(session: ClientSession, port: int, prompts: list[list[int]], width: int) -> list[Greedy]:
    gate = asyncio.Semaphore(width)
    return await asyncio.gather(*(greedy(session, port, prompt, gate) for prompt in prompts))


def compare(what: str, reference: list[Greedy], others: list[Greedy]) -> None:
    gaps = []
    for (expected, leads), (found, _) in zip(reference, others, strict=True):
        place = next((i for i, (one, other) in enumerate(zip(expected, found, strict=True)) if one != other), None)
        if place is not None:
            gaps.append(leads[place])
    usual = statistics.median(lead for _, leads in reference for lead in leads)
    said = f"; where they first differ the lead is at most {max(gaps, default=0):.4f}, the median of all {usual:.4f}"
    print(f"{what}: {len(reference) - len(gaps)} of {len(reference)} equal{said if gaps else ''}", flush=True)


async def tokens(session: ClientSession) -> None:
    drawn = random.Random(7)
    lengths = LENGTHS + [16 * drawn.randint(1, 90) + drawn.choice((-1, 0, 1)) for _ in range(NUM_PROMPTS)]
    prompts = [[drawn.randint(3, 10_000) for _ in range(length)] for length in lengths[:NUM_PROMPTS]]
    reference = await all_of(session, PLAIN[0], prompts, 16)
    compare("apart and one server", reference, await all_of(session, ROUTER, prompts, 16))
    compare("one server and another", reference, await all_of(session, PLAIN[1], prompts, 64))
    long = [(prompt, found) for prompt, found in zip(prompts, reference, strict=True) if len(prompt) > 64]
    changed = [[drawn.randint(3, 10_000) for _ in prompt[:-16]] + prompt[-16:] for prompt, _ in long]
    compare("prompts of which only the end is the same", [found for _, found in long],
            await all_of(session, PLAIN[0], changed, 16))  # fmt: skip


# ---- loads -----------------------------------------------------------------------------------------------------------


class Load:
    """Requests at random moments, and what their clients saw."""

    def __init__(self, session: ClientSession, ports: Sequence[int], num_input: int, num_output: int) -> None:
        self._session, self._ports = session, itertools.cycle(ports)
        self._num_input, self._num_output = num_input, num_output
        self.first_s: list[float] = []
        self.gaps_s: list[float] = []
        self.failures: list[str] = []

    async def run(self, rate: float, num: int) -> "Load":
        drawn, delay_s, asked = random.Random(1), 0.0, []
        for _ in range(num):
            prompt = [drawn.randint(3, 10_000) for _ in range(self._num_input)]
            asked.append(self._ask(prompt, delay_s))
            delay_s += drawn.expovariate(rate)
        await asyncio.gather(*asked)
        return self

    async def _ask(self, prompt: list[int], delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        body = {"model": "m", "prompt": prompt, "temperature": 0.6, "ignore_eos": True, "stream": True}
        began_s, seen_s = time.perf_counter(), []
        url = f"http://127.0.0.1:{next(self._ports)}/v1/completions"
        try:
            async with self._session.post(url, json=body | {"max_tokens": self._num_output}) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        seen_s.append(time.perf_counter())
                    if b'"error"' in line:
                        raise ClientError(line.decode())
        except (ClientError, TimeoutError) as error:
            self.failures.append(str(error)[:200])
        else:
            self.first_s.append(seen_s[0] - began_s)
            self.gaps_s += [after - before for before, after in itertools.pairwise(seen_s)]

    def __str__(self) -> str:
        def ms(found: list[float], place: float) -> float:
            return 1e3 * sorted(found)[min(len(found) - 1, int(place * len(found)))]

        first = f"TTFT p50 {ms(self.first_s, 0.5):.0f}, p99 {ms(self.first_s, 0.99):.0f} ms"
        gaps = f"ITL p50 {ms(self.gaps_s, 0.5):.2f}, p99 {ms(self.gaps_s, 0.99):.2f} ms"
        failed = f"; {len(self.failures)} not served, as: {self.failures[0]}" if self.failures else ""
        return f"{len(self.first_s)} served; {first}; {gaps}{failed}"


async def loads(session: ClientSession) -> None:
    ways: list[tuple[str, Sequence[int]]] = [("two servers", PLAIN), ("apart", [ROUTER])]
    for _, ports in ways:
        await Load(session, ports, 300, 16).run(20, 40)
    for rate, num, num_input, num_output in ((40, 400, 2048, 128), (20, 200, 512, 512)):
        for name, ports in ways:
            done = await Load(session, ports, num_input, num_output).run(rate, num)
            print(f"{rate} a second of {num_input} + {num_output}, {name}: {done}", flush=True)


async def deaths(session: ClientSession, servers: Servers) -> None:
    load = asyncio.create_task(Load(session, [ROUTER], 512, 64).run(12, 900))
    for number, pause_s in ((signal.SIGSTOP, 8), (signal.SIGCONT, 5), (signal.SIGKILL, 2)):
        await asyncio.sleep(5)
        servers.signal(PREFILL, number)
        await asyncio.sleep(pause_s)
        print(f"{pause_s} s after {number.name}, decode: {await counters(session, DECODE)}", flush=True)
    servers.start(PREFILL)
    await servers.until_up(session, PREFILL)
    await asyncio.sleep(3)  # the router looks once a second
    print(f"restarted; decode: {await counters(session, DECODE)}", flush=True)
    print(f"12 a second of 512 + 64, apart: {await load}", flush=True)
    await Load(session, [ROUTER], 40, 4).run(10, 2)  # an idle prefill server steps no more
    for name, port in (("decode", DECODE), ("prefill", PREFILL)):
        print(f"afterwards, {name}: {await counters(session, port)}", flush=True)


async def measure(options: argparse.Namespace) -> None:
    cards = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    folder = Path(tempfile.mkdtemp())
    print(f"logs are in {folder}", flush=True)
    servers = Servers(options.model, cards, folder, options.serve)
    try:
        async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(300)) as session:
            for port in (*PLAIN, PREFILL, DECODE):
                servers.start(port)
            await servers.until_up(session, *PLAIN, PREFILL, DECODE)
            servers.start_router()
            await servers.until_up(session, ROUTER)
            await asyncio.sleep(2)
            if "tokens" in options.phases:
                await tokens(session)
            if "loads" in options.phases:
                await loads(session)
            if "deaths" in options.phases:
                await deaths(session, servers)
    finally:
        servers.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--phases", nargs="+", default=["tokens", "loads", "deaths"])
    parser.add_argument("serve", nargs="*", help="behind --, options of vLLM's servers")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
