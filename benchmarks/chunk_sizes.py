"""Time to first token by chunk size, over prompts of mixed lengths that arrive at random at one engine.

    uv run python benchmarks/chunk_sizes.py                      # on a simulated H100, by its own clock
    uv run python benchmarks/chunk_sizes.py --model FOLDER       # on this machine's device

Lengths are log-uniform from --shortest to --longest. Arrivals are Poisson. The rate is --load times what the engine
computes in chunks of 2048. Each chunk size serves the same requests. "left" is the number of tokens in a prompt's last
chunk, whose KV can only move after the first token. With --decodes N, N sequences decode all the time on the same
instance, and the time between their tokens is printed; --itl-target-ms bounds this time for `auto`.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch

from hbserve_core import Engine, InstanceConfig, make_runner
from hbserve_core.bench.simulated_device import H100_06B, H100_8B, SimulatedDevice
from hbserve_core.engine.step_times import StepWork
from hbserve_rpc import SamplingParams

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@dataclass
class Served:
    """Results of one chunk size."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; none: a simulated device")
    parser.add_argument("--simulated", choices=["8b", "0.6b"], default="8b")
    parser.add_argument(
        "--launch-ms", type=float, default=0.0,
        help="what the host takes to launch the kernels of a simulated step without a CUDA graph",
    )  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--shortest", type=int, default=256)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--decodes", type=int, default=0)
    parser.add_argument("--itl-target-ms", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("chunk size   TTFT p50      p99  ITL p50      p99 ms   left p50")
    work = requests(args)
    for size in (*args.sizes, "auto"):
        print(line(size, serve(args, size, work)), flush=True)


def requests(args: argparse.Namespace) -> list[tuple[float, int]]:
    """Return the time and the length of each request."""
    dice = random.Random(args.seed)
    ratio = args.longest / args.shortest
    lengths = [round(args.shortest * ratio ** dice.random()) for _ in range(args.requests)]
    some = [(0.0, length) for length in lengths[:100]]
    rate = args.load * len(some) / max(serve(args, 2048, some).ttft_s)
    now, work = 0.0, []
    for length in lengths:
        now += dice.expovariate(rate)
        work.append((now, length))
    return work


def serve(args: argparse.Namespace, size: int | Literal["auto"], work: list[tuple[float, int]]) -> Served:
    longest = args.longest + 16
    config = InstanceConfig(
        model_path=args.model or "", role="hybrid" if args.decodes else "prefill", chunk_size=size, max_num_seqs=256,
        max_num_batched_tokens=8192 + args.decodes, max_chunk_prefill_tokens=8192, prefix_caching=False,
        max_model_len=longest if args.model else None, itl_target_ms=args.itl_target_ms, load_format="dummy",
    )  # fmt: skip
    if args.model:
        runner: Any = make_runner(config)
        engine, clock = Engine(config, runner), time.perf_counter

        def sleep(seconds: float) -> None:
            time.sleep(seconds)

    else:
        device_s = H100_8B if args.simulated == "8b" else H100_06B

        def law(work: StepWork) -> float:
            return max(device_s(work), 1e-3 * args.launch_ms if work.num_tokens > config.most_graph_tokens else 0.0)

        model: Any = SimpleNamespace(vocab_size=1000, max_model_len=1 << 30, reach=0, eos_token_ids=())
        runner = device = SimulatedDevice(model, 1 << 16, law, lambda: 0.0005)
        device.device = torch.device("cuda" if args.launch_ms else "cpu")
        engine, clock = Engine(config, runner, device.clock), device.clock

        def sleep(seconds: float) -> None:
            device.now += seconds

    try:
        return Serving(engine, clock, sleep, args).run(work)
    finally:
        runner.close()


class Serving:
    """Serves requests as they come, through one engine."""

    def __init__(
        self, engine: Engine, clock: Callable[[], float], sleep: Callable[[float], None], args: argparse.Namespace
    ) -> None:
        self._engine, self._clock, self._sleep = engine, clock, sleep
        self._num_decodes = args.decodes
        self._arrivals: dict[str, float] = {}
        self._served = Served()
        self._last: dict[str, float] = {}
        self._computed: dict[str, int] = {}

    def run(self, work: list[tuple[float, int]]) -> Served:
        for i in range(self._num_decodes):
            self._engine.add(f"decode {i}", [1] * 512, SamplingParams(max_tokens=1 << 20, **GREEDY))
        while self._num_decodes and len(self._last) < self._num_decodes:
            self._take(self._engine.step())
        self._served.itl_s.clear()
        begin, coming = self._clock(), list(reversed(work))
        while coming or self._arrivals:
            wait_s = self._engine.wait_s()
            until = coming[-1][0] + begin - self._clock() if coming else None
            if until is not None and until <= 0:
                self._add(begin, *coming.pop(), number=len(coming))
            elif wait_s == 0:
                self._take(self._engine.step())
            else:
                self._sleep(min(each for each in (wait_s, until) if each is not None))
        for i in range(self._num_decodes):
            self._engine.release(f"decode {i}")
        return self._served

    def _add(self, begin: float, time_s: float, length: int, *, number: int) -> None:
        name = str(number)
        self._arrivals[name] = begin + time_s
        prompt = [1 + number % 900] * length
        self._engine.add(name, prompt, SamplingParams(max_tokens=1, **GREEDY), prefill_only=not self._num_decodes)

    def _take(self, outputs: list[Any]) -> None:
        now = self._clock()
        for output in outputs:
            name = output.request_id
            if output.token_id is not None and name in self._arrivals:
                self._served.ttft_s.append(now - self._arrivals.pop(name))
                self._served.left.append(output.num_computed_tokens - self._computed.pop(name, 0))
                self._engine.release(name)
            elif output.token_id is None:
                self._computed[name] = output.num_computed_tokens
            else:
                self._served.itl_s += [now - self._last[name]] if name in self._last else []
                self._last[name] = now


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def line(size: int | str, served: Served) -> str:
    """Format a line of the table. Times between tokens are "-" if nothing decodes."""
    times = [
        f"{1e3 * percentile(values, share):.1f}" if values else "-"
        for values in (served.ttft_s, served.itl_s)
        for share in (0.5, 0.99)
    ]
    return f"{size:>10}" + "".join(f"{each:>9}" for each in times) + f"{percentile(served.left, 0.5):14.0f}"


if __name__ == "__main__":
    main()
