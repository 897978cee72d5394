"""What the host does for a decode step, with nothing in place of the device: it has as long for it as the step takes.

    python benchmarks/host_of_step.py
    python benchmarks/host_of_step.py --batch-sizes 64 256 --tree ../before

Milliseconds of processor time of the engine's thread, by part: choosing what is computed, telling the other rank,
packing, and taking tokens in; and what the other rank has to do before it can launch: reading and packing. Each is the
median of a hundred steps. What a step costs to launch is not in it.
With --tree, another checkout of this repository is measured too, in turns, for a before and an after.
"""

import argparse
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
from hbserve_core.model.model_config import load_model_config
from hbserve_core.ranks.step_message import StepReader, StepWriter
from hbserve_rpc import SamplingParams

CONTEXT, STEPS, TURNS = 1024, 100, 3
HEADS, PROCESSORS, TILE_TOKENS, NUM_BLOCKS = 8, 132, 16, 40000
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--tree", type=Path, help="another checkout")
    args = parser.parse_args()
    for size in args.batch_sizes:
        if args.tree is None:
            print(measure(size), flush=True)
            continue
        for _ in range(TURNS):
            for name, tree in (("before", args.tree), ("after", Path(__file__).parents[1])):
                source = os.pathsep.join(str(each) for each in sorted(tree.absolute().glob("packages/*/src")))
                command = [sys.executable, __file__, "--batch-sizes", str(size)]
                found = subprocess.run(command, env=os.environ | {"PYTHONPATH": source}, stdout=subprocess.PIPE)
                print(f"{name:6} {found.stdout.decode().strip()}", flush=True)
    return 0


class Timed:
    """Processor time of this thread, by what it was for."""

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

    def draw(self) -> None:
        pass

    def is_idle(self) -> bool:
        return True

    def close(self) -> None:
        pass


def measure(size: int) -> str:
    timed = Timed()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        config = InstanceConfig(
            model_path=folder, device="cpu", max_num_seqs=size, max_num_batched_tokens=16384, chunk_size=16384,
            max_chunk_prefill_tokens=16384, max_model_len=2 * CONTEXT, tensor_parallel_size=2,
        )  # fmt: skip
        engine = Engine(config, HostOnly(config, timed))
    for name in range(size):
        engine.add(str(name), [name] * CONTEXT, SamplingParams(0.6, STEPS + 60, ignore_eos=True))
    while engine.stats().num_generated_tokens < 8 * size:
        engine.step()
    gc.freeze()
    timed.times.clear()
    engine._scheduler.schedule = timed("schedule", engine._scheduler.schedule)  # type: ignore[method-assign]
    engine._read = timed("take in", engine._read)  # type: ignore[method-assign]
    engine._begin = timed("count", engine._begin)  # type: ignore[method-assign]
    for _ in range(STEPS):
        engine.step()
    own = sum(statistics.median(each) for name, each in timed.times.items() if "rank 1" not in name)
    return f"{size:3} sequences, ms: rank 0 {1e3 * own:.2f} ({timed})"


if __name__ == "__main__":
    sys.exit(main())
