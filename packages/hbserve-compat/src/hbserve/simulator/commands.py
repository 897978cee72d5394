"""Arguments of the commands `hbserve profile`, `simulate` and `plan`, and what the last two do."""

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from typer import Option

from hbserve.load.prompts import MOONCAKE_BLOCK, MOST_REQUESTS, MOST_TOKENS
from hbserve.load.report import goals_of
from hbserve.output_file import require_folder_of, writing
from hbserve.plotting import require_plotting
from hbserve.simulator import plan_report, report, workload
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.plan import Question, make_plan
from hbserve.simulator.profile import load_profile, own_profiles
from hbserve.simulator.simulation import Deployment, Fault, roles_of, simulate
from hbserve.simulator.workload import SimulatedRequest
from hbserve_rpc import InvalidRequest
from hbserve_scheduler import SchedulerConfig, load_config

POLLED_A_SECOND = 200
"""How many instances are asked for their figures in a second. In a large deployment each is asked less often."""
MOST_MS = 1e9
MOST_TURNS_A_SECOND = 1e6
"""Highest rate with `--conversations`: as many conversations go on at a time as turns come in a minute."""
ProfileOption = Annotated[str, Option(metavar="NAME|FILE", help=f"One of {', '.join(own_profiles())}, or a file.")]
MOST_INSTANCES, MOST_REPEATS = 100_000, 10_000
Count = Annotated[int, Option(min=0, max=MOST_INSTANCES)]
Length = Annotated[int, Option(min=1, max=MOST_TOKENS)]


@dataclass(frozen=True)
class ProfileArgs:
    """The command's arguments."""

    output: Annotated[Path, Option("--output", "-o", help="The profile, a JSON file.")]
    model: Annotated[Path | None, Option(help="A Hugging Face model folder; without it, the demo model.")] = None
    name: Annotated[str | None, Option(help="Of the profile; the model's and the device's by default.")] = None
    device: Annotated[str, Option(help="auto, cpu or cuda:N.")] = "auto"
    dtype: Annotated[str, Option(help="auto is the model's own.")] = "auto"
    random_weights: Annotated[bool, Option("--random-weights", help="Read only the model's config.json.")] = False
    tensor_parallel_size: Annotated[int, Option(min=1)] = 1
    prompt_lens: Annotated[str | None, Option(metavar="16,64,…", help="Up to 16384 on a GPU, to 256 elsewhere.")] = None
    batch_sizes: Annotated[str | None, Option(metavar="1,2,…", help="Up to 256 on a GPU, up to 16 elsewhere.")] = None
    contexts: Annotated[str | None, Option(metavar="512,…", help="512 and 8192 on a GPU, 64 and 256 elsewhere.")] = None
    kv_transfer_backend: Annotated[str, Option(help="nccl, mooncake, ipc or auto.")] = "auto"
    megabytes: Annotated[str, Option(metavar="1,16,…", help="Of transfers.")] = "1,16,64,256"


@dataclass(frozen=True)
class SimulateArgs:
    """The command's arguments."""

    profile: ProfileOption = "h100-qwen3-8b"
    prefill_profile: Annotated[
        str | None, Option(metavar="NAME|FILE", help="Of prefill instances, where they are others: of more ranks.")
    ] = None
    prefill: Annotated[int, Option(min=0, max=MOST_INSTANCES, help="With none of any kind, one pair.")] = 0
    decode: Count = 0
    hybrid: Count = 0
    cells: Annotated[
        int, Option(min=1, max=MOST_INSTANCES, help="Deployments that share nothing; sessions are hashed to them.")
    ] = 1
    config: Annotated[Path | None, Option(help="A deployment's file, for its scheduler and its chunk sizes.")] = None
    num_requests: Annotated[int, Option(min=1, max=MOST_REQUESTS)] = 1000
    rate: Annotated[float, Option(min=0.001, help="Requests a second.")] = 4.0
    burstiness: Annotated[float, Option(min=0.001, help="1 is a Poisson process, less is burstier.")] = 1.0
    input_len: Length = 1024
    output_len: Length = 128
    spread: Annotated[float, Option(min=0, max=3, help="Of lengths: of their logarithm.")] = 0.0
    conversations: Annotated[bool, Option("--conversations", help="Prompts of Mooncake's conversation shape.")] = False
    trace: Annotated[Path | None, Option(help="A timed trace, of Mooncake's format.")] = None
    speed: Annotated[float, Option(min=0.001, help="Of the trace, by its own.")] = 1.0
    repeat: Annotated[int, Option(min=1, max=MOST_REPEATS, help="The trace, so many times, with other prompts.")] = 1
    fault: Annotated[
        list[str] | None, Option(metavar="INSTANCE@SECONDS[+DOWN]", help="Kill it then, and start it again after DOWN.")
    ] = None
    goodput: Annotated[list[str] | None, Option(metavar="METRIC:MS", help="ttft, tpot or e2el; may be repeated.")] = (
        None
    )
    json: Annotated[Path | None, Option(help="A file for all figures.")] = None
    seed: int = 0


