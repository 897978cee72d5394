"""Arguments of the commands `hbserve profile`, `simulate` and `plan`, and the work of the last two."""

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typer import Option

from hbserve.load.args import LEAST_RATE, Burstiness, tokens_option
from hbserve.load.prompts import MOONCAKE_BLOCK, MOST_REQUESTS
from hbserve.load.report import goals_of
from hbserve.options import MOST, Dtype, file_option, number_option, ranks_option
from hbserve.output_file import require_writable, write_results
from hbserve.plotting import require_plotting
from hbserve.simulator import plan_report, report, workload
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.plan import Question, make_plan
from hbserve.simulator.profile import load_profile, own_profiles
from hbserve.simulator.simulation import Deployment, Fault, roles_of, simulate
from hbserve.simulator.workload import SimulatedRequest
from hbserve_rpc import InvalidRequest
from hbserve_rpc.plain_values import shown
from hbserve_scheduler import SchedulerConfig, load_config

POLLED_A_SECOND = 200
"""Most instances that are asked for their figures in a second. In a large deployment, each is asked less often."""
MOST_TURNS_A_SECOND = 1e6
"""Highest rate with `--conversations`. The number of concurrent conversations is that of the turns in a minute."""
ProfileOption = Annotated[
    str,
    Option(
        metavar="NAME|FILE",
        help="Measured times of an instance: a file of `hbserve profile`, or one of those that are part of HBServe: "
        f"{', '.join(own_profiles())}.",
    ),
]
MOST_INSTANCES, MOST_REPEATS = 100_000, 10_000
SPREAD = number_option(
    "How much the lengths of prompts and answers vary: standard deviation of their logarithm; 0: all are equal.",
    least=0,
    most=3,
)


def _count(what: str) -> Any:
    return Option(min=0, max=MOST_INSTANCES, help=what)


@dataclass(frozen=True)
class ProfileArgs:
    """The command's arguments."""

    output: Annotated[Path, Option("--output", "-o", help="JSON file to write the profile to.")]
    model: Annotated[Path | None, Option(help="Hugging Face model folder. By default the demo model.")] = None
    name: Annotated[
        str | None, Option(help="Name of the profile. By default made of the model's and the device's names.")
    ] = None
    device: Annotated[str, Option(help="Device to measure: cpu or cuda:N; auto is the first GPU, or else the CPU.")] = (
        "auto"
    )
    dtype: Annotated[Dtype, Option(help="Number format to compute in; auto is the model's own.")] = Dtype.AUTO
    random_weights: Annotated[
        bool, Option("--random-weights", help="Read config.json only, and make the weights up: times are the same.")
    ] = False
    tensor_parallel_size: Annotated[int, ranks_option("Number of GPUs that the instance is split over.")] = 1
    prompt_lens: Annotated[
        str | None,
        Option(metavar="16,64,…", help="Prompt lengths to measure. By default up to 16384 tokens on a GPU, else 256."),
    ] = None
    batch_sizes: Annotated[
        str | None,
        Option(metavar="1,2,…", help="Batch sizes of decode to measure. By default up to 256 on a GPU, else 16."),
    ] = None
    contexts: Annotated[
        str | None,
        Option(
            metavar="512,…",
            help="Context lengths of decode to measure, in tokens. By default 512 and 8192 on a GPU, else 64 and 256.",
        ),
    ] = None
    kv_transfer_backend: Annotated[
        str, Option(help="Backend whose transfers are measured: nccl, mooncake, ipc, or auto, which chooses.")
    ] = "auto"
    megabytes: Annotated[str, Option(metavar="1,16,…", help="Sizes of transfers to measure, in MB.")] = "1,16,64,256"


@dataclass(frozen=True)
class SimulateArgs:
    """The command's arguments."""

    profile: ProfileOption = "h100-qwen3-8b"
    prefill_profile: Annotated[
        str | None,
        Option(metavar="NAME|FILE", help="Another profile for prefill instances. By default they have --profile too."),
    ] = None
    prefill: Annotated[int, _count("Number of prefill instances. With no instance of any role: one pair.")] = 0
    decode: Annotated[int, _count("Number of decode instances.")] = 0
    hybrid: Annotated[int, _count("Number of hybrid instances, which compute prompts and answers.")] = 0
    cells: Annotated[
        int,
        Option(
            min=1,
            max=MOST_INSTANCES,
            help="Number of deployments that the instances are divided into, each with a scheduler; "
            "all requests of a session go to the same one.",
        ),
    ] = 1
    config: Annotated[
        Path | None,
        file_option("YAML file of a deployment, for the settings of its scheduler and its chunk sizes."),
    ] = None
    num_requests: Annotated[
        int, Option(min=1, max=MOST_REQUESTS, help="Number of requests; of a trace, all are sent.")
    ] = 1000
    rate: Annotated[
        float, number_option("Mean number of requests that arrive per second.", least=LEAST_RATE, most=None)
    ] = 4.0
    burstiness: Burstiness = 1.0
    input_len: Annotated[int, tokens_option("Length of prompts, in tokens.")] = 1024
    output_len: Annotated[int, tokens_option("Length of answers, in tokens.")] = 128
    spread: Annotated[float, SPREAD] = 0.0
    conversations: Annotated[
        bool,
        Option("--conversations", help="Simulate conversations, whose prompts grow, of the shape of Mooncake's trace."),
    ] = False
    trace: Annotated[
        Path | None, file_option("Timed trace in Mooncake's format, whose requests are sent when it says.")
    ] = None
    speed: Annotated[float, number_option("How many times faster than its own times a trace is sent.", least=0.001)] = (
        1.0
    )
    repeat: Annotated[
        int, Option(min=1, max=MOST_REPEATS, help="How many times a trace is sent, with other prompts each time.")
    ] = 1
    fault: Annotated[
        list[str] | None,
        Option(
            metavar="INSTANCE@SECONDS[+DOWN]",
            help="Kill an instance so many seconds after the beginning, and start it again DOWN seconds later, "
            "or never. May be repeated.",
        ),
    ] = None
    goodput: Annotated[
        list[str] | None,
        Option(metavar="METRIC:MS", help="Goal for ttft, tpot or e2el, in milliseconds; may be repeated."),
    ] = None
    json: Annotated[Path | None, Option(help="Write all figures to this JSON file.")] = None
    seed: Annotated[int, Option(help="Seed of lengths and arrival times: the same seed gives the same result.")] = 0


