"""Time of a hand-off: from a request's first token, which comes from the prefill instance, to its second one, which is
the decode instance's first.

    uv run python benchmarks/pd_handoff.py --model FOLDER --backend ipc --input 2048
    uv run python benchmarks/pd_handoff.py --model FOLDER --backend ipc --input 2048 --output 128 --rate 8
    uv run python benchmarks/pd_handoff.py --model FOLDER --hybrid 2 --input 2048 --output 128 --rate 8
    uv run python benchmarks/pd_handoff.py --model FOLDER --backend nccl --input 2048 --pairs 7

With `--rate`, requests arrive at random (Poisson), that many a second, whether or not others have ended. Without it,
one comes after the other. Each has a different prompt. `--hybrid N`, the baseline, runs N hybrid instances in place of
one prefill and one decode instance.
The output has, as the client sees them: the time to the first token; the hand-off; the time between later tokens, which
is a step of the batch and its way to the client; and the hand-off in steps of the batch that was joined, which is a
request's hand-off divided by the mean of its next gaps. With `--pairs`, the figures are those of the first requests of
that many deployments, each of which is started when the one before has ended.

Without `--rate` and `--hybrid`, and with chunks of a fixed size, the script also prints how much of the KV had moved
when the last of n chunks started to compute. It should be at least (n-2)/(n-1) of that of the chunks before, because
the chunk that has just ended cannot have moved. For this, the prefill instance runs in this process, and looks into the
pool of the decode instance, which runs in another one.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import random
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import torch

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.results import Timings
from hbserve.sampling_params import SamplingParams
from hbserve_core import GpuInstance, InstanceConfig
from hbserve_kv import KVTransferConfig
from hbserve_kv.memory import cuda_ipc, shared_memory
from hbserve_kv.memory.memory import tensor_at
from hbserve_kv.memory.pool_layout import extents_of
from hbserve_kv.memory.shared_memory import SharedRegion
from hbserve_rpc import RpcClient
from hbserve_rpc.messages import DECODE, PREFILL, DecodeRequest, Granted, PrefillRequest, Role
from hbserve_testing.narrowing import of_type, present

BLOCK_SIZE = 16
UNTOUCHED = 12345.0
"""A number that is never a key or a value."""
LOOK_EVERY = 256
"""Distance of the numbers in a block that are looked at."""


STEPS_AFTER = 8
"""Number of gaps after the hand-off whose mean is taken for the time of a step of the batch that the request joined."""
WARM_UP_REQUESTS = 8


@dataclass
class Run:
    """One request, as the client saw it. Times are of `time.perf_counter`."""

    due_s: float
    """Time at which the request was due."""
    submitted_s: float
    token_times_s: list[float]
    timings: Timings

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.submitted_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens, of which the first is the hand-off."""
        return [after - before for before, after in itertools.pairwise(self.token_times_s)]

    @property
    def step_s(self) -> float:
        """Time of a step of the batch that the request joined. It is a mean, because tokens of two steps may come at
        once, after a longer gap."""
        return statistics.mean(self.gaps_s[1 : 1 + STEPS_AFTER])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", choices=["safetensors", "dummy"], default="safetensors")
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--hybrid", type=int, metavar="N", help="N hybrid instances instead")
    parser.add_argument("--rate", type=float, help="requests a second")
    parser.add_argument("--requests", type=int, help="default: 500 with --rate, else 20")
    parser.add_argument("--input", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of each answer, at least 3")
    parser.add_argument("--pairs", type=int, metavar="N", help="only the first request of each of so many deployments")
    parser.add_argument("--chunk-size", type=chunk_size, default=512, metavar="N|auto")
    args = parser.parse_args()
    if args.output < 3:
        parser.error("--output: a hand-off and a later gap need 3 tokens")
    args.requests = args.requests or (500 if args.rate else 20)
    if args.pairs:
        asyncio.run(measure_firsts(args))
        return
    asyncio.run(measure(args))
    if not args.rate and not args.hybrid and args.chunk_size != "auto":
        asyncio.run(measure_overlap(args))


def chunk_size(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


def deployment(args: argparse.Namespace) -> PdDisaggConfig:
    most = 8192 if args.chunk_size == "auto" else max(8192, args.chunk_size)
    config = PdDisaggConfig(
        model_path=args.model, load_format=args.load_format, kv_transfer_backend=args.backend,
        chunk_size=args.chunk_size, max_num_batched_tokens=most,
        max_chunk_prefill_tokens=most, max_model_len=args.input + args.output,
    )  # fmt: skip
    if args.hybrid:
        config.gpu_instances = [
            {"instance_id": f"hybrid-{i}", "instance_type": "hybrid", "kv_rank": i} for i in range(args.hybrid)
        ]
    return config


async def measure(args: argparse.Namespace) -> None:
    async with DisaggregatedLLM(deployment(args)) as llm:
        await until_connected(llm)
        first = await one(llm, args, make_prompt(args, "first"))
        await asyncio.gather(*(one(llm, args, make_prompt(args, f"warm-up {i}")) for i in range(WARM_UP_REQUESTS)))
        began_s = time.perf_counter()
        if args.rate:
            runs = await poisson(llm, args)
        else:
            runs = [await one(llm, args, make_prompt(args, seed)) for seed in range(args.requests)]
        report(args, first, runs, time.perf_counter() - began_s)


async def measure_firsts(args: argparse.Namespace) -> None:
    for pair in range(args.pairs):
        async with DisaggregatedLLM(deployment(args)) as llm:
            await until_connected(llm)
            print(
                f"deployment {pair + 1}: {of_first(await one(llm, args, make_prompt(args, f'first {pair}')))}",
                flush=True,
            )


async def until_connected(llm: DisaggregatedLLM) -> None:
    """Wait until all pairs are connected. Instances are ready before that, and the first request would wait for its
    link."""
    handles = llm.scheduler.fleet.handles.values()
    decodes = {each.epoch for each in handles if each.role == "decode"}
    async with asyncio.timeout(60):
        while not all(each.links.keys() >= decodes for each in handles if each.role == "prefill"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def poisson(llm: DisaggregatedLLM, args: argparse.Namespace) -> list[Run]:
    dice, arriving = random.Random(args.requests), []
    prompts = [make_prompt(args, seed) for seed in range(args.requests)]
    due_s = time.perf_counter()
    for prompt in prompts:
        arriving.append(one(llm, args, prompt, due_s))
        due_s += dice.expovariate(args.rate)
    return await asyncio.gather(*arriving)


async def one(llm: DisaggregatedLLM, args: argparse.Namespace, prompt: tuple[int, ...], due_s: float = 0.0) -> Run:
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    await asyncio.sleep(due_s - time.perf_counter())
    submitted_s, times_s, timings = time.perf_counter(), [], None
    async for delta in llm.stream(list(prompt), params):
        times_s += [time.perf_counter()] * len(delta["token_ids"])
        timings = delta["timings"] or timings
    return Run(due_s or submitted_s, submitted_s, times_s, present(timings))


def report(args: argparse.Namespace, first: Run, runs: list[Run], took_s: float) -> None:
    handoffs, later = [run.gaps_s[0] for run in runs], [gap for run in runs for gap in run.gaps_s[1:]]
    steps = [run.step_s for run in runs]
    what = f"{args.hybrid} hybrid instances" if args.hybrid else args.backend
    load = f"{args.rate:g} a second" if args.rate else "one after the other"
    print(f"{what}: {len(runs)} requests of {args.input} + {args.output} tokens in chunks of {args.chunk_size}, {load}")
    print(f"time to first token:   {spread([run.ttft_s for run in runs])}")
    print(f"first token to second: {spread(handoffs)}")
    print(f"between later tokens:  {spread(later, 0.5, 0.9, 0.99, 0.999)}")
    print(f"between any tokens:    {spread(handoffs + later)}")
    print(f"step of batch joined:  {spread(steps)}")
    ratios = [handoff / step for handoff, step in zip(handoffs, steps, strict=True) if step]
    print(f"hand-off in steps:     {spread(ratios, scale=1, unit='')}")
    step_ms = 1e3 * statistics.median(steps)
    p50_ms, p99_ms = 1e3 * percentile(handoffs, 0.5), 1e3 * percentile(handoffs, 0.99)
    print(
        f"bars: p50 {p50_ms:.2f} of {1.5 * step_ms + 4:.2f} ms (1.5 steps + 4), "
        f"p99 {p99_ms:.2f} of {2 * step_ms + 8:.2f} ms (2 steps + 8), "
        f"later p99.9 {1e3 * percentile(later, 0.999):.2f} of {2 * step_ms:.2f} ms (2 steps)"
    )
    print(of_first(first))
    moved, moving_s = (
        statistics.median(run.timings[key] for run in runs) for key in ("kv_bytes", "kv_transfer_time_s")
    )
    print(f"KV moved: {moved / 1e6:.3g} MB in {1e3 * moving_s:.1f} ms from the first part to the commit")
    late = [run.submitted_s - run.due_s for run in runs]
    num_tokens = sum(len(run.token_times_s) for run in runs)
    print(
        f"{len(runs) / took_s:.1f} requests and {num_tokens / took_s:.0f} tokens a second; "
        f"this client was late by {1e3 * percentile(late, 0.99):.2f} ms at p99"
    )


def of_first(run: Run) -> str:
    handoff_ms, step_ms = 1e3 * run.gaps_s[0], 1e3 * run.step_s
    return (
        f"the very first request: {handoff_ms:.2f} ms to the second token, then {step_ms:.2f} ms a step; "
        f"bar {2 * step_ms + 5:.2f} ms (2 steps + 5)"
    )


def make_prompt(args: argparse.Namespace, seed: object) -> tuple[int, ...]:
    dice = random.Random(str(seed))  # of an integer it would take the absolute value
    return tuple(dice.randrange(3, 300) for _ in range(args.input))


def num_pool_blocks(args: argparse.Namespace) -> int:
    return args.input // BLOCK_SIZE + 16


@contextlib.asynccontextmanager
async def instance(role: Role, args: argparse.Namespace):
    config = InstanceConfig(
        instance_id=role, role=role, model_path=args.model, chunk_size=args.chunk_size, block_size=BLOCK_SIZE,
        max_num_batched_tokens=max(2048, args.chunk_size), num_blocks=num_pool_blocks(args),
        load_format=args.load_format, prefix_caching=False, kv_rank=int(role == "decode"), num_on_gpu=2,
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


def serve_decode(args: argparse.Namespace, pipe: Connection) -> None:
    """Run the decode instance in a process. Sends where it and its pool are, and fills the pool when it is asked to."""

    async def serve() -> None:
        async with instance("decode", args) as (d, _):
            pool = d.runner.pool
            export = cuda_ipc.export if pool.is_cuda else shared_memory.export
            (extent,) = extents_of(pool)
            pipe.send((d.address, os.getpid(), export(extent)))
            while await asyncio.to_thread(pipe.recv):
                with torch.inference_mode():  # in which a runner makes it
                    pool.fill_(UNTOUCHED)
                    if pool.is_cuda:
                        torch.cuda.synchronize(pool.device)
                pipe.send(True)

    asyncio.run(serve())


@contextlib.contextmanager
def blocks_of(pid: int, region: SharedRegion | tuple[bytes, int, int, int], runner, num_blocks: int):
    """Map the other process's pool. Yields a row for each block, which has only some of its numbers, so that looking at
    them disturbs little."""
    with contextlib.ExitStack() as mapped:
        if isinstance(region, SharedRegion):
            mapping = shared_memory.Mapping(pid, region)
            address, num_bytes = mapping.address, region.num_bytes
        else:
            handle, offset, num_bytes, _ = region
            address = mapped.enter_context(cuda_ipc.mapped(handle, runner.device)) + offset
        memory = tensor_at(address, num_bytes, runner.device)
        yield memory.view(runner.dtype).view(num_blocks, -1)[:, ::LOOK_EVERY]


async def measure_overlap(args: argparse.Namespace) -> None:
    num_chunks = -(-args.input // args.chunk_size)
    if num_chunks < 3:
        print(f"{num_chunks} chunks: too few to move KV beside computation")
        return
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve_decode, args=(args, theirs))
    process.start()
    theirs.close()
    try:
        address, pid, region = await asyncio.to_thread(pipe.recv)
        async with instance("prefill", args) as (p, p_client), RpcClient(address, heartbeat_timeout_s=60) as d_client:
            with blocks_of(pid, region, p.runner, num_pool_blocks(args)) as blocks:
                landed = count_at_last_chunk(p.runner, blocks, num_chunks)
                for seed in range(args.requests + 1):
                    pipe.send(True)
                    await asyncio.to_thread(pipe.recv)
                    await prefill_and_decode(p_client, d_client, make_prompt(args, seed), f"{seed}")
                    assert num_landed(blocks) >= args.input // BLOCK_SIZE, "this is not the pool that was written to"
                shares = [int(count) for count in landed[1:]]
    finally:
        pipe.send(False)
        await asyncio.to_thread(process.join)
    earlier = (num_chunks - 1) * args.chunk_size // BLOCK_SIZE
    shares = [count / earlier for count in shares]
    print(
        f"when the last of {num_chunks} chunks starts, of the KV of those before it there is: "
        f"median {statistics.median(shares):.3f}, least {min(shares):.3f}; "
        f"bar (n-2)/(n-1) = {(num_chunks - 2) / (num_chunks - 1):.3f}"
    )


def num_landed(blocks: torch.Tensor) -> torch.Tensor:
    return (blocks != UNTOUCHED).all(dim=1).sum()


def count_at_last_chunk(runner, blocks: torch.Tensor, num_chunks: int) -> list[torch.Tensor]:
    """Let the blocks that have arrived be counted whenever the last of so many steps really starts, which on a GPU is
    when the step before it is done."""
    launch, landed, started = runner.launch, [], itertools.count(1)
    look = torch.cuda.Stream(runner.device, priority=-1) if runner.device.type == "cuda" else None

    def counting(batch):
        if next(started) % num_chunks == 0:
            if look is not None:
                look.wait_stream(runner._stream)
            with torch.inference_mode(), torch.cuda.stream(look):
                landed.append(num_landed(blocks))
        return launch(batch)

    runner.launch = counting
    return landed


async def prefill_and_decode(p_client: RpcClient, d_client: RpcClient, prompt: tuple[int, ...], name: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    async with d_client.stream(DECODE, DecodeRequest(f"r{name}", f"t{name}", prompt, params)) as of_d:
        grant = of_type(Granted, await anext(of_d)).grant
        request = PrefillRequest(f"r{name}", f"t{name}", prompt, params, grant)
        async with p_client.stream(PREFILL, request) as of_p:
            assert len([event async for event in of_p]) == 2
        assert [event async for event in of_d]


def percentile(values, part: float) -> float:
    """Return the smallest value that this share of all values does not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def spread(values, *parts: float, scale: float = 1e3, unit: str = " ms") -> str:
    if not values:
        return "none: all tokens came at once"
    each = (f"p{100 * part:g} {scale * percentile(values, part):.2f}{unit}" for part in parts or (0.5, 0.9, 0.99))
    return ", ".join(each)


if __name__ == "__main__":
    main()
