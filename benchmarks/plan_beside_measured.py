"""Which ratio the simulator would take, before anything is measured, and which is best: every layout measured at every
rate.

    python benchmarks/plan_beside_measured.py --layouts 1P3D,2P2D,3P1D,4H --rates 0.5 1 2 \
        --goodput ttft:2000 tpot:300                          # the demo model on this machine's cores
    python benchmarks/plan_beside_measured.py --model FOLDER --profile h100-qwen3-8b --layouts 1P3D,2P2D,3P1D,4H \
        --rates 8 16 24 32 --input 2048 --output 128 --goodput ttft:300 tpot:15       # four GPUs

Without --profile one instance is measured first (`hbserve profile`), with the cores that each has. For each rate: the
goodput of each layout, simulated and measured, which the simulator takes, and how much less that one reaches than the
best. Nothing else may run meanwhile.
"""

import argparse
import asyncio
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hbserve.load.args import CompareArgs
from hbserve.load.arrivals import arrival_times
from hbserve.load.compare import compare, layouts_of
from hbserve.load.report import goals_of
from hbserve.simulator import report
from hbserve.simulator.engine import EngineLimits
from hbserve.simulator.profile import Profile, load_profile
from hbserve.simulator.simulation import Deployment, simulate
from hbserve.simulator.workload import SimulatedRequest
from hbserve_rpc.messages import Role


def profile_of(arguments: argparse.Namespace, folder: Path) -> Profile:
    if arguments.profile:
        return load_profile(arguments.profile)
    file = folder / "profile.json"
    model = ["--model", arguments.model] if arguments.model else []
    subprocess.run([sys.executable, "-m", "hbserve", "profile", *model, "-o", str(file)], check=True)
    return load_profile(str(file))


def measured(arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, float], float]:
    """Goodput by layout and rate."""
    file = folder / "measured.json"
    args = CompareArgs(
        goodput=arguments.goodput,
        rates=",".join(f"{rate:g}" for rate in arguments.rates),
        model=Path(arguments.model) if arguments.model else None,
        layouts=arguments.layouts,
        input_len=arguments.input,
        output_len=arguments.output,
        num_prompts=arguments.requests,
        json=file,
    )
    asyncio.run(compare(args))
    rows = json.loads(file.read_text())
    return {(row["layout"], row["request_rate"]): row["request_goodput"] for row in rows}


def simulated(arguments: argparse.Namespace, profile: Profile, roles: Sequence[Role], rate: float) -> float:
    """Goodput, with the very arrivals of the load."""
    requests = [
        SimulatedRequest(at_s, arguments.input, arguments.output) for at_s in arrival_times(arguments.requests, rate)
    ]
    deployment = Deployment(profile, tuple(roles), limits=EngineLimits())
    found = report.figures(simulate(deployment, requests), goals_of(arguments.goodput))
    goodput: float = found["request_goodput"]
    return goodput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder; without it, the demo model")
    parser.add_argument("--profile", default="", help="one that is there, in place of measuring")
    parser.add_argument("--layouts", default="1P3D,2P2D,3P1D,4H")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--goodput", nargs="+", default=["ttft:2000", "tpot:300"], metavar="METRIC:MS")
    parser.add_argument("--requests", type=int, default=60, help="of each load")
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=16)
    arguments = parser.parse_args()
    logging.getLogger("hbserve_scheduler").setLevel(logging.ERROR)
    roles = layouts_of(arguments.layouts)
    layouts = list(roles)
    with tempfile.TemporaryDirectory() as name:
        profile = profile_of(arguments, Path(name))
        expected = {
            (each, rate): simulated(arguments, profile, roles[each], rate)
            for rate in arguments.rates
            for each in layouts
        }
        print(
            "\n".join(
                f"{rate:g} req/s: the simulator takes {choice(expected, layouts, rate)}" for rate in arguments.rates
            )
        )
        found = measured(arguments, Path(name))
    print(f"\n{'req/s':>6}  {'layout':8}{'simulated':>10}{'measured':>10}  goodput, req/s")
    for rate in arguments.rates:
        for each in layouts:
            print(f"{rate:6g}  {each:8}{expected[each, rate]:10.2f}{found[each, rate]:10.2f}")
        taken, best = choice(expected, layouts, rate), choice(found, layouts, rate)
        part = found[taken, rate] / found[best, rate] if found[best, rate] else 1.0
        print(f"{rate:6g}  takes {taken}, the best is {best}: {part:.2f} of it; bar 0.95")


def choice(goodputs: dict[tuple[str, float], float], layouts: list[str], rate: float) -> str:
    return max(layouts, key=lambda layout: goodputs[layout, rate])


if __name__ == "__main__":
    main()