@dataclass(frozen=True)
class PlanArgs:
    """The command's arguments."""

    input_len: Annotated[int, tokens_option("Length of prompts, in tokens.")]
    output_len: Annotated[int, tokens_option("Length of answers, in tokens.")]
    rate: Annotated[float, number_option("Mean number of requests that arrive per second.", least=LEAST_RATE)]
    ttft_ms: Annotated[float, number_option("Goal for the time to the first token, in ms.", least=0.1)]
    tpot_ms: Annotated[float, number_option("Goal for the mean time per further token, in ms.", least=0.1)]
    itl_ms: Annotated[
        float | None,
        number_option(
            "Goal for the 99th percentile of the times between tokens, in milliseconds. By default none.", least=0.1
        ),
    ] = None
    profile: ProfileOption = "h100-qwen3-8b"
    attainment: Annotated[
        float, number_option("Share of requests that must meet both goals: 0.9 is 90 %.", least=0.01, most=1)
    ] = 0.9
    spread: Annotated[float, SPREAD] = 0.0
    chunk_size: Annotated[
        int | None,
        tokens_option(
            "Most prompt tokens in one step. By default as instances have it; for hybrids also one for the goal."
        ),
    ] = None
    most_instances: Annotated[int, Option(min=1, max=512, help="Most instances that an answer may have.")] = 64
    plot: Annotated[Path | None, Option(help="Write a picture to this file, .png or .svg.")] = None
    seed: Annotated[int, Option(help="Seed of lengths and arrival times.")] = 0


_OF_LOAD = {
    "": ("num_requests", "rate", "burstiness", "input_len", "output_len", "spread"),
    "--conversations": ("num_requests", "rate"),
    "--trace": ("speed", "repeat"),
}
"""Options of each load, by the option that chooses it."""


def run_simulation(args: SimulateArgs) -> None:
    """Run `hbserve simulate`. Raises InvalidRequest, ConfigError, OSError."""
    if args.json is not None:
        require_writable("--json", args.json)
    deployment, goals_s = _deployment(args), goals_of(args.goodput or [])
    began_s = time.process_time()
    results = simulate(deployment, _requests(args), cells=args.cells)
    found = report.figures(results, goals_s)
    took_s = time.process_time() - began_s
    try:
        sys.stdout.writelines(f"{line}\n" for line in report.lines(found))
        sys.stderr.write(f"simulated in {took_s:.1f} s of processor time\n")
    finally:  # although nobody may read the report any more
        if args.json is not None:
            write_results(args.json, json.dumps(found) + "\n")


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
    of_prefill = None
    if args.prefill_profile is not None:
        of_prefill = load_profile(args.prefill_profile, "--prefill-profile")
    deployment = Deployment(load_profile(args.profile), roles, scheduler, limits, _faults(args), of_prefill)
    names = {name for name, _ in deployment.instances()}
    for fault in deployment.faults:
        if fault.instance_id not in names:
            raise InvalidRequest(
                f"--fault={shown(fault.instance_id)}: expected one of {', '.join(sorted(names)[:8])} …"
            )
    return deployment


def _faults(args: SimulateArgs) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    for each in args.fault or []:
        found = re.fullmatch(r"(.+)@(\d+\.?\d*)(?:\+(\d+\.?\d*))?", each)
        if found is None:
            raise InvalidRequest(f"--fault={shown(each)}: expected INSTANCE@SECONDS or INSTANCE@SECONDS+DOWN")
        fault = Fault(found[1], float(found[2]), float(found[3] or "inf"))
        if fault.at_s > MOST:
            raise InvalidRequest(f"--fault={shown(each)}: expected at most {MOST} seconds")
        if any((fault.instance_id, fault.at_s) == (other.instance_id, other.at_s) for other in faults):
            raise InvalidRequest(f"--fault={shown(each)}: this instance is killed at this time already")
        faults.append(fault)
    return tuple(faults)


def _require_no_other(args: SimulateArgs, load: str) -> None:
    """Check that no option of another load is set, because it would have no effect. Raises InvalidRequest."""
    for name in {each for options in _OF_LOAD.values() for each in options}.difference(_OF_LOAD[load]):
        if (value := getattr(args, name)) != getattr(SimulateArgs, name):
            where = f"with {load}" if load else "without --trace"
            raise InvalidRequest(f"--{name.replace('_', '-')}={value:g}: has no effect {where}")


def _requests(args: SimulateArgs) -> Iterator[SimulatedRequest]:
    if args.trace is not None and args.conversations:
        raise InvalidRequest("--trace and --conversations: expected one of them")
    _require_no_other(args, "--trace" if args.trace is not None else "--conversations" if args.conversations else "")
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
    try:
        sys.stdout.writelines(f"{line}\n" for line in plan_report.lines(plan))
    finally:  # although nobody may read the answer any more
        if args.plot is not None:
            plan_report.plot_plan(plan, args.plot)
    if args.plot is not None:
        sys.stdout.write(f"The picture is {args.plot}.\n")
