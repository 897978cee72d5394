"""How long a request stands still while it changes hands: from its first token, which is the prefill instance's, to its
second one, the decode instance's first.

    uv run python benchmarks/pd_handoff.py --model FOLDER --backend ipc --prompt-tokens 2048

One prefill and one decode instance on this host, one request at a time, each with another prompt. Printed beside it:
the time between later tokens, which is a decode step and its way to the client, and is in the hand-off too; and the KV
bytes that moved.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import time

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.sampling_params import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--chunk-size", type=int, default=512)
    asyncio.run(measure(parser.parse_args()))


async def measure(args: argparse.Namespace) -> None:
    config = PdDisaggConfig(
        model_path=args.model, kv_transfer_backend=args.backend, chunk_size=args.chunk_size,
        max_model_len=args.prompt_tokens + args.output_tokens,
    )  # fmt: skip
    async with DisaggregatedLLM(config) as llm:
        await one(llm, args, seed=-1)
        runs = [await one(llm, args, seed) for seed in range(args.requests)]
    handoffs, gaps, timings = zip(*runs, strict=True)
    steps = [gap for run in gaps for gap in run]
    moved, took = timings[0]["kv_bytes"], statistics.median(each["kv_transfer_time_s"] for each in timings)
    print(f"{args.backend}: {args.requests} requests of {args.prompt_tokens} tokens in chunks of {args.chunk_size}")
    print(f"first token to second: {spread(handoffs)}")
    print(f"between later tokens:  {spread(steps)}")
    print(f"difference of medians: {1e3 * (statistics.median(handoffs) - statistics.median(steps)):.2f} ms")
    print(f"time to first token:   {spread([each['ttft_s'] for each in timings])}")
    print(f"KV moved: {moved / 1e6:.1f} MB in {1e3 * took:.1f} ms from the first part to the commit")


async def one(llm: DisaggregatedLLM, args: argparse.Namespace, seed: int):
    """Seconds from the first token to the second, between later ones, and the request's timings."""
    random.seed(seed)
    prompt = [random.randrange(3, 300) for _ in range(args.prompt_tokens)]
    params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
    times, timings = [], None
    async for delta in llm.stream(prompt, params):
        times += [time.perf_counter()] * len(delta["token_ids"])
        timings = delta["timings"] or timings
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return gaps[0], gaps[1:], timings


def spread(seconds) -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return f"median {1e3 * statistics.median(ordered):.2f} ms, p99 {1e3 * p99:.2f} ms"


if __name__ == "__main__":
    main()
