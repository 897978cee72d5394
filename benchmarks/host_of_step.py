"""Processor time of the host for one step, part by part, with nothing in place of the device.

    python benchmarks/host_of_step.py
    python benchmarks/host_of_step.py --batch-sizes 64 256 --prompts 128 2048 --tree ../before

The bounds differ. For a decode step, the host has as much time as the step before takes on the device. A prompt that
comes alone waits for all parts except "count", which is done while the device computes.

The output is milliseconds of processor time of the engine's thread, the median of a hundred steps. The parts are:
choosing what is computed, telling the other rank, packing, and taking tokens in; and what the other rank does before it
can launch, reading and packing. The launch of a step is not included.

Prompts that come alone also go through the engine's thread, as in an instance. For these the output is microseconds
from the call in the event loop to the first token there, without the device's time.
With --tree, another checkout of this repository is measured too, in turns, for a before and an after.
"""

import argparse
import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hbserve_core import Engine, InstanceConfig
from hbserve_core.cuda_runner.step_packer import SplitKV, StepPacker
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.engine.step import PendingStep, StepResult
from hbserve_core.instance.engine_thread import EngineThread
from hbserve_core.instance.process import SWITCH_INTERVAL_S
from hbserve_core.model.model_config import load_model_config
from hbserve_core.ranks.step_message import StepReader, StepWriter
from hbserve_rpc import SamplingParams

CONTEXT, LONGEST, STEPS, TURNS = 1024, 4096, 100, 3
DEVICE_S, PAUSE_S = 0.0013, 0.0005
"""Time of a step for which an engine's thread waits, and time from an answer to the next prompt."""
HEADS, PROCESSORS, TILE_TOKENS, NUM_BLOCKS = 8, 132, 16, 40000
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "vocab_size": 151936,
    "max_position_embeddings": LONGEST,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 2048], help="tokens")
    parser.add_argument("--tree", type=Path, help="another checkout")
    args = parser.parse_args()
    for option, sizes, measure in (
        ("--batch-sizes", args.batch_sizes, measure_decodes),
        ("--prompts", args.prompts, measure_prompts),
    ):
        for size in sizes:
            if args.tree is None:
                print(measure(size), flush=True)
            else:
                by_turns(args.tree, option, size)
    return 0


def by_turns(before: Path, option: str, size: int) -> None:
    only: dict[str, list[str]] = {"--batch-sizes": [], "--prompts": []} | {option: [str(size)]}
    given = [word for name, sizes in only.items() for word in (name, *sizes)]
    for _ in range(TURNS):
        for name, tree in (("before", before), ("after", Path(__file__).parents[1])):
            source = os.pathsep.join(str(each) for each in sorted(tree.absolute().glob("packages/*/src")))
            command, settings = [sys.executable, __file__, *given], os.environ | {"PYTHONPATH": source}
            found = subprocess.run(command, env=settings, stdout=subprocess.PIPE)
            for line in found.stdout.decode().splitlines():
                print(f"{name:6} {line}", flush=True)


class Timed:
    """Measures the processor time of this thread, by purpose."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.thread_time()
            result = work(*arguments)
            self.times[name].append(time.thread_time() - begin)
            return result

        return timed

    def __str__(self) -> str:
        return ", ".join(f"{name} {1e3 * statistics.median(each):.2f}" for name, each in self.times.items())


class HostOnly:
    """A runner of two ranks that computes nothing: every token is the same."""

    overlaps = True
    transfer_addresses: Sequence[str] = ()
    computed: Any = None

    def __init__(self, config: InstanceConfig, timed: Timed) -> None:
        self.model_config = load_model_config(config.model_path)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.fingerprint: dict[str, str | int] = {}
        self.pool = torch.zeros((NUM_BLOCKS, 1, 2, 1, 1, 1))
        self._memory = np.zeros(1 << 20, dtype=np.int32)
        packers = [StepPacker(config, TILE_TOKENS, SplitKV(HEADS, PROCESSORS), seed=0) for _ in range(2)]
        self._tell = timed("tell", StepWriter(draws=True).write)
        self._pack = timed("pack", packers[0].pack)
        self._read = timed("rank 1: read", StepReader().read)
        self._pack_there = timed("rank 1: pack", packers[1].pack)

    def launch(self, batch: Sequence[ScheduledChunk]) -> PendingStep:
        message = self._tell(batch)
        packed = self._pack(batch, self._memory)
        self._pack_there(self._read(message), self._memory)
        return lambda: StepResult(packed.tokens([7] * len(packed.places)))

    def launch_alone(self, batch: Sequence[ScheduledChunk]) -> PendingStep:
        """Launch a step as one rank alone does, on a device that takes DEVICE_S."""
        packed = self._pack(batch, self._memory)
        until_s = time.perf_counter() + DEVICE_S

        def result() -> StepResult:
            time.sleep(max(0.0, until_s - time.perf_counter()))
            self.waited_s = time.perf_counter() - until_s + DEVICE_S
            return StepResult(packed.tokens([7] * len(packed.places)))

        return result

    def draw(self) -> None:
        pass

    def is_idle(self) -> bool:
        return True

    def close(self) -> None:
        pass


def make_engine(timed: Timed, most: int) -> Engine:
    """Make an engine of two ranks that has room for `most` sequences."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        config = InstanceConfig(
            model_path=folder, device="cpu", max_num_seqs=most, max_num_batched_tokens=16384, chunk_size=16384,
            max_chunk_prefill_tokens=16384, max_model_len=LONGEST, tensor_parallel_size=2,
        )  # fmt: skip
        return Engine(config, HostOnly(config, timed))


