"""Tokens/s of a burst on several hybrid instances behind 1, 2 and 4 front ends, compared with one instance, and which
process is full.

    python benchmarks/front_ends.py --model FOLDER                                  # one instance and eight, on GPUs
    python benchmarks/front_ends.py --instances 2 --requests 16 --input 16 --output 8 --api-servers 1 2   # on the CPU

The burst comes from `--clients` processes of `hbserve bench serve`. "busy" is the processor time of the busiest process
of each kind, in the two seconds in which it was busiest. At 100 % it is full, unless several of its threads work. The
limit is one instance's rate times the number of instances.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from time import monotonic

import httpx
import msgspec

from hbserve.load.compare import serving
from hbserve_scheduler import DeploymentConfig
from hbserve_scheduler.config import ModelSection, ServerSection
from hbserve_testing.processes import run_in_order

READY_S = 900
NAMES = {
    "bench serve": "client",
    "hbserve_core": "instance",
    "front_end_process": "front end",
    "hbserve serve": "parent",  # which is the front end too, where there is one
}
SAMPLE_S, SAMPLES = 0.5, 4
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def processes_below(root: int) -> dict[int, str]:
    """Return the descendants of a process, each with its command."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:  # it has ended
            continue
    found, left = {}, children.get(root, [])
    while left:
        pid = left.pop()
        found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
        left += children.get(pid, [])
    return found


def name_of(command: str) -> str:
    for part, name in NAMES.items():
        if part in command:
            return name
    return "other"


def processor_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND


Samples = dict[int, tuple[str, list[tuple[float, float]]]]
"""Kind of each process, and its processor time at several moments."""


async def watch(samples: Samples) -> None:
    while True:
        for pid, command in processes_below(os.getpid()).items():
            samples.setdefault(pid, (name_of(command), []))[1].append((monotonic(), processor_s(pid)))
        await asyncio.sleep(SAMPLE_S)


def busiest(samples: Samples) -> list[str]:
    """Say how busy each kind of process was, the busiest kind first: its busiest process, in that one's busiest two
    seconds."""
    most: dict[str, float] = {}
    for name, times in samples.values():
        for (began_s, used_s), (ended_s, end_used_s) in zip(times, times[SAMPLES:], strict=False):
            most[name] = max(most.get(name, 0.0), (end_used_s - used_s) / (ended_s - began_s))
    return [f"{name} {100 * part:.0f} %" for name, part in sorted(most.items(), key=lambda each: -each[1])]


async def burst(url: str, arguments: argparse.Namespace, num_requests: int) -> tuple[float, list[str]]:
    """Send a burst of requests. Returns tokens a second, and how busy each kind of process was."""
    await ready(url)
    samples: Samples = {}
    watching = asyncio.create_task(watch(samples))
    with tempfile.TemporaryDirectory() as folder:
        share = -(-num_requests // arguments.clients)
        clients = [await client(url, arguments, share, number, folder) for number in range(arguments.clients)]
        if any([await each.wait() for each in clients]):
            raise SystemExit("a client has failed")
        results = [json.loads(await asyncio.to_thread(read, folder, number)) for number in range(len(clients))]
    watching.cancel()
    tokens, time_s = sum(each["total_output_tokens"] for each in results), max(each["duration"] for each in results)
    return tokens / time_s, busiest(samples)


def read(folder: str, number: int) -> str:
    return Path(folder, f"{number}.json").read_text()


async def ready(url: str) -> None:
    async with httpx.AsyncClient() as http, asyncio.timeout(READY_S):
        while True:
            try:
                if (await http.get(f"{url}/health")).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.2)


async def client(
    url: str, arguments: argparse.Namespace, share: int, number: int, folder: str
) -> asyncio.subprocess.Process:
    options = {
        "base-url": url, "num-prompts": share, "random-input-len": arguments.input, "seed": number,
        "random-output-len": arguments.output, "result-dir": folder, "result-filename": f"{number}.json",
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = ["-m", "hbserve", "bench", "serve", *flags, "--ignore-eos", "--save-result", "--disable-tqdm"]
    return await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.DEVNULL)


async def measure(arguments: argparse.Namespace, instances: int, api_servers: int) -> tuple[float, list[str]]:
    base = DeploymentConfig()
    model = ModelSection(path=arguments.model) if arguments.model else base.model
    base = msgspec.structs.replace(base, model=model, server=ServerSection(api_servers=api_servers))
    async with serving(base, ["hybrid"] * instances) as server:
        num_requests = max(arguments.clients, arguments.requests * instances // arguments.instances)
        return await server.during(burst(server.url, arguments, num_requests))


async def main_async(arguments: argparse.Namespace) -> None:
    print(f"{'instances':>9}{'front ends':>12}{'tokens/s':>12}{'of the limit':>14}   busy")
    one, busy = await measure(arguments, 1, max(arguments.api_servers))
    print(f"{1:9}{max(arguments.api_servers):12}{one:12.0f}{1:14.2f}   {', '.join(busy)}", flush=True)
    for api_servers in arguments.api_servers:
        rate, busy = await measure(arguments, arguments.instances, api_servers)
        part = rate / (one * arguments.instances)
        print(f"{arguments.instances:9}{api_servers:12}{rate:12.0f}{part:14.2f}   {', '.join(busy)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder; without it, the demo model")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--api-servers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=512)
    arguments = parser.parse_args()
    run_in_order(main_async(arguments))


if __name__ == "__main__":
    main()
