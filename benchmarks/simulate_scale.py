"""Processor time and memory of a simulation, by default of 1,000 instances and 1,000,000 requests of Mooncake's
conversation shape, and the cost of cells.

    python benchmarks/simulate_scale.py
    python benchmarks/simulate_scale.py --instances 2000 --requests 60000 --cells 1 10 --rate 2
"""

import argparse
import logging
import resource
import time

from hbserve.simulator import report
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.profile import load_profile
from hbserve.simulator.simulation import Deployment, roles_of, simulate
from hbserve.simulator.workload import conversations
from hbserve_scheduler import SchedulerConfig

GOALS_S = {"ttft": 2.0, "tpot": 0.02}


def run(instances: int, requests: int, cells: int, profile: str, rate: float) -> None:
    pairs = instances // 2
    scheduler = SchedulerConfig(heartbeat_interval_s=max(1.0, instances / cells / 200))
    deployment = Deployment(load_profile(profile), roles_of(pairs, pairs), scheduler, EngineLimits(chunk_size=2048))
    began_s = time.process_time()
    results = simulate(deployment, conversations(requests, rate * pairs), cells=cells)
    took_s = time.process_time() - began_s
    print("\n".join(report.lines(report.figures(results, GOALS_S))))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{instances} instances in {cells} cells, {requests} requests: {took_s:.0f} s of processor time, ", end="")
    print(f"{took_s / requests * 1e6:.0f} us a request, {peak_gb:.2f} GB at most\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--cells", type=int, nargs="+", default=[1])
    parser.add_argument("--profile", default="h100-qwen3-8b")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="requests a second, for each prefill and decode instance"
    )
    arguments = parser.parse_args()
    logging.getLogger("hbserve_scheduler").setLevel(logging.ERROR)
    for cells in arguments.cells:
        run(arguments.instances, arguments.requests, cells, arguments.profile, arguments.rate)


if __name__ == "__main__":
    main()