def time_parts(engine: Engine, timed: Timed) -> None:
    """Measure the parts of the engine's steps from now on."""
    gc.freeze()
    timed.times.clear()
    engine._scheduler.schedule = timed("schedule", engine._scheduler.schedule)  # type: ignore[method-assign]
    engine._read = timed("take in", engine._read)  # type: ignore[method-assign]
    engine._begin = timed("count", engine._begin)  # type: ignore[method-assign]


def parts_of(timed: Timed) -> str:
    own = sum(statistics.median(each) for name, each in timed.times.items() if "rank 1" not in name)
    return f"ms: rank 0 {1e3 * own:.2f} ({timed})"


def measure_decodes(size: int) -> str:
    timed = Timed()
    engine = make_engine(timed, size)
    for name in range(size):
        engine.add(str(name), [name] * CONTEXT, SamplingParams(0.6, STEPS + 60, ignore_eos=True))
    while engine.stats().num_generated_tokens < 8 * size:
        engine.step()
    time_parts(engine, timed)
    for _ in range(STEPS):
        engine.step()
    return f"{size:4} sequences, {parts_of(timed)}"


def measure_prompts(num_tokens: int) -> str:
    return f"{time_prompts(num_tokens)}\n{measure_calls(num_tokens)}"


def time_prompts(num_tokens: int) -> str:
    """Measure prompts that come one after the other, by part."""
    timed, params = Timed(), SamplingParams(0.6, 1, ignore_eos=True)
    engine = make_engine(timed, 64)
    time_parts(engine, timed)
    add, of_all = timed("add", engine.add), Timed()
    for name in range(STEPS):
        timed.times.clear()
        add(str(name), [name] * num_tokens, params)
        while engine.has_work():  # a step that launches, and one that takes in what was
            engine.step()
        for part, times in timed.times.items():
            of_all.times[part].append(sum(times))
    return f"{num_tokens:4} tokens, {parts_of(of_all)}"


def measure_calls(num_tokens: int) -> str:
    """Measure prompts that come one after the other through an engine's thread."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return asyncio.run(_measure_calls(num_tokens))


async def _measure_calls(num_tokens: int) -> str:
    runner: HostOnly
    told: asyncio.Queue[object] = asyncio.Queue()

    def make() -> Engine:
        nonlocal runner
        engine = make_engine(Timed(), 64)
        runner = engine._runner  # type: ignore[assignment]
        runner.launch = runner.launch_alone  # type: ignore[method-assign]
        return engine

    async def one(name: str) -> float:
        prompt, params = [int(name)] * num_tokens, SamplingParams(0.6, 1, ignore_eos=True)
        await asyncio.sleep(PAUSE_S)
        begin_s = time.perf_counter()
        await thread.call(lambda engine: engine.add(name, prompt, params))
        await told.get()
        return time.perf_counter() - begin_s - runner.waited_s

    thread = EngineThread(make, on_events=told.put_nowait, on_failure=told.put_nowait)
    await thread.start()
    gc.freeze()
    times_s = [await one(str(name)) for name in range(STEPS)]
    await thread.stop()
    return (
        f"{num_tokens:4} tokens, from a call to its token {1e6 * statistics.median(times_s):.0f} us beside the device's"
    )


if __name__ == "__main__":
    sys.exit(main())
