"""How long a request stands still while it changes hands: from its first token, which is the prefill instance's, to its
second one, the decode instance's first.

    uv run python benchmarks/pd_handoff.py --model FOLDER --backend ipc --prompt-tokens 2048

One prefill and one decode instance on this host, one request at a time, each with another prompt. Printed beside it:
the time between later tokens, which is a decode step and its way to the client, and is in the hand-off too; the KV
bytes that moved; and how much of them had moved when the last of n chunks started to compute: of those of the chunks
before it at least (n-2)/(n-1), because the chunk that has just ended cannot have. For that both instances run in this
process, where the decode side's pool can be looked at.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import time

import torch

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.sampling_params import SamplingParams
from hbserve_core import GpuInstance, InstanceConfig
from hbserve_kv import KVTransferConfig
from hbserve_rpc import RpcClient
from hbserve_rpc.messages import DECODE, PREFILL, DecodeRequest, PrefillRequest

BLOCK_SIZE = 16
UNTOUCHED = 12345.0
"""What no key or value is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--chunk-size", type=int, default=512)
    args = parser.parse_args()
    asyncio.run(measure(args))
    asyncio.run(measure_overlap(args))


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
    prompt = make_prompt(args, seed)
    params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
    times, timings = [], None
    async for delta in llm.stream(prompt, params):
        times += [time.perf_counter()] * len(delta["token_ids"])
        timings = delta["timings"] or timings
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return gaps[0], gaps[1:], timings


def make_prompt(args: argparse.Namespace, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, 300) for _ in range(args.prompt_tokens)]


@contextlib.asynccontextmanager
async def instance(role: str, args: argparse.Namespace):
    config = InstanceConfig(
        instance_id=role, role=role, model_path=args.model, chunk_size=args.chunk_size, block_size=BLOCK_SIZE,
        max_num_batched_tokens=max(2048, args.chunk_size), num_blocks=args.prompt_tokens // BLOCK_SIZE + 16,
        prefix_caching=False, kv_rank=int(role == "decode"), num_on_gpu=2,
        kv_transfer=KVTransferConfig(backend=args.backend),
    )  # fmt: skip
    made = GpuInstance(config)
    await made.start()
    try:
        await made.wait_ready()
        async with RpcClient(made.address, heartbeat_timeout_s=60) as client:
            yield made, client
    finally:
        await made.stop()


async def measure_overlap(args: argparse.Namespace) -> None:
    num_chunks = -(-args.prompt_tokens // args.chunk_size)
    if num_chunks < 3:
        print(f"{num_chunks} chunks: too few to move KV beside computation")
        return
    async with instance("prefill", args) as (p, p_client), instance("decode", args) as (d, d_client):
        launch, landed, started = p.runner.launch, [], itertools.count(1)

        look = torch.cuda.Stream() if d.runner.pool.is_cuda else None

        def counting(batch):
            """Counts blocks when the step really starts: on a GPU that is when the one before it is done there."""
            if next(started) % num_chunks == 0:
                if look is not None:
                    look.wait_stream(p.runner._stream)
                with torch.inference_mode(), torch.cuda.stream(look):
                    landed.append((d.runner.pool.flatten(1) != UNTOUCHED).all(dim=1).sum())
            return launch(batch)

        p.runner.launch = counting
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        for seed in range(args.requests + 1):
            with torch.inference_mode():  # in which a runner makes it
                d.runner.pool.fill_(UNTOUCHED)
            prompt = make_prompt(args, seed)
            async with d_client.stream(DECODE, DecodeRequest(f"r{seed}", f"t{seed}", prompt, params)) as of_d:
                grant = (await anext(of_d)).grant
                async with p_client.stream(
                    PREFILL, PrefillRequest(f"r{seed}", f"t{seed}", prompt, params, grant)
                ) as of_p:
                    assert len([event async for event in of_p]) == 2
                assert [event async for event in of_d]
    earlier = (num_chunks - 1) * args.chunk_size // BLOCK_SIZE
    shares = [int(count) / earlier for count in landed[1:]]
    print(
        f"when the last of {num_chunks} chunks starts, of the KV of those before it there is: "
        f"median {statistics.median(shares):.3f}, least {min(shares):.3f}; "
        f"bar (n-2)/(n-1) = {(num_chunks - 2) / (num_chunks - 1):.3f}"
    )


def spread(seconds) -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return f"median {1e3 * statistics.median(ordered):.2f} ms, p99 {1e3 * p99:.2f} ms"


if __name__ == "__main__":
    main()
