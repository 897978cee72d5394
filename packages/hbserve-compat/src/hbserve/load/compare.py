"""`hbserve bench compare`: measures the same devices as hybrid instances and as separate prefill and decode instances,
under equal loads."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hbserve.check.this_host import list_gpus
from hbserve.load.args import LEAST_RATE, BenchServeArgs, CompareArgs
from hbserve.load.bench_serve import measure
from hbserve.load.report import goals_of
from hbserve.models.demo_model import find_model_folder
from hbserve.options import MOST, numbers
from hbserve.output_file import require_writable, write_results
from hbserve.plotting import figure_of, require_plotting
from hbserve_rpc import InvalidRequest
from hbserve_rpc.messages import Role
from hbserve_rpc.plain_values import shown
from hbserve_scheduler import DeploymentConfig, load_config

T = TypeVar("T")

ROLES: dict[str, Role] = {"P": "prefill", "D": "decode", "H": "hybrid"}
HYBRID = "H"
STOP_TIMEOUT_S = 60.0
MOST_ON_A_DEVICE = 4
"""Most instances for each GPU or core. A comparison wants one; more than this the machine can hardly hold."""
MUCH_MORE = 1.05
"""Smallest ratio of two goodputs that counts as a difference."""


@dataclass(frozen=True)
class Measured:
    """Figures of one layout under one load."""

    layout: str
    rate: float
    figures: dict[str, Any]

    @property
    def goodput(self) -> float:
        return float(self.figures["request_goodput"])


async def compare(args: CompareArgs) -> None:
    """Measure the layouts, print a table and a recommendation, and write the files that were asked for.

    Raises InvalidRequest, ConfigError, OSError, what `bench_serve` raises, and RuntimeError if a server ends by itself.
    """
    goals_of(args.goodput)
    rates = numbers("--rates", args.rates, float, least=LEAST_RATE, most=MOST)
    layouts = layouts_of(args.layouts)
    if args.plot is not None:
        require_plotting(args.plot)
    if args.json is not None:
        require_writable("--json", args.json)
    base = _base(args)
    if base.model.path is not None:
        await find_model_folder(base.model.path)
    _require_room(args.layouts, len(next(iter(layouts.values()))), base)
    found: list[Measured] = []
    for name, roles in layouts.items():
        async with serving(base, roles) as server:
            for seed, rate in enumerate(rates, args.seed):  # the previous rate's prompts are in the prefix caches
                sys.stderr.write(f"{name}, {rate:g} requests a second\n")
                found.append(Measured(name, rate, await server.during(_load(args, server.url, rate, seed))))
    try:
        sys.stdout.writelines(f"{line}\n" for line in lines(found))
    finally:  # although nobody may read the table any more
        if args.json is not None:
            write_results(args.json, json.dumps([{"layout": each.layout, **each.figures} for each in found]) + "\n")
        if args.plot is not None:
            _plot(args.plot, found)


def layouts_of(text: str) -> dict[str, list[Role]]:
    """Return the roles of each layout's instances. All layouts must have equally many instances, because otherwise a
    comparison would be meaningless. Raises InvalidRequest."""
    layouts: dict[str, list[Role]] = {}
    for name in text.upper().split(","):
        counts = {letter: int(count) for count, letter in re.findall(r"([0-9]{1,4})([PDH])", name)}
        roles = [role for letter, role in ROLES.items() for _ in range(counts.get(letter, 0))]
        is_whole = "".join(f"{count}{letter}" for letter, count in counts.items()) == name
        if not is_whole or not roles or ("prefill" in roles) != ("decode" in roles):
            raise InvalidRequest(f"--layouts={shown(text)}: expected layouts such as 2H,1P1D; got {shown(name)}")
        if name in layouts:
            raise InvalidRequest(f"--layouts={shown(text)}: {name} is there twice")
        layouts[name] = roles
    if len({len(roles) for roles in layouts.values()}) != 1:
        raise InvalidRequest(f"--layouts={shown(text)}: expected layouts with the same number of instances")
    return layouts


def _base(args: CompareArgs) -> DeploymentConfig:
    """Return the settings of all layouts. Raises ConfigError."""
    base = load_config(args.config) if args.config is not None else DeploymentConfig()
    if args.model is None:
        return base
    given = Path(os.path.expanduser(args.model))
    path = str(given.absolute() if given.exists() else args.model)  # else an id of the hub
    return msgspec.structs.replace(base, model=msgspec.structs.replace(base.model, path=path))


def _require_room(layouts: str, count: int, config: DeploymentConfig) -> None:
    """Check that this machine can hold so many instances at a time. Raises InvalidRequest."""
    settings = config.engine_settings()
    gpus = [] if settings.device == "cpu" else list_gpus()
    devices = len(gpus) // settings.tensor_parallel_size if gpus else len(os.sched_getaffinity(0))
    if count > MOST_ON_A_DEVICE * max(1, devices):
        there = f"{len(gpus)} GPUs" if gpus else f"{devices} cores"
        problem = (
            f"{count} instances at a time, and {there} here; expected at most {MOST_ON_A_DEVICE * max(1, devices)}"
        )
        raise InvalidRequest(f"--layouts={shown(layouts)}: {problem}")


@contextlib.asynccontextmanager
async def serving(base: DeploymentConfig, roles: Sequence[str]) -> AsyncIterator["Server"]:
    """Run `hbserve serve` with instances of these roles and the other settings of `base`. It may not be ready yet."""
    config = msgspec.to_builtins(base)
    config["gpu_instances"] = [
        {"instance_id": f"{role}-{rank}", "instance_type": role, "kv_rank": rank} for rank, role in enumerate(roles)
    ]
    port = _free_port()
    config["server"] |= {"port": port, "host": "127.0.0.1", "uds": None, "enabled": True}
    config["scheduler"] |= {"port": 0}
    with tempfile.TemporaryDirectory(prefix="hbserve-compare-") as folder:
        file = Path(folder) / "layout.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        command = ("-P", "-m", "hbserve", "serve", "--config", str(file), "--log-level", "WARNING")
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.DEVNULL)
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            yield server
        finally:
            await server.end()


class Server:
    """A process of `hbserve serve`."""

    def __init__(self, url: str, process: asyncio.subprocess.Process) -> None:
        self.url = url
        self._process = process
        self._ended = asyncio.create_task(process.wait())

    async def during(self, job: Coroutine[Any, Any, T]) -> T:
        """Run a job and return its result. Raises RuntimeError if the process ends first."""
        task = asyncio.create_task(job)
        try:
            await asyncio.wait([task, self._ended], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise RuntimeError(f"hbserve serve has ended by itself, with status {self._process.returncode}")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._ended.done():
                with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody has heard of it yet
                    self._process.send_signal(number)
                await asyncio.wait([self._ended], timeout=STOP_TIMEOUT_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


async def _load(args: CompareArgs, url: str, rate: float, seed: int) -> dict[str, Any]:
    load = BenchServeArgs(
        base_url=url,
        num_prompts=args.num_prompts,
        random_input_len=args.input_len,
        random_output_len=args.output_len,
        request_rate=rate,
        ignore_eos=True,
        goodput=args.goodput,
        metric_percentiles="50,90,99",
        ready_check_timeout_sec=args.ready_timeout_s,
        seed=seed,
    )
    result, sent, _ = await measure(load)
    if sent.was_cut:
        raise asyncio.CancelledError
    return result


def lines(found: Sequence[Measured]) -> Iterator[str]:
    """Yield the lines of a table, and of a recommendation."""
    yield f"{'req/s':>7}  {'layout':12}{'goodput':>9}{'attained':>10}{'TTFT p90':>11}{'TPOT p90':>11}{'ITL p99':>11}"
    for each in sorted(found, key=lambda each: each.rate):
        figures = each.figures
        yield (
            f"{each.rate:7g}  {each.layout:12}{each.goodput:9.2f}{figures['slo_attainment']:10.1%}"
            f"{figures['p90_ttft_ms']:8.0f} ms{figures['p90_tpot_ms']:8.1f} ms{figures['p99_itl_ms']:8.1f} ms"
        )
    yield ""
    yield _advice(found)
    if any(each.figures["client_is_bottleneck"] for each in found):
        yield "The load generator was itself too slow in some of these: see client_lag_p99_ms with --json."


def _advice(found: Sequence[Measured]) -> str:
    best: dict[str, float] = {}
    for each in found:
        best[each.layout] = max(best.get(each.layout, 0.0), each.goodput)
    winner, most = max(best.items(), key=lambda each: each[1])
    if most == 0:
        return "None meets its goals at any of these rates: lower the rates, or relax the goals."
    simple = {layout: goodput for layout, goodput in best.items() if HYBRID in layout}
    if winner not in simple and simple and most < MUCH_MORE * max(simple.values()):
        winner, as_good = max(simple, key=lambda layout: simple[layout]), winner
        return f"Take {winner}: it reaches {simple[winner]:.2f} requests a second within its goals and is simpler; " + (
            f"{as_good} reaches {most:.2f}."
        )
    others = ", ".join(f"{layout} {goodput:.2f}" for layout, goodput in best.items() if layout != winner)
    return f"Take {winner}: {most:.2f} requests a second within its goals" + (f"; {others}." if others else ".")


def _plot(path: Path, found: Sequence[Measured]) -> None:
    with figure_of(path, 1, 1, "Goodput of the same devices") as ((axes,),):
        for layout in dict.fromkeys(each.layout for each in found):
            of_layout = [each for each in found if each.layout == layout]
            axes.plot([each.rate for each in of_layout], [each.goodput for each in of_layout], "o-", label=layout)
        rates = sorted({each.rate for each in found})
        axes.plot(rates, rates, ":", color="gray", label="all of them")
        axes.set_xlabel("requests a second that were sent")
        axes.set_ylabel("requests a second within their goals")
        axes.grid(alpha=0.3)
        axes.legend()