@dataclass(frozen=True)
class PlanArgs:
    """The command's arguments."""

    input_len: Annotated[int, Option(min=1, help="Prompt tokens of a request.")]
    output_len: Annotated[int, Option(min=1, help="Tokens of an answer.")]
    rate: Annotated[float, Option(min=0.001, help="Requests a second.")]
    ttft_ms: Annotated[float, Option(min=0.1, max=MOST_MS, help="To be kept by the first token.")]
    tpot_ms: Annotated[float, Option(min=0.1, max=MOST_MS, help="To be kept by the mean time of each further token.")]
    itl_ms: Annotated[
        float | None,
        Option(min=0.1, max=MOST_MS, help="To be kept by 99 of 100 times between two tokens; none by default."),
    ] = None
    profile: ProfileOption = "h100-qwen3-8b"
    attainment: Annotated[float, Option(min=0.01, max=1, help="The part of all requests that is to keep both.")] = 0.9
    spread: Annotated[float, Option(min=0, max=3, help="Of lengths: of their logarithm.")] = 0.0
    chunk_size: Annotated[
        int | None, Option(min=1, help="Of prompts; without it as instances have it, and hybrids also for the goal.")
    ] = None
    most_instances: Annotated[int, Option(min=1, max=512)] = 64
    plot: Annotated[Path | None, Option(help="Write a picture: .png or .svg.")] = None
    seed: int = 0


def run_simulation(args: SimulateArgs) -> None:
    """Run `hbserve simulate`. Raises InvalidRequest, ConfigError, OSError."""
    if args.json is not None:
        require_folder_of("--json", args.json)
    deployment, goals_s = _deployment(args), goals_of(args.goodput or [])
    began_s = time.process_time()
    results = simulate(deployment, _requests(args), cells=args.cells)
    found = report.figures(results, goals_s)
    sys.stdout.writelines(f"{line}\n" for line in report.lines(found))
    sys.stderr.write(f"simulated in {time.process_time() - began_s:.1f} s of processor time\n")
    if args.json is not None:
        with writing(args.json):
            args.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _deployment(args: SimulateArgs) -> Deployment:
    config = load_config(args.config) if args.config is not None else None
    scheduler = config.scheduler if config is not None else SchedulerConfig()
    limits = EngineLimits.of(config.engine_settings()) if config is not None else EngineLimits()
    counts = args.prefill, args.decode, args.hybrid
    if not any(counts):
        counts = (1, 1, 0)
    if bool(counts[0]) != bool(counts[1]):
        raise InvalidRequest(f"--prefill={counts[0]} --decode={counts[1]}: expected some of both or of neither")
    if min(filter(None, counts)) < args.cells:
        raise InvalidRequest(f"--cells={args.cells}: each needs an instance of each role")
    roles = roles_of(*counts)
    interval_s = max(scheduler.heartbeat_interval_s, len(roles) / args.cells / POLLED_A_SECOND)
    scheduler = msgspec.structs.replace(scheduler, heartbeat_interval_s=interval_s)
    of_prefill = load_profile(args.prefill_profile) if args.prefill_profile is not None else None
    deployment = Deployment(load_profile(args.profile), roles, scheduler, limits, _faults(args), of_prefill)
    names = {name for name, _ in deployment.instances()}
    for fault in deployment.faults:
        if fault.instance_id not in names:
            raise InvalidRequest(f"--fault={fault.instance_id!r}: expected one of {', '.join(sorted(names)[:8])} …")
    return deployment


def _faults(args: SimulateArgs) -> tuple[Fault, ...]:
    faults = []
    for each in args.fault or []:
        found = re.fullmatch(r"(.+)@(\d+\.?\d*)(?:\+(\d+\.?\d*))?", each)
        if found is None:
            raise InvalidRequest(f"--fault={each!r}: expected INSTANCE@SECONDS or INSTANCE@SECONDS+DOWN")
        faults.append(Fault(found[1], float(found[2]), float(found[3] or "inf")))
    return tuple(faults)


def _requests(args: SimulateArgs) -> Iterator[SimulatedRequest]:
    if args.trace is not None:
        return workload.trace(args.trace, block_size=MOONCAKE_BLOCK, unit_s=1e-3, speed=args.speed, repeat=args.repeat)
    if args.conversations:
        if args.rate > MOST_TURNS_A_SECOND:
            raise InvalidRequest(
                f"--rate={args.rate:g}: with --conversations, expected at most {MOST_TURNS_A_SECOND:g}"
            )
        return workload.conversations(args.num_requests, args.rate, seed=args.seed)
    lengths = args.input_len, args.output_len
    return workload.poisson(
        args.num_requests, args.rate, *lengths, burstiness=args.burstiness, spread=args.spread, seed=args.seed
    )


def run_plan(args: PlanArgs) -> None:
    """Run `hbserve plan`. Raises InvalidRequest, PlottingUnavailable, OSError."""
    if args.plot is not None:
        require_plotting(args.plot)
    plan = make_plan(
        Question(
            load_profile(args.profile),
            args.input_len,
            args.output_len,
            args.rate,
            args.ttft_ms / 1e3,
            args.tpot_ms / 1e3,
            args.itl_ms and args.itl_ms / 1e3,
            args.attainment,
            args.spread,
            args.chunk_size,
            args.most_instances,
            args.seed,
        )
    )
    sys.stdout.writelines(f"{line}\n" for line in plan_report.lines(plan))
    if args.plot is not None:
        plan_report.plot_plan(plan, args.plot)
        sys.stdout.write(f"The picture is {args.plot}.\n")
