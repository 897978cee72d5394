"""`hbserve profile`: measures one instance, and writes the file that simulations read."""

import asyncio
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from time import perf_counter
from typing import Any, NamedTuple

import msgspec

from hbserve.load.bench_engine import EngineUnderTest, batch_numbers, context_numbers
from hbserve.load.prompts import MOST_TOKENS
from hbserve.models.demo_model import model_folder
from hbserve.options import numbers
from hbserve.output_file import require_writable, write_results
from hbserve.progress import progress_bar
from hbserve.simulator.commands import ProfileArgs
from hbserve.simulator.profile import Profile
from hbserve_core import InstanceConfig
from hbserve_core.bench.batch_sweep import BatchSweep, SweepPlan, sweep_config
from hbserve_core.ranks.make_runner import make_runner
from hbserve_kv import BackendUnavailable
from hbserve_kv import bench as kv_bench
from hbserve_kv.transports.registry import require_backend
from hbserve_rpc import InvalidRequest, RpcClient, RpcServer
from hbserve_rpc.messages import DESCRIBE, Empty, InstanceInfo
from hbserve_rpc.plain_values import plain_text

BLOCK_BYTES = 1 << 20
MOST_MEGABYTES = 16_384
ROUNDS = 5
NUM_CALLS = 200
DECODES_AT_A_LAUNCH = 16
DEADLINE_S = 30.0


class Usual(NamedTuple):
    """Sizes that are measured unless the command's options say otherwise."""

    prompt_lens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]


ON_A_GPU = Usual(
    (128, 256, 512, 1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16, 17, 32, 64, 65, 128, 256), (512, 8192)
)
ON_A_CPU = Usual((16, 64, 256), (1, 4, 16), (64, 256))


def measure_profile(args: ProfileArgs) -> None:
    """Measure an instance, and write its profile.

    Raises InvalidRequest, BackendUnavailable, what `InstanceConfig` and `make_runner` raise, and OSError.
    """
    prompts = (
        () if args.prompt_lens is None else numbers("--prompt-lens", args.prompt_lens, int, least=1, most=MOST_TOKENS)
    )
    batches, contexts = batch_numbers(args.batch_sizes), context_numbers(args.contexts)
    sizes = numbers("--megabytes", args.megabytes, int, least=1, most=MOST_MEGABYTES)
    plain_text("--name", args.name or "")
    require_writable("--output", args.output)
    try:
        require_backend(args.kv_transfer_backend)
    except BackendUnavailable as error:
        raise InvalidRequest(f"--kv-transfer-backend: {error}") from None
    folder = model_folder(args.model)
    engine = EngineUnderTest(args.model, args.device, args.dtype.value, args.random_weights, args.tensor_parallel_size)
    usual = ON_A_GPU if engine.is_on_a_gpu(folder) else ON_A_CPU
    prompts, batches, contexts = prompts or usual.prompt_lens, batches or usual.batch_sizes, contexts or usual.contexts
    config = sweep_config(str(folder), SweepPlan(batches, tuple(sorted({*contexts, *prompts}))), **engine.settings())
    num_parts = len(prompts) + len(batches) * len(contexts) + len(sizes) + 2
    with progress_bar(num_parts, title="Loading the model") as bar:
        of_engine, dtype = _engine(bar, config, prompts, batches, contexts)
        device = of_engine["device"]
        there = "cpu" if device == "cpu" else "cuda"
        moving, beside_s = asyncio.run(_transfers(bar, args.kv_transfer_backend, there, sizes))
        message_s = asyncio.run(_message_s(bar))
    profile = Profile(
        name=args.name or f"{folder.name} on {device}",
        source=f"hbserve profile, {date.today()}: {folder.name}, {dtype}",
        tensor_parallel_size=args.tensor_parallel_size,
        transfer=[(num_bytes * args.tensor_parallel_size, time_s) for num_bytes, time_s in moving],
        handoff_s=beside_s,
        message_s=message_s,
        **of_engine,
    )
    write_results(args.output, msgspec.json.format(msgspec.json.encode(profile)).decode() + "\n")
    done = f"{len(profile.prefill)} prompts, {len(profile.decode)} decode steps, {len(moving)} transfers"
    sys.stdout.write(f"{args.output}: {done}\n")


def _engine(
    bar: Any, config: InstanceConfig, prompts: Sequence[int], batches: Sequence[int], contexts: Sequence[int]
) -> tuple[dict[str, Any], str]:
    """Measure the fields of the profile that depend on the engine. Returns them, and the dtype in which it computes."""
    runner = make_runner(config)
    try:
        sweep = BatchSweep(config, runner)
        prefill, behind, decode = _steps(bar, sweep, prompts, batches, contexts)
        ahead = _launched_ahead(bar, sweep, config, batches, contexts[0])
        return {
            "device": sweep.device_name,
            "kv_bytes_per_token": sweep.kv_bytes_per_token,
            "kv_tokens": sweep.kv_tokens,
            "prefill": prefill,
            "decode": decode,
            "prefill_behind": behind,
            "launched_ahead_s": ahead[0],
            "launched_ahead_mixed_s": ahead[1],
            "launched_ahead_eager_s": ahead[2],
        }, str(runner.dtype)
    finally:
        runner.close()


