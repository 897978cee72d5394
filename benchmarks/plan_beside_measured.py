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
import json
import logging
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hbserve.load.arrivals import arrival_times
from hbserve.simulator import report
from hbserve.simulator.engine import EngineLimits
from hbserve.simulator.profile import Profile, load_profile
from hbserve.simulator.simulation import Deployment, roles_of, simulate
from hbserve.simulator.workload import SimulatedRequest

HBSERVE = (sys.executable, "-m", "hbserve")
NAMES = {"P": "prefill", "D": "decode", "H": "hybrid"}


def profile_of(arguments: argparse.Namespace, folder: Path) -> Profile:
    if arguments.profile:
        return load_profile(arguments.profile)
    file = folder / "profile.json"
    subprocess.run([*HBSERVE, "profile", *model_of(arguments), "-o", str(file)], check=True)
    return load_profile(str(file))


def model_of(arguments: argparse.Namespace) -> list[str]:
    return ["--model", arguments.model] if arguments.model else []


def measured(arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, float], float]:
    """Goodput by layout and rate."""
    file = folder / "measured.json"
    options: dict[str, Any] = {
        "layouts": arguments.layouts, "rates": ",".join(f"{rate:g}" for rate in arguments.rates),
        "num-prompts": arguments.requests, "input-len": arguments.input, "output-len": arguments.output, "json": file,
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    goals = [word for goal in arguments.goodput for word in ("--goodput", goal)]
    subprocess.run([*HBSERVE, "bench", "compare", *model_of(arguments), *flags, *goals], check=True)
    rows = json.loads(file.read_text())
    return {(row["layout"], row["request_rate"]): row["request_goodput"] for row in rows}


def simulated(arguments: argparse.Namespace, profile: Profile, layout: str, rate: float) -> float:
    """Goodput, with the very arrivals of the load."""
    counts = Counter({NAMES[letter]: int(count) for count, letter in zip(layout[::2], layout[1::2], strict=True)})
    requests = [
        SimulatedRequest(at_s, arguments.input, arguments.output) for at_s in arrival_times(arguments.requests, rate)
    ]
    roles = roles_of(counts["prefill"], counts["decode"], counts["hybrid"])
    goals_s = {metric: float(ms) / 1e3 for metric, _, ms in (goal.partition(":") for goal in arguments.goodput)}
    found = report.figures(simulate(Deployment(profile, roles, limits=EngineLimits()), requests), goals_s)
    goodput: float = found["request_goodput"]
    return goodput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder; without it, the demo model")
    parser.add_argument("--profile", default="", help="one that is there, in place of measuring")
    parser.add_argument("--layouts", default="1P3D,2P2D,3P1D,4H", help="at most nine instances of a role")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--goodput", nargs="+", default=["ttft:2000", "tpot:300"], metavar="METRIC:MS")
    parser.add_argument("--requests", type=int, default=60, help="of each load")
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=16)
    arguments = parser.parse_args()
    logging.getLogger("hbserve_scheduler").setLevel(logging.ERROR)
    layouts = arguments.layouts.upper().split(",")
    with tempfile.TemporaryDirectory() as name:
        profile = profile_of(arguments, Path(name))
        expected = {
            (each, rate): simulated(arguments, profile, each, rate) for rate in arguments.rates for each in layouts
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
