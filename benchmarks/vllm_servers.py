"""vLLM's own servers on two GPUs: prefill and decode apart, over hbserve-kv and its router, compared with two plain
servers.

    pip install vllm==0.24.0 'hbserve-kv[router]'; python benchmarks/vllm_servers.py --model FOLDER

Servers share two cards: a plain one and the one that prefills are on the first, a plain one and the one that decodes on
the second. A phase asks only one pair. `--phases` chooses among three:

    tokens       greedy answers to prompts around block borders, apart and of one server; and, as a measure of what
                 batches alone change, of one server and the other in wider batches. Where two differ, the output says
                 by how much the reference's first choice led its second
    loads        what clients see, and what vLLM's own counters say of each server
    deaths       with two servers of each kind, the first that prefills and the first that decodes are frozen, go on,
                 are killed and restarted under a load; the output says who is not served, and vLLM's own counters

`--before` names a folder with another state of this project's packages, whose connector and router serve the loads too.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
from vllm_load import Work, load

LENGTHS = [1, 2, 3, *(border + i for border in (16, 32, 64, 128, 256, 512, 1024, 2048) for i in (-1, 0, 1))]
NUM_PROMPTS, NUM_TOKENS = 200, 24
START_S = 240.0
LOADS = ("40,400,2048,128", "20,200,512,512")


@dataclass(frozen=True)
class Server:
    port: int
    card: int
    role: str = ""
    """Role of the server; "" is a plain one."""
    kv_port: int = 0
    packages: str = ""
    """Folder of the packages that the server uses; "" means those of this process."""


PLAIN = (Server(18100, 0), Server(18200, 1))
PREFILL, DECODE = Server(18300, 0, "kv_producer", 17100), Server(18400, 1, "kv_consumer", 17200)
OTHER_PREFILL, OTHER_DECODE = Server(18310, 1, "kv_producer", 17300), Server(18410, 0, "kv_consumer", 17400)
ROUTER, ROUTER_BEFORE, ROUTER_OF_ALL = 18500, 18600, 18700


class Servers:
    """The processes of servers and routers, each with its log in a folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._cards = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def _start(self, port: int, command: list[str], environment: dict[str, str], packages: str) -> None:
        if packages:
            found = [*map(str, Path(packages).glob("packages/*/src")), os.environ.get("PYTHONPATH", "")]
            environment = environment | {"PYTHONPATH": os.pathsep.join(found)}
        with (self._folder / f"{port}.log").open("ab") as log:
            self.processes[port] = subprocess.Popen(
                [sys.executable, "-m", *command], env=os.environ | environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def start(self, server: Server) -> None:
        command = [
            "vllm.entrypoints.openai.api_server", "--model", self._options.model, "--served-model-name", "m", "--host",
            "127.0.0.1", "--port", str(server.port), "--max-model-len", "4096", "--seed", "0",
            "--disable-uvicorn-access-log", "--gpu-memory-utilization", "0.1",
            "--kv-cache-memory-bytes", str(self._options.kv_gib << 30), *self._options.serve,
        ]  # fmt: skip
        if server.role:
            extra = {"port": server.kv_port, "timeout_s": 4, "backend": self._options.backend}
            transfer = {
                "kv_connector": "HBServeConnector",
                "kv_connector_module_path": "hbserve_kv.integrations.vllm",
                "kv_role": server.role,
                "kv_connector_extra_config": extra,
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        self._start(server.port, command, {"CUDA_VISIBLE_DEVICES": self._cards[server.card]}, server.packages)

    def start_router(self, port: int, *servers: Server) -> None:
        given = []
        for server in servers:
            url = f"http://127.0.0.1:{server.port}"
            is_prefill = server.role == "kv_producer"
            given += ["--prefill", f"{url},{server.kv_port}"] if is_prefill else ["--decode", url]
        command = ["hbserve_kv.integrations.router", "--port", str(port), *given]
        self._start(port, command, {}, servers[0].packages)

    async def until_up(self, session: ClientSession, *ports: int) -> None:
        deadline_s = time.monotonic() + START_S
        for port in ports:
            while not await is_up(session, port):
                if self.processes[port].poll() is not None or time.monotonic() > deadline_s:
                    tail = (self._folder / f"{port}.log").read_text(errors="replace").splitlines()[-30:]
                    raise SystemExit("\n".join([*tail, f"the server at {port} did not start"]))
                await asyncio.sleep(0.5)

    def signal(self, server: Server, number: signal.Signals) -> None:
        """Send a signal to all processes of a server."""
        os.killpg(self.processes[server.port].pid, number)
        if number is signal.SIGKILL:
            self.processes.pop(server.port).wait()

    def end(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):  # one that did not start, with all of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def is_up(session: ClientSession, port: int) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{port}/health", timeout=ClientTimeout(2)) as answer:
            return answer.status == 200
    except (ClientError, TimeoutError):
        return False


async def metrics(session: ClientSession, server: Server) -> dict[str, float]:
    """Return vLLM's own metrics of a server, without labels and prefix. Those of the same name are added."""
    async with session.get(f"http://127.0.0.1:{server.port}/metrics", timeout=ClientTimeout(5)) as answer:
        text = await answer.text()
    found: dict[str, float] = {}
    for name, number in re.findall(r"^vllm:(\w+)(?:{.*})? (\S+)$", text, re.M):
        found[name] = found.get(name, 0.0) + float(number)
    return found


async def counters(session: ClientSession, server: Server) -> str:
    """Return, as text, a server's metrics of what is under way, which blocks are in use, and what has moved."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "request_success_total",
             "hbserve_xfer_time_seconds_count", "hbserve_num_failed_transfers_total",
             "hbserve_num_not_delivered_total")  # fmt: skip
    try:
        found = await metrics(session, server)
    except (ClientError, TimeoutError):
        return "no answer"
    return ", ".join(f"{name.removesuffix('_total')} {found[name]:.4g}" for name in names if name in found)


# ---- tokens ----------------------------------------------------------------------------------------------------------

Greedy = tuple[list[str], list[float]]
"""Tokens, and by how much each led the next best one."""


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
    reference = await all_of(session, PLAIN[0].port, prompts, 16)
    compare("apart and one server", reference, await all_of(session, ROUTER, prompts, 16))
    compare("one server and another", reference, await all_of(session, PLAIN[1].port, prompts, 64))
    long = [(prompt, found) for prompt, found in zip(prompts, reference, strict=True) if len(prompt) > 64]
    changed = [[drawn.randint(3, 10_000) for _ in prompt[:-16]] + prompt[-16:] for prompt, _ in long]
    compare("prompts of which only the end is the same", [found for _, found in long],
            await all_of(session, PLAIN[0].port, changed, 16))  # fmt: skip


# ---- loads -----------------------------------------------------------------------------------------------------------


async def means(session: ClientSession, server: Server, before: dict[str, float]) -> str:
    """Return, as text, the means that vLLM and the connector themselves measured since `before`."""
    now, found = await metrics(session, server), []
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "hbserve_xfer_time"):
        count, total = (now.get(f"{name}_seconds_{of}", 0) - before.get(f"{name}_seconds_{of}", 0)
                        for of in ("count", "sum"))  # fmt: skip
        if count:
            found.append(f"{name} {1e3 * total / count:.1f} ms")
    return ", ".join(found)


async def loads(
    session: ClientSession, apart: dict[str, tuple[int, tuple[Server, Server]]], works: Sequence[Work]
) -> None:
    ways = {"two servers": ([each.port for each in PLAIN], PLAIN)}
    ways |= {name: ([port], pair) for name, (port, pair) in apart.items()}
    for ports, _ in ways.values():
        await load(ports, Work(20, 40, 300, 16))
        await load(ports, Work(20, 16, 2048, 16))
    for work in works:
        for name, (ports, pair) in ways.items():
            before = [await metrics(session, each) for each in pair]
            print(f"{work}, {name}: {await load(ports, work)}", flush=True)
            for server, since in zip(pair, before, strict=True):
                role = server.role.removeprefix("kv_") or "plain"
                print(f"    {role} on card {server.card}: {await means(session, server, since)}", flush=True)


# ---- deaths ----------------------------------------------------------------------------------------------------------


async def deaths(session: ClientSession, servers: Servers) -> None:
    everyone = {"prefill": PREFILL, "other prefill": OTHER_PREFILL, "decode": DECODE, "other decode": OTHER_DECODE}
    for server in everyone.values():
        if server.port not in servers.processes:
            servers.start(server)
    await servers.until_up(session, *(server.port for server in everyone.values()))
    servers.start_router(ROUTER_OF_ALL, *everyone.values())
    await servers.until_up(session, ROUTER_OF_ALL)
    await load([ROUTER_OF_ALL], Work(20, 40, 512, 16))
    began_s = time.monotonic()

    async def say(what: str) -> None:
        print(f"{time.monotonic() - began_s:5.1f} s: {what}", flush=True)
        for name, server in everyone.items():
            print(f"    {name}: {await counters(session, server)}", flush=True)

    serving = asyncio.create_task(load([ROUTER_OF_ALL], Work(24, 24 * 105, 512, 64)))
    await asyncio.sleep(6)
    for name, server in (("prefill", PREFILL), ("decode", DECODE)):
        for number, pause_s in ((signal.SIGSTOP, 8), (signal.SIGCONT, 6)):
            servers.signal(server, number)
            print(f"{time.monotonic() - began_s:5.1f} s: {number.name} to {name}", flush=True)
            await asyncio.sleep(pause_s)
            await say(f"{pause_s} s later")
    for name, server in (("prefill", PREFILL), ("decode", DECODE)):
        servers.signal(server, signal.SIGKILL)
        print(f"{time.monotonic() - began_s:5.1f} s: SIGKILL to {name}", flush=True)
        await asyncio.sleep(6)
        await say("6 s later")
        servers.start(server)
    await servers.until_up(session, PREFILL.port, DECODE.port)
    await say("both are up again")
    await asyncio.sleep(6)
    await say("6 s later")
    seen = await serving
    print(f"24 a second of 512 + 64, all the time: {seen}", flush=True)
    for at_s, what in sorted(seen.failures):
        print(f"    asked at {at_s:.1f} s: {what}", flush=True)
    await load([ROUTER_OF_ALL], Work(20, 40, 40, 4))  # an idle prefill server steps no more
    await say("afterwards")


# ---- all of it -------------------------------------------------------------------------------------------------------


async def start_pairs(
    session: ClientSession, servers: Servers, before: str
) -> dict[str, tuple[int, tuple[Server, Server]]]:
    """Start plain servers, and pairs of prefill and decode. Returns the port of each pair's router, and the pair."""
    apart = {"apart": (ROUTER, (PREFILL, DECODE))}
    if before:
        prefill, decode = (
            Server(each.port + 50, each.card, each.role, each.kv_port + 50, before) for each in (PREFILL, DECODE)
        )
        apart["before"] = (ROUTER_BEFORE, (prefill, decode))
    wanted = [*PLAIN, *(each for _, pair in apart.values() for each in pair)]
    for each in wanted:
        servers.start(each)
    await servers.until_up(session, *(each.port for each in wanted))
    for port, pair in apart.values():
        servers.start_router(port, *pair)
    await servers.until_up(session, *(port for port, _ in apart.values()))
    await asyncio.sleep(2)
    return apart


async def measure(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp())
    print(f"logs are in {folder}", flush=True)
    servers = Servers(options, folder)
    try:
        async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(300)) as session:
            if {"tokens", "loads"} & set(options.phases):
                apart = await start_pairs(session, servers, options.before)
            if "tokens" in options.phases:
                await tokens(session)
            if "loads" in options.phases:
                await loads(session, apart, options.work)
            if "deaths" in options.phases:
                await deaths(session, servers)
    finally:
        servers.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--phases", nargs="+", default=["tokens", "loads", "deaths"])
    parser.add_argument("--backend", default="auto", help="auto, ipc, nccl or mooncake")
    parser.add_argument("--before", default="", help="a folder whose packages are compared with these")
    parser.add_argument("--kv-gib", type=int, default=16, help="of each server's KV cache")
    parser.add_argument("--work", nargs="+", default=[*map(Work.read, LOADS)], type=Work.read,
                        metavar="RATE,NUM,INPUT,OUTPUT")  # fmt: skip
    parser.add_argument("serve", nargs="*", help="behind --, options of vLLM's servers")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
