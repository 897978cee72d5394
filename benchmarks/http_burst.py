"""Output tokens a second of deployments that are already running, in a burst of HTTP requests, by turns.

    python benchmarks/http_burst.py "two vLLM servers=8100,8200" "two hybrids=8000"

Each argument is a name and the ports of its servers on this host; the servers take requests in turn. The first
deployment is the one with which the others are compared. A burst is `--requests` prompts of 100 to 1024 random tokens,
each for 100 to 1024 tokens, as in nano-vllm's own benchmark. The clients are four processes. All servers keep their
memory while others get requests, so give each of them a part of the GPUs.
"""

import argparse
import asyncio
import random
import statistics
import sys

from vllm_load import burst

Deployment = tuple[str, list[int]]


def deployment(given: str) -> Deployment:
    name, _, ports = given.rpartition("=")
    return name or ports, [int(port) for port in ports.split(",")]


async def measure(deployments: list[Deployment], num_requests: int, rounds: int, at_most: int) -> None:
    found: dict[str, list[float]] = {name: [] for name, _ in deployments}
    for number in range(rounds + 1):  # the first one warms all of them, and is not counted
        drawn = random.Random(number)
        lengths = [(drawn.randint(100, at_most), drawn.randint(100, at_most)) for _ in range(num_requests)]
        for name, ports in deployments:
            rate, failures = await burst(ports, lengths)
            if failures:
                sys.exit(f"{name}: {len(failures)} not served: {failures[0][1]}")
            print(f"{'warm' if number == 0 else number}: {name} {rate:.0f} tokens/s", flush=True)
            if number:
                found[name].append(rate)
    beside = statistics.median(found[deployments[0][0]])
    for name, rates in found.items():
        median = statistics.median(rates)
        print(
            f"{name}: {median:.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f}), {median / beside:.2f} x", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployments", nargs="+", type=deployment, metavar="NAME=PORT,PORT")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a prompt, and of an answer")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.deployments, arguments.requests, arguments.rounds, arguments.longest))


if __name__ == "__main__":
    main()
