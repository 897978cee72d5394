"""The simulator beside what it simulates: `hbserve serve` on this machine's cores, by a profile that is measured first.

    python benchmarks/simulator_beside_cpu.py                  # the demo model, 2 prefill and 2 decode instances
    python benchmarks/simulator_beside_cpu.py --rates 0.2 0.4 0.6 --model FOLDER --prefill 1 --decode 1

Instances of one host share its cores, which a profile of one instance knows nothing of: it is measured with the threads
that an instance has there, and a rate at which all compute at the same time is beyond what is compared.
Nothing else may run meanwhile.
"""

import argparse
import asyncio
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from hbserve.load.args import BenchServeArgs
from hbserve.load.arrivals import arrival_times
from hbserve.load.bench_serve import measure
from hbserve.load.compare import serving
from hbserve.simulator import report
from hbserve.simulator.engine import EngineLimits
from hbserve.simulator.profile import Profile, load_profile
from hbserve.simulator.simulation import Deployment, roles_of, simulate
from hbserve.simulator.workload import SimulatedRequest
from hbserve_scheduler import DeploymentConfig

FIGURES = ("request_throughput", "p50_ttft_ms", "p90_ttft_ms", "p50_tpot_ms", "p50_handoff_ms")
READY_TIMEOUT_S = 300.0


def measured_profile(arguments: argparse.Namespace) -> Profile:
    if arguments.profile:
        return load_profile(arguments.profile)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        model = ["--model", arguments.model] if arguments.model else []
        subprocess.run([sys.executable, "-m", "hbserve", "profile", *model, "-o", str(file)], check=True)
        return load_profile(str(file))


def simulated(profile: Profile, arguments: argparse.Namespace, rate: float) -> dict[str, Any]:
    """With the very arrivals of the load."""
    times = arrival_times(arguments.requests, rate)
    requests = [SimulatedRequest(at_s, arguments.input, arguments.output) for at_s in times]
    roles = roles_of(arguments.prefill, arguments.decode)
    return report.figures(simulate(Deployment(profile, roles, limits=EngineLimits()), requests), {})


async def compare(arguments: argparse.Namespace, profile: Profile) -> list[tuple[float, dict[str, Any]]]:
    base = DeploymentConfig()
    if arguments.model:
        base = msgspec.structs.replace(base, model=msgspec.structs.replace(base.model, path=arguments.model))
    roles = ["prefill"] * arguments.prefill + ["decode"] * arguments.decode
    found = []
    async with serving(base, roles) as server:
        for rate in arguments.rates:
            load = BenchServeArgs(
                base_url=server.url, num_prompts=arguments.requests, random_input_len=arguments.input,
                random_output_len=arguments.output, request_rate=rate, ignore_eos=True,
                ready_check_timeout_sec=READY_TIMEOUT_S, metric_percentiles="50,90",
            )  # fmt: skip
            figures, _, _ = await server.during(measure(load))
            found.append((rate, figures))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder; without it, the demo model")
    parser.add_argument("--profile", default="", help="one that is there, in place of measuring")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.6, 0.9])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=16)
    arguments = parser.parse_args()
    logging.getLogger("hbserve_scheduler").setLevel(logging.ERROR)
    profile = measured_profile(arguments)
    print(f"{'req/s':>6}  {'':20}{'measured':>12}{'simulated':>12}{'ratio':>8}")
    for rate, figures in asyncio.run(compare(arguments, profile)):
        model = simulated(profile, arguments, rate)
        for name in FIGURES:
            print(f"{rate:6g}  {name:20}{figures[name]:12.2f}{model[name]:12.2f}{model[name] / figures[name]:8.2f}")


if __name__ == "__main__":
    main()
