"""Cost of Ray for the tokens of a request: `hbserve serve --ray ADDRESS` and `hbserve serve`, in turns, same sizes.

    UV_PROJECT_ENVIRONMENT=.venv-ray uv run --locked --group ray python benchmarks/ray_path.py

Both deployments run all the time, with a cluster of one node, and one at a time has a load. The order changes from pair
to pair. Each ratio is Ray's figure divided by the plain launcher's, of one pair. The output has their median, and the
interval in which the median of many more pairs is (95 %). If others use the machine too, look at the processor time: a
token takes the same if it goes the same way. What a deployment takes without requests is subtracted, because it does
not belong to tokens: the server's process has a client of Ray.

The script also shows that no process of Ray is on that way. It prints what these compute, and what goes through their
TCP sockets, in a second: without requests, while the plain deployment answers, and while Ray's does. It also prints the
sockets that the instances have with them.
"""

import argparse
import asyncio
import contextlib
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import yaml

from hbserve.client.http_stream import HttpClient
from hbserve.load.asking import Outcome, ask
from hbserve_testing.narrowing import present
from hbserve_testing.processes import children_of, command_of
from hbserve_testing.small_models import write_small_model

START_TIMEOUT_S = 900.0
PROMPT = "What is the capital of France? Answer number {} in a few words, and say how you know it."


@dataclass
class Served:
    """One deployment: `path` has its front end, and then its instances."""

    name: str
    url: str
    path: list[int]


@dataclass
class Spent:
    """Processor time of some processes, and bytes that went through their TCP sockets."""

    seconds: float
    computed_s: float
    num_bytes: float

    def each_second(self) -> str:
        milliseconds, kilobytes = 1e3 * self.computed_s / self.seconds, self.num_bytes / 1e3 / self.seconds
        return f"{milliseconds:.1f} ms of a core, {kilobytes:.1f} kB"


@dataclass
class Load:
    """Figures of one load."""

    tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    us_per_token: float
    """Processor time of all processes of the path, less what they spend in the same time without requests."""
    instances_us_per_token: float
    """Processor time of the instances alone, including what they spend without requests."""
    of_ray: Spent
    texts: list[str] = field(default_factory=list)


@contextlib.contextmanager
def cluster() -> Iterator[tuple[str, int]]:
    """Run one node of Ray with two cores. Yields its address, and the pid of the process that has started all of it.
    Its agents get fixed ports: Ray waits only 15 s for ports that they choose, which is too short on a busy machine."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(5)]
        port, *agents = [each.getsockname()[1] for each in taken]
    of_agents = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
    names = (*of_agents, "metrics-export-port")
    options = [f"--{name}={number}" for name, number in zip(names, agents, strict=True)]
    options += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--port={port}"]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = _until(process, process.stdout, "Ray runtime started")
            if said is None:
                raise SystemExit("Ray does not start")
            yield f"127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def serving(name: str, model: Path, *options: str, below_pid: int | None = None) -> Iterator[Served]:
    """Run `hbserve serve` with one prefill and one decode instance, of one thread each, because Ray gives each one
    core. They are descendants of `below_pid`, or else of the command itself."""
    content = {
        "model": {"path": str(model)},
        "engine": {"device": "cpu", "num_threads": 1, "num_blocks": 1024},
        "scheduler": {"port": 0},
        "server": {"port": 0},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        command = [sys.executable, "-m", "hbserve", "serve", "--config", file.name, "--log-level", "WARNING", *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                found = _until(process, process.stderr, "OpenAI's API at (\\S+)/v1")
                if found is None:
                    raise SystemExit(f"{name} does not serve")
                started = below(below_pid or process.pid)
                instances = [each for each in started if "hbserve_core" in command_of(each)]
                yield Served(name, found[1], [process.pid, *instances])
            finally:
                process.terminate()
                process.wait(60)


def _until(process: "subprocess.Popen[str]", lines: IO[str] | None, pattern: str) -> re.Match[str] | None:
    """Wait until a line matches, and return the match. Earlier lines go to stderr; later ones are read and dropped.
    None: the process ended first, or took too long."""
    stop = threading.Timer(START_TIMEOUT_S, process.kill)
    stop.start()
    try:
        for line in present(lines):
            if found := re.search(pattern, line):
                threading.Thread(target=present(lines).read, daemon=True).start()
                return found
            sys.stderr.write(line)
    finally:
        stop.cancel()
    return None


def below(pid: int) -> list[int]:
    """Return a process, and all its descendants."""
    return [pid, *(each for child in children_of(pid) for each in below(child))]


def computed_s(pids: Sequence[int]) -> float:
    """Return the processor time of all living threads of these processes."""
    found = 0.0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                found += int(thread.read_text().split()[0]) / 1e9
    return found


def sockets() -> list[tuple[set[int], tuple[str, str], int]]:
    """Return the processes, the two ends, and the bytes so far of each established TCP connection."""
    done = subprocess.run(["ss", "-tinpHO", "state", "established"], capture_output=True, text=True, check=True)
    found = []
    for line in done.stdout.splitlines():
        pids = {int(pid) for pid in re.findall(r"pid=(\d+)", line)}
        num_bytes = sum(int(each) for each in re.findall(r"bytes_(?:sent|received):(\d+)", line))
        found.append((pids, (line.split()[2], line.split()[3]), num_bytes))
    return found


def bytes_of(pids: Sequence[int]) -> int:
    return sum(num_bytes for owners, _, num_bytes in sockets() if owners & set(pids))


@contextlib.contextmanager
def spending(pids: Sequence[int]) -> Iterator[Spent]:
    """Measure what these processes spend during the block."""
    spent = Spent(time.perf_counter(), computed_s(pids), bytes_of(pids))
    yield spent
    spent.seconds = time.perf_counter() - spent.seconds
    spent.computed_s = computed_s(pids) - spent.computed_s
    spent.num_bytes = bytes_of(pids) - spent.num_bytes


async def answers(client: HttpClient, num_streams: int, num_tokens: int) -> list[Outcome]:
    outcomes = [Outcome(0) for _ in range(num_streams)]
    fields = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [{"prompt": PROMPT.format(number), **fields} for number in range(num_streams)]
    await asyncio.gather(*(ask(client, "/v1/completions", *each) for each in zip(bodies, outcomes, strict=True)))
    for each in outcomes:
        assert each.is_ok, each.error
    return outcomes


async def load(served: Served, of_ray: Sequence[int], num_streams: int, num_tokens: int, idle_share: float = 0) -> Load:
    """Send a load. `idle_share` is the share of a core that the deployment's path takes without requests."""
    client = HttpClient(served.url, {})
    with spending(served.path) as path, spending(served.path[1:]) as instances, spending(of_ray) as spent:
        outcomes = await answers(client, num_streams, num_tokens)
    client.close()
    num = num_streams * num_tokens
    took_s = max(each.start_s + each.latency_s for each in outcomes) - min(each.start_s for each in outcomes)
    return Load(
        num / took_s,
        1e3 * statistics.median(each.ttft_s for each in outcomes),
        1e3 * statistics.median(gap for each in outcomes for gap in each.itls_s),
        1e6 * (path.computed_s - idle_share * path.seconds) / num,
        1e6 * instances.computed_s / num,
        spent,
        [each.text for each in outcomes],
    )


