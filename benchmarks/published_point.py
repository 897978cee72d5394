"""The simulator compared with a published result: DistServe's (OSDI '24), of OPT-13B on A100s, with ShareGPT's lengths.

That result compares the vLLM of that time with prefill and decode apart, at the same rates for each GPU.

    python benchmarks/published_point.py          # half a minute of a core, no GPU

Their artifact (github.com/LLMServe/DistServe) publishes the times of prompts and decode steps, fitted to measurements
of each engine; and the share of requests that keep 200 ms to the first token and 100 ms for each further one, by their
simulator, for 100 requests for each GPU, at 1 to 5 requests a second for each GPU.

This script assumes three things: lengths are drawn independently, with the deciles of one of their traces; KV moves at
25 GB/s; and decodes are computed in the step of a prompt, while that vLLM had separate steps for prompts and decodes.
Their simulator computes all waiting prompts in one step, and has room for all KV; this one is set to do the same.
"""

import argparse
import itertools
import logging
import random
import statistics
from collections.abc import Iterator

from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.profile import Profile
from hbserve.simulator.report import attained
from hbserve.simulator.simulation import Deployment, roles_of, simulate
from hbserve.simulator.workload import SimulatedRequest

Law = tuple[float, float, float]
"""Milliseconds of a step: the constant part, the part for each token (in a decode step, of all contexts), and the part
for each squared token of a prompt (in a decode step, for each sequence)."""

MOST_TOKENS = 1 << 16
"""Most tokens of a step, which is no bound in practice."""
MANY = 95
"""Number of sequences from which on a decode step has another law."""
GOALS_S = {"ttft": 0.2, "tpot": 0.1}
RATES = (1, 2, 3, 4, 5)
"""Requests a second for each GPU."""
REQUESTS = 100
"""Number of requests for each GPU."""
PROMPTS = (10, 145, 352, 500, 634, 814, 960, 1182, 1407, 1606, 2003)
ANSWERS = (2, 6, 12, 20, 34, 55, 170, 243, 293, 477, 894)
"""Tokens of answers, as those of prompts above: the least, deciles, and the most."""
USUAL_OTHERS = sum(count**2 for count in PROMPTS) / sum(PROMPTS)
"""Mean number of tokens of the prompt to which a token belongs, if a step has several prompts."""
PUBLISHED = {
    "vLLM": (62.0, 49.0, 39.0, 32.0, 19.0),
    "vLLM, 2 GPUs": (95.5, 89.5, 81.0, 62.5, 38.0),
    "apart": (98.33, 89.67, 81.33, 65.33, 49.0),
}
"""Percentage of requests that keep both goals, for each of RATES."""
BAR = 0.2


def profile(ranks: int, prompts: Law, few: Law, many: Law) -> Profile:
    least, each, squared = prompts
    several_s = (least + (each + squared * USUAL_OTHERS) * MOST_TOKENS) / 1e3

    def prompt_s(count: int) -> float:
        return (least + each * count + squared * count**2) / 1e3

    def step_s(batch: int, context: int) -> float:
        of_step, of_token, of_sequence = few if batch < MANY else many
        return (of_step + of_token * batch * context + of_sequence * batch) / 1e3

    return Profile(
        name=f"OPT-13B, {ranks} A100", source="DistServe's artifact", device="NVIDIA A100 80GB SXM",
        tensor_parallel_size=ranks, kv_bytes_per_token=819_200, kv_tokens=10_000_000,
        prefill=[*((count, prompt_s(count)) for count in (16, 64, 256, 512, 1024, 2048)), (MOST_TOKENS, several_s)],
        decode=[(batch, each, step_s(batch, each)) for batch in (1, MANY - 1, MANY, 256) for each in (256, 2048)],
        transfer=[(0, 0.0), (25_000_000_000, 1.0)], handoff_s=0.001, message_s=0.0005,
    )  # fmt: skip


VLLM_1 = profile(1, (23.627, 0.150546, 8.6535e-6), (19.563, 4.941e-4, 0.05061), (16.839, 4.390e-4, 0.14000))
VLLM_2 = profile(2, (19.601, 0.064675, 6.0372e-6), (20.450, 1.870e-4, 0.07263), (14.956, 3.809e-4, 0.09316))
PREFILL_2 = profile(2, (13.403, 0.062343, 2.2269e-6), (13.295, 3.411e-4, 0.06296), (10.639, 3.118e-4, 0.08563))
DECODE_1 = profile(1, (16.457, 0.092648, 6.4748e-6), (19.935, 6.269e-4, 0.03851), (7.166, 5.798e-4, 0.15831))
LIMITS = EngineLimits(MOST_TOKENS, None, MOST_TOKENS, MOST_TOKENS, max_num_seqs=1024, most_graph_tokens=0)
DEPLOYMENTS = {
    "vLLM": (1, Deployment(VLLM_1, roles_of(0, 0, 1), limits=LIMITS)),
    "vLLM, 2 GPUs": (2, Deployment(VLLM_2, roles_of(0, 0, 1), limits=LIMITS)),
    "apart": (3, Deployment(DECODE_1, roles_of(1, 1), limits=LIMITS, prefill_profile=PREFILL_2)),
}
"""Number of GPUs, and deployment, by name. In the third, two GPUs compute prompts together, and one decodes."""


def requests(rate: float, count: int, seed: int) -> Iterator[SimulatedRequest]:
    chance = random.Random(seed)
    at_s = 0.0
    for _ in range(count):
        at_s += chance.expovariate(rate)
        yield SimulatedRequest(at_s, _drawn(chance, PROMPTS), _drawn(chance, ANSWERS))


def _drawn(chance: random.Random, deciles: tuple[int, ...]) -> int:
    low, high = chance.choice(list(itertools.pairwise(deciles)))
    return round(chance.uniform(low, high))


def attained_percent(name: str, rate: float, seeds: int) -> float:
    gpus, deployment = DEPLOYMENTS[name]
    loads = (requests(rate * gpus, REQUESTS * gpus, seed) for seed in range(seeds))
    return 100 * statistics.mean(attained(simulate(deployment, load), GOALS_S) for load in loads)


def goodput(percents: tuple[float, ...]) -> float:
    """Return the requests within their goals, for each second and GPU, at the best of the rates."""
    return max(rate * percent / 100 for rate, percent in zip(RATES, percents, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="loads for each rate, of which the mean is taken")
    arguments = parser.parse_args()
    logging.getLogger("hbserve_scheduler").setLevel(logging.ERROR)
    print(f"{'requests a second and GPU':30}{''.join(f'{rate:8}' for rate in RATES)}   goodput")
    found = {name: tuple(attained_percent(name, rate, arguments.seeds) for rate in RATES) for name in DEPLOYMENTS}
    for name in DEPLOYMENTS:
        for what, percents in (("published", PUBLISHED[name]), ("simulated", found[name])):
            row = "".join(f"{each:7.1f}%" for each in percents)
            print(f"{name:14}{what:16}{row}{goodput(percents):10.2f}")
    for other in ("vLLM", "vLLM, 2 GPUs"):
        theirs, ours = (goodput(each["apart"]) / goodput(each[other]) for each in (PUBLISHED, found))
        print(
            f"apart by {other}: {theirs:.2f} published, {ours:.2f} simulated ({ours / theirs - 1:+.0%}; bar {BAR:.0%})"
        )


if __name__ == "__main__":
    main()