def _steps(
    bar: Any, sweep: BatchSweep, prompts: Sequence[int], batches: Sequence[int], contexts: Sequence[int]
) -> tuple[list[tuple[int, float]], list[tuple[int, float]], list[tuple[int, int, float]]]:
    """Measure prompts alone, prompts behind each other, and decode steps. A size for which the model or its pool has no
    room is skipped with a message."""
    prefill: list[tuple[int, float]] = []
    behind: list[tuple[int, float]] = []
    decode: list[tuple[int, int, float]] = []
    for length in prompts:
        bar.set_description(f"Prompt of {length}")
        if (obstacle := sweep.obstacle(1, length)) is not None:
            bar.write(f"prompt of {length} skipped: {obstacle}", file=sys.stderr)
        else:
            alone_s, behind_s = sweep.prompt_s(length)
            prefill.append((length, alone_s))
            behind.append((length, behind_s))
        bar.update()
    for context in contexts:
        for batch in batches:
            bar.set_description(f"Decode step, {batch} x {context}")
            if (obstacle := sweep.obstacle(batch, context)) is not None:
                bar.write(f"{batch} x {context} skipped: {obstacle}", file=sys.stderr)
            else:
                decode.append((batch, context, sweep.step_s(batch, context)))
            bar.update()
    if not prefill or not decode:
        raise InvalidRequest("--prompt-lens, --batch-sizes, --contexts: nothing fits this model and its pool")
    return prefill, behind, decode


def _launched_ahead(
    bar: Any, sweep: BatchSweep, config: InstanceConfig, batches: Sequence[int], context: int
) -> tuple[float, float, float]:
    """Measure how long before a step's end the next one is launched: for decodes alone; with prompts beside them; and
    for prompts alone, of which some have no CUDA graph."""
    bar.set_description("Launches")
    batch = max((each for each in batches if each <= DECODES_AT_A_LAUNCH), default=batches[0])
    ahead_s = mixed_s = eager_s = sweep.launched_ahead_s(batch, context)
    longest = config.cuda_graph_max_seq_len
    if sweep.obstacle(1, longest) is None:
        mixed_s = eager_s = sweep.launched_ahead_s(batch, context, longest)
    if sweep.obstacle(3, longest) is None:  # one is computed, two are behind it
        eager_s = sweep.launched_ahead_of_prompts_s(longest)
    bar.update()
    return ahead_s, mixed_s, eager_s


async def _transfers(
    bar: Any, backend: str, device: str, megabytes: Sequence[int]
) -> tuple[list[tuple[int, float]], float]:
    """Measure transfers, by number of bytes, and the additional seconds of a hand-off, from computed blocks to a
    receiver that has them all.

    There is only one receiving process, because starting one takes longer than all transfers. So this measures one rank
    of an instance: the others move as much at the same time, each from its own GPU.
    """
    moving, beside = [], []
    bar.set_description("Transfers")
    settings = kv_bench.Settings(backend, device, num_blocks=2 * megabytes[-1], block_bytes=BLOCK_BYTES)
    async with kv_bench.sender(settings) as there:
        for size in megabytes:
            bar.set_description(f"Transfer of {size} MiB")
            source, target = (kv_bench.chosen_blocks(settings, size, scattered=True, seed=seed) for seed in (1, 2))
            found = [await there.hand_over(source, target) for _ in range(1 + ROUNDS)][1:]
            moving.append((size * BLOCK_BYTES, statistics.median(each.moving_s for each in found)))
            beside.append(statistics.median(each.behind_s - each.moving_s for each in found))
            bar.update()
    return moving, statistics.median(beside)


async def _message_s(bar: Any) -> float:
    """Measure half the time of a call between two ends in this process, which is the least that a message takes."""
    bar.set_description("Messages")
    server = RpcServer()

    async def describe(_: Empty) -> InstanceInfo:
        return InstanceInfo("i0", "hybrid", server.epoch, "ready")

    server.serve(DESCRIBE, describe)
    await server.start()
    try:
        async with RpcClient(server.address) as client:
            times = []
            for _ in range(NUM_CALLS):
                began_s = perf_counter()
                await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
                times.append(perf_counter() - began_s)
    finally:
        await server.stop()
    bar.update()
    return statistics.median(times) / 2
