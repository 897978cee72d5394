"""4,000 requests, 20 at a time, while processes of a deployment die, freeze, end and come back, one after the other.

    python benchmarks/deployment_chaos.py
    python benchmarks/deployment_chaos.py --gpus --backend ipc

The deployment has two prefill and two decode instances and a scheduler, each a process, with a small random model. Each
step takes a fixed time, so that the cores are not what is measured. Half of the requests are greedy and half are
sampled with a seed. All are in float32, so that no token depends on which other requests share its step. Each request
must end with exactly its undisturbed tokens, each of them once, or with one error.

For each event the table has: how soon the scheduler said that the instance is not ready any more, how requests ended,
and the 99th percentile of requests on other instances, compared with the slice before anything happened. At the end
nothing may be left.

With `--gpus` prefill instances share the first GPU and decode instances the second, so that all KV moves between GPUs.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hbserve_rpc import HBServeRpcError, SamplingParams
from hbserve_rpc.messages import GenerateRequest, RequestFinished, SchedulerStats
from hbserve_scheduler import RemoteScheduler, load_config
from hbserve_testing.processes import run_in_order

AT_ONCE = 20
STEP_S, TOKEN_S = 0.01, 0.0001
"""Time of each step, and of each token in it beyond the first 32."""
NUM_PROMPTS, MAX_TOKENS = 40, 24
DEADLINE_S = 120.0
ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
FREEZES = (3.0, 12.0)
INSTANCE_EVENTS = ("SIGKILL", "SIGSEGV", "SIGTERM", "engine error", *(f"freeze {each:g} s" for each in FREEZES))
SCHEDULER_EVENTS = ("SIGKILL", "SIGTERM", *(f"freeze {each:g} s" for each in FREEZES))
NUM_SLICES = 2 * len(INSTANCE_EVENTS) + len(SCHEDULER_EVENTS)


# ---- an instance -------------------------------------------------------------------------------------------------


def serve_instance() -> int:
    """Run `python -m hbserve_core` with steps that take as long as they are told, and an engine that SIGUSR1 breaks."""
    from hbserve_core.instance import gpu_instance, process
    from hbserve_core.ranks.make_runner import make_runner

    is_broken = False

    def break_it(*_: object) -> None:
        nonlocal is_broken
        is_broken = True

    def make(*arguments: Any, **more: Any) -> Any:
        runner: Any = make_runner(*arguments, **more)
        launch = runner.launch

        def launch_slowly(batch: Any) -> Any:
            if is_broken:
                raise RuntimeError("chaos")
            until_s = time.monotonic() + STEP_S + TOKEN_S * max(0, sum(each.num_new_tokens for each in batch) - 32)
            pending = launch(batch)
            time.sleep(max(0.0, until_s - time.monotonic()))
            return pending

        runner.launch = launch_slowly
        return runner

    signal.signal(signal.SIGUSR1, break_it)
    gpu_instance.make_runner = make
    return process.main()


# ---- processes ---------------------------------------------------------------------------------------------------


class Child:
    """A process that is started again when it ends, as an operator would let it be."""

    def __init__(self, name: str, log: Path, command: list[str], settings: bytes = b"") -> None:
        self.name = name
        self.log = log
        self._command = command
        self._settings = settings
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *self._command, stdin=pipe, stdout=nowhere, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(self._settings)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def start_again(self) -> None:
        assert self.process is not None
        await self.process.wait()
        await self.start()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
                self.process.kill()
            await self.process.wait()


def free_ports(count: int) -> list[int]:
    holding = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in holding]
    for each in holding:
        each.close()
    return ports


@contextlib.asynccontextmanager
async def deployment(
    folder: Path, model: Path | None, backend: str, has_gpus: bool
) -> AsyncIterator[tuple[dict[str, Child], RemoteScheduler]]:
    from hbserve.processes.launcher import instance_settings

    if model is None:
        from hbserve_testing.small_models import write_small_model

        model = folder / "model"
        write_small_model(model, "qwen3")
    *ports, port = free_ports(len(ROLES) + 1)
    content = {
        "model": {"path": str(model), "max_model_len": 256, "dtype": "float32"},
        "gpu_instances": [
            {"instance_id": name, "instance_type": role, "port": at, "kv_rank": number}
            | ({"gpu_id": int(role == "decode")} if has_gpus else {})
            for number, ((name, role), at) in enumerate(zip(ROLES.items(), ports, strict=True))
        ],
        "engine": {
            "device": "auto" if has_gpus else "cpu",
            "num_blocks": 400,
            "num_threads": 1,
        },
        "kv_transfer": {"backend": backend},
        "scheduler": {"port": port},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(content))
    config = load_config(path)
    command = ["-m", "hbserve_scheduler", "--config", str(path)]
    children = {"scheduler": Child("scheduler", folder / "scheduler.log", command)}
    for each in config.gpu_instances:
        settings = json.dumps(instance_settings(config, each, model, log_level="WARNING")).encode() + b"\n"
        children[each.instance_id] = Child(
            each.instance_id, folder / f"{each.instance_id}.log", [__file__, "--instance"], settings
        )
    remote = RemoteScheduler(f"127.0.0.1:{port}")
    try:
        for child in children.values():
            await child.start()
        await remote.start()
        yield children, remote
    except BaseException:
        for child in children.values():
            print(f"{child.name} at its end: {child.log.read_text()[-1500:]}", file=sys.stderr)
        raise
    finally:
        await remote.stop()
        for child in children.values():
            await child.stop()


# ---- requests ----------------------------------------------------------------------------------------------------


@dataclass
class Slice:
    """Results of the requests during one event."""

    ends: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    times: list[tuple[float, set[str]]] = field(default_factory=list)
    """Duration and instances of each request that was tried only once."""

    def p99_ms(self, without: str = "") -> float:
        ordered = sorted(took_s for took_s, places in self.times if without not in places)
        return 1e3 * ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0


def request_of(number: int, kind: int) -> GenerateRequest:
    prompt = tuple(3 + (7 * i * i + 11 * i + 13 * kind) % 250 for i in range(20 + 3 * kind))
    params = SamplingParams(temperature=0.0 if kind % 2 else 0.8, max_tokens=MAX_TOKENS, ignore_eos=True, seed=kind)
    return GenerateRequest(f"r{number}-{kind}", prompt, params)


class Clients:
    """Clients that send 20 lanes of requests. `expected` has the undisturbed answer to each kind of request."""

    def __init__(self, scheduler: RemoteScheduler) -> None:
        self._scheduler = scheduler
        self._number = 0
        self.expected: dict[int, list[int]] = {}

    async def one(self, into: Slice) -> None:
        self._number += 1
        kind, tokens = self._number % NUM_PROMPTS, list[int]()
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE_S):
                async with self._scheduler.submit(request_of(self._number, kind)) as events:
                    async for event in events:
                        if isinstance(event, RequestFinished):
                            end = event
                        elif event.index != len(tokens):
                            into.ends["WRONG: a token twice or not at all"] += 1
                            return
                        else:
                            tokens += event.token_ids
        except HBServeRpcError as error:
            into.ends["error"] += 1
            into.errors[f"{type(error).__name__}: {str(error)[:150]}"] += 1
            await asyncio.sleep(0.2)
            return
        except TimeoutError:
            into.ends[f"WRONG: nothing for {DEADLINE_S:g} s"] += 1
            return
        expected = self.expected.setdefault(kind, tokens)
        into.ends["right" if tokens == expected else "WRONG: other tokens"] += 1
        into.attempts[end.num_attempts] += 1
        if end.num_attempts == 1:
            into.times.append((time.monotonic() - began_s, {end.prefill_instance, end.decode_instance}))

    async def run(self, count: int, into: Slice) -> None:
        left = count

        async def lane() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.one(into)

        await asyncio.gather(*(lane() for _ in range(AT_ONCE)))


# ---- events ------------------------------------------------------------------------------------------------------


async def stats_of(remote: RemoteScheduler) -> SchedulerStats | None:
    with contextlib.suppress(HBServeRpcError, TimeoutError):
        async with asyncio.timeout(3.0):
            return await remote.fetch_stats()
    return None


async def wait_for(remote: RemoteScheduler, is_so: Callable[[SchedulerStats], Any]) -> float:
    """Wait until the deployment's figures fulfil a condition. Returns how long that took."""
    began_s = time.monotonic()
    async with asyncio.timeout(DEADLINE_S):
        while (stats := await stats_of(remote)) is None or not is_so(stats):  # noqa: ASYNC110  it is elsewhere
            await asyncio.sleep(0.02)
    return time.monotonic() - began_s


