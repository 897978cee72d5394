"""Times of the simulator's hybrid instance and of the real engine: the same requests and step times, and noise only on
request.

    python benchmarks/simulator_beside_engine.py
    python benchmarks/simulator_beside_engine.py --noise 0.01 --prompt-launch-ms 8

Both launch a step some time before the end of the one before it; a request that comes later is in the next step. This
time is printed as "slack": the engine learns it, and the model gets the engine's last value. Steps take the profile's
times, multiplied by a number around 1 that varies by --noise. A launch takes the host --launch-ms, and one with prompts
--prompt-launch-ms.
"""

import argparse
import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hbserve.load.report import percentile
from hbserve.simulator.engine import DecodeWork, ModelledEngine, PromptWork
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.profile import StepLaw, load_profile
from hbserve_core import Engine, InstanceConfig
from hbserve_core.bench.simulated_device import SimulatedDevice
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.engine.step import PendingStep
from hbserve_rpc import SamplingParams
from hbserve_scheduler.virtual_time import VirtualTimeLoop

LIMITS = EngineLimits(chunk_size=2048, max_num_batched_tokens=4096)


@dataclass
class Served:
    """Times of each request, by its number in the order in which they came."""

    ttft_s: dict[int, float] = field(default_factory=dict)
    tpot_s: dict[int, float] = field(default_factory=dict)
    slack_s: float = 0.0


class Device(SimulatedDevice):
    """A device whose steps take as long as a profile says."""

    def __init__(self, law: StepLaw, arguments: argparse.Namespace) -> None:
        model: Any = SimpleNamespace(vocab_size=1000, max_model_len=1 << 30, reach=0, eos_token_ids=())
        super().__init__(model, 1 << 15, lambda _: self._step_s, lambda: self._launch_s)
        self._law, self._arguments, self._dice = law, arguments, random.Random(1)
        self._step_s = self._launch_s = 0.0

    def launch(self, batch: Sequence[ScheduledChunk]) -> PendingStep:
        prompts = [chunk for chunk in batch if chunk.first < self._arguments.input]
        keys = sum(chunk.first for chunk in batch if chunk.first >= self._arguments.input)
        pairs = sum(chunk.num_new_tokens * (chunk.first + chunk.num_new_tokens / 2) for chunk in prompts)
        new_tokens = sum(chunk.num_new_tokens for chunk in batch)
        varies = 1 + self._dice.gauss(0, self._arguments.noise)
        self._step_s = self._law.step_s(new_tokens, pairs, keys) * varies
        self._launch_s = (self._arguments.prompt_launch_ms if prompts else self._arguments.launch_ms) / 1e3
        return super().launch(batch)


def engine_serves(law: StepLaw, arguments: argparse.Namespace, arrivals: Sequence[float]) -> Served:
    """Serve the requests by the real engine, driven as its thread drives it."""
    device = Device(law, arguments)
    config = InstanceConfig(
        model_path="", chunk_size=LIMITS.chunk_size, max_num_seqs=LIMITS.max_num_seqs, prefix_caching=False,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        max_chunk_prefill_tokens=LIMITS.max_chunk_prefill_tokens,
    )  # fmt: skip
    engine, served, coming = Engine(config, device, device.clock), Served(), list(enumerate(arrivals))[::-1]
    params = SamplingParams(0.0, arguments.output, ignore_eos=True)
    while coming or engine.has_work():
        wait_s = engine.wait_s()
        until = coming[-1][1] - device.now if coming else None
        if until is not None and until <= 0:
            engine.add(str(coming.pop()[0]), [1] * arguments.input, params)
        elif wait_s != 0:
            device.now += min(each for each in (wait_s, until) if each is not None)
        else:
            for output in engine.step():
                if output.token_id is None:  # a part of a prompt
                    continue
                number = int(output.request_id)
                first_s = served.ttft_s.setdefault(number, device.now - arrivals[number])
                if output.is_last:
                    decode_s = device.now - arrivals[number] - first_s
                    served.tpot_s[number] = decode_s / (arguments.output - 1)
    served.slack_s = engine.launch_times.slack_s
    return served


async def model_serves(law: StepLaw, arguments: argparse.Namespace, arrivals: Sequence[float]) -> Served:
    """Serve the requests by the simulator's engine, in its loop."""
    loop, engine, served, all_ended = asyncio.get_running_loop(), ModelledEngine(law, LIMITS), Served(), asyncio.Event()

    def add(number: int) -> None:
        def is_computed() -> None:
            served.ttft_s[number] = loop.time() - arrivals[number]
            engine.add(DecodeWork(arguments.input, arguments.output - 1, lambda _: None, has_ended))

        def has_ended() -> None:
            decode_s = loop.time() - arrivals[number] - served.ttft_s[number]
            served.tpot_s[number] = decode_s / (arguments.output - 1)
            if len(served.tpot_s) == len(arrivals):
                all_ended.set()

        engine.add(PromptWork(arguments.input, 0, None, is_computed))

    for number, at_s in enumerate(arrivals):
        loop.call_at(at_s, add, number)
    await all_ended.wait()
    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="h100-qwen3-8b")
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 7.0, 9.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--input", type=int, default=2048)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of a step's time, as a part of it")
    parser.add_argument("--launch-ms", type=float, default=0.5)
    parser.add_argument("--prompt-launch-ms", type=float, default=0.5)
    arguments = parser.parse_args()
    law = StepLaw(load_profile(arguments.profile))
    law.has_graphs, law.overlaps = False, True  # as the simulated device
    for rate in arguments.rates:
        dice, now_s, arrivals = random.Random(5), 0.0, []
        for _ in range(round(rate * arguments.seconds)):
            now_s += dice.expovariate(rate)
            arrivals.append(now_s)
        real = engine_serves(law, arguments, arrivals)
        law.launched_ahead_s = law.launched_ahead_mixed_s = law.launched_ahead_eager_s = real.slack_s
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            model = runner.run(model_serves(law, arguments, arrivals))
        known = range(len(arrivals) // 3, len(arrivals))  # before, the engine learns how long steps take
        print(f"{rate:5g} | {' | '.join(beside(real, model, known))} | slack {1e3 * real.slack_s:.2f} ms", flush=True)


def beside(real: Served, model: Served, known: range) -> list[str]:
    """Format the engine's figures, the model's, and the ratio of the second to the first."""
    figures = {"TTFT p50": ("ttft_s", 50), "p90": ("ttft_s", 90), "TPOT p50": ("tpot_s", 50)}
    found = []
    for title, (name, share) in figures.items():
        one, other = (1e3 * percentile([getattr(each, name)[i] for i in known], share) for each in (real, model))
        found.append(f"{title} {one:.1f} {other:.1f} ({other / one:.2f})")
    later = [real.ttft_s[i] - model.ttft_s[i] for i in known]
    return [*found, f"later by {1e3 * percentile(later, 50):.2f} ms"]


if __name__ == "__main__":
    main()
