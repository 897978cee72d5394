"""Simulated device that computes nothing and takes as long as it is told. Engines run on it by a clock of its own,
without waiting.

So what an engine decides by time, which is when to launch and how much of a prompt, can be examined without a device
and without waiting for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import hypot

import torch

from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.engine.step import PendingStep, StepResult
from hbserve_core.engine.step_times import StepWork
from hbserve_core.model.model_config import ModelConfig


@dataclass(frozen=True)
class StepLaw:
    """Formula of the time that a device takes for a step: products that read all weights or are bound by operations,
    keys and values that are read, attention's operations, and a minimum for every step."""

    weights_s: float
    token_s: float
    key_s: float
    pair_s: float
    least_s: float = 0.0

    def __call__(self, work: StepWork) -> float:
        products = hypot(self.weights_s, self.token_s * work.num_tokens)
        return self.least_s + products + self.key_s * work.num_keys + self.pair_s * work.num_pairs


H100_8B = StepLaw(weights_s=5.3e-3, token_s=24.5e-6, key_s=4.8e-8, pair_s=0.5e-9)
"""Times of Qwen3-8B's shape in bfloat16, within some 15 % of those in docs/performance-kernels.md."""
H100_06B = StepLaw(weights_s=0.4e-3, token_s=2.0e-6, key_s=3.7e-8, pair_s=0.23e-9, least_s=1.2e-3)
"""Times of Qwen3-0.6B's shape in bfloat16, with the same precision."""


class SimulatedDevice:
    """Runner with overlap. Steps are computed one after the other; each samples token 5."""

    device, dtype = torch.device("cpu"), torch.float32
    overlaps = True
    computed = None
    transfer_addresses: Sequence[str] = ()

    def __init__(
        self,
        model_config: ModelConfig,
        num_blocks: int,
        time_s: Callable[[StepWork], float],
        host_time_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """time_s: returns the time of a step on the device. host_time_s: returns the time that the host takes to launch
        one."""
        self.model_config = model_config
        self.fingerprint: dict[str, str | int] = {}
        self.pool = torch.zeros(num_blocks, 1)
        self.now = 0.0
        self.free_at = 0.0
        """Time when all launched steps have been computed."""
        self.steps: list[tuple[float, float, dict[str, int]]] = []
        """Begin, end, and number of new tokens by request, of each step."""
        self._time_s, self._host_time_s = time_s, host_time_s

    def clock(self) -> float:
        """Return the device's time in seconds, which the engine uses as its own."""
        return self.now

    def launch(self, batch: Sequence[ScheduledChunk]) -> PendingStep:
        self.now += self._host_time_s()
        work = StepWork.of([(chunk.sequence, chunk.first, chunk.num_new_tokens) for chunk in batch])
        begin = max(self.now, self.free_at)
        end = self.free_at = begin + self._time_s(work)
        self.steps.append((begin, end, {chunk.sequence.request_id: chunk.num_new_tokens for chunk in batch}))
        sampled = StepResult([5 if chunk.samples else None for chunk in batch])
        for place, chunk in enumerate(batch):
            if chunk.samples and chunk.sequence.choices:
                sampled.choices[place] = [(5, None)] * len(chunk.sequence.choices)

        def tokens() -> StepResult:
            self.now = max(self.now, end)
            return sampled

        return tokens

    def draw(self) -> None:
        """Do nothing: no request has a grammar."""

    def is_idle(self) -> bool:
        return self.now >= self.free_at

    def close(self) -> None:
        """Do nothing: there is nothing to end."""