async def compare(plain: Served, ray: Served, of_ray: Sequence[int], arguments: argparse.Namespace) -> None:
    size = arguments.streams, arguments.tokens
    for each in (plain, ray, plain, ray):  # first uses
        await load(each, of_ray, *size)
    with spending(of_ray) as idle, spending(plain.path) as of_plain, spending(ray.path) as of_other:
        await asyncio.sleep(arguments.idle_s)
    shares = {each.name: spent.computed_s / spent.seconds for each, spent in ((plain, of_plain), (ray, of_other))}
    pairs = []
    for number in range(arguments.pairs):
        both = (plain, ray) if number % 2 == 0 else (ray, plain)
        loads = {each.name: await load(each, of_ray, *size, shares[each.name]) for each in both}
        assert loads["plain"].texts == loads["ray"].texts, "greedy answers differ"
        pairs.append((loads["plain"], loads["ray"]))
    print(f"{len(pairs)} pairs of {size[0]} streams of {size[1]} tokens, the same texts", flush=True)
    for what, name in (
        ("tokens/s", "tokens_per_s"),
        ("first token, ms", "ttft_ms"),
        ("between tokens, ms", "itl_ms"),
        ("processor time of a token, us", "us_per_token"),
        ("  of the instances alone", "instances_us_per_token"),
    ):
        without, within = ([getattr(each[side], name) for each in pairs] for side in (0, 1))
        ratios = sorted(ours / plains for plains, ours in zip(without, within, strict=True))
        first = max(0, int(len(ratios) / 2 - math.sqrt(len(ratios))))
        print(
            f"{what}: plain {statistics.median(without):.1f}, Ray {statistics.median(within):.1f}; "
            f"ratio {statistics.median(ratios):.3f} ({ratios[first]:.3f} to {ratios[-1 - first]:.3f})"
        )
    print(f"each second, when nobody asks: plain's path {of_plain.each_second()}; Ray's path {of_other.each_second()}")
    print(f"  Ray's {len(of_ray)} own processes: {idle.each_second()}")
    for side, what in enumerate(("plain answers", "Ray's answers")):
        spent = [each[side].of_ray for each in pairs]
        total = Spent(*(sum(getattr(each, name) for each in spent) for name in ("seconds", "computed_s", "num_bytes")))
        print(f"  the same while {what}: {total.each_second()}")


def tell_sockets(ray: Served, of_ray: Sequence[int]) -> None:
    """Print the sockets of the instances, by the owner of the other end."""
    found = sockets()
    owners = {ends: pids for pids, ends, _ in found}
    instances, ours, others = set(ray.path[1:]), 0, 0
    for pids, (here, there), _ in found:
        if pids & instances:
            peers = owners.get((there, here), set())
            ours += bool(peers & set(ray.path))
            others += bool(peers & set(of_ray))
    print(f"connections of the instances: {ours} with each other and the front end, {others} with processes of Ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; without it, a random model that takes next to no time")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--idle-s", type=float, default=20.0)
    arguments = parser.parse_args()
    # Of this script's own cluster: what a home has does not matter, and processes of both have one priority.
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_worker_niceness="0")
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "model"
            write_small_model(model, "qwen3")
        with (
            cluster() as (address, node),
            serving("ray", model, "--ray", address, below_pid=node) as ray,
            serving("plain", model) as plain,
        ):
            of_ray = [each for each in below(node) if each not in ray.path]
            asyncio.run(compare(plain, ray, of_ray, arguments))
            tell_sockets(ray, of_ray)


if __name__ == "__main__":
    main()