def are_ready(stats: SchedulerStats) -> bool:
    return len(stats.instances) == len(ROLES) and all(each.status == "ready" for each in stats.instances)


def left_behind(stats: SchedulerStats) -> dict[str, int]:
    found = {"waiting": stats.waiting_requests, "running": stats.running_requests}
    for each in stats.instances:
        gauges = {"blocks": each.num_blocks - each.free_blocks, "quarantined": each.quarantined_blocks}
        gauges |= {"requests": each.active_requests, "transfers": each.active_transfers}
        found |= {f"{each.instance_id}: {name}": count for name, count in gauges.items()}
    return {name: count for name, count in found.items() if count}


async def happen(event: str, child: Child, remote: RemoteScheduler) -> str:
    """Let an event happen, and wait until the process is back. Returns how soon the event was noticed."""

    def state(stats: SchedulerStats) -> str:
        return next(each.status for each in stats.instances if each.instance_id == child.name)

    is_frozen = event.startswith("freeze")
    number = signal.SIGSTOP if is_frozen else signal.SIGUSR1 if event == "engine error" else getattr(signal, event)
    child.signal(number)
    noticed = "-"
    async with asyncio.TaskGroup() as group:  # when this is over, nobody is started again
        back = group.create_task(thaw(event, child) if is_frozen else child.start_again())
        if child.name != "scheduler":
            noticing = group.create_task(wait_for(remote, lambda stats: state(stats) != "ready"))
            await asyncio.wait([noticing, *([back] if is_frozen else [])], return_when=asyncio.FIRST_COMPLETED)
            noticed = f"noticed after {noticing.result():.2f} s" if noticing.done() else "over before it is noticed"
            noticing.cancel()
    await wait_for(remote, are_ready)
    return noticed


async def thaw(event: str, child: Child) -> None:
    await asyncio.sleep(float(event.split()[1]))
    child.signal(signal.SIGCONT)


async def run(arguments: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory() as name:
        started = deployment(Path(name), arguments.model, arguments.backend, arguments.gpus)
        async with started as (children, remote):
            await wait_for(remote, are_ready)
            clients, size = Clients(remote), -(-arguments.requests // (NUM_SLICES + 1))
            await clients.run(NUM_PROMPTS, Slice())
            calm = Slice()
            await clients.run(size, calm)
            print(f"undisturbed: {dict(calm.ends)}, p99 {calm.p99_ms():.0f} ms", flush=True)
            slices = [calm]
            for target, events in (("p0", INSTANCE_EVENTS), ("d1", INSTANCE_EVENTS), ("scheduler", SCHEDULER_EVENTS)):
                for event in events:
                    slices.append(await disturbed(event, children[target], remote, clients, size, calm))
            return await told_all(slices, remote)


async def disturbed(
    event: str, child: Child, remote: RemoteScheduler, clients: Clients, size: int, calm: Slice
) -> Slice:
    found = Slice()
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(size, found))
        await asyncio.sleep(0.5)
        noticed = await happen(event, child, remote)
    others = f"p99 elsewhere {found.p99_ms(child.name):.0f} ms ({found.p99_ms(child.name) / calm.p99_ms():.2f} x)"
    retried = sum(count for attempts, count in found.attempts.items() if attempts > 1)
    print(f"{child.name:9} {event:12} {dict(found.ends)}, {retried} retried; {noticed or '-'}; {others}", flush=True)
    for error, count in found.errors.most_common(3):
        print(f"          {count} x {error}", flush=True)
    return found


async def told_all(slices: list[Slice], remote: RemoteScheduler) -> bool:
    ends = sum((each.ends for each in slices), Counter[str]())
    try:
        await wait_for(remote, lambda stats: not left_behind(stats))
        left = {}
    except TimeoutError:
        left = left_behind((await stats_of(remote)) or SchedulerStats())
    print(f"all: {dict(ends)}; left behind: {left or 'nothing'}", flush=True)
    return not left and not any(end.startswith("WRONG") for end in ends)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--model", type=Path, help="a model folder; none: a small random one is made")
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--gpus", action="store_true", help="use two GPUs in place of the CPU")
    parser.add_argument("--instance", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.instance:
        return serve_instance()
    return 0 if run_in_order(run(arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
