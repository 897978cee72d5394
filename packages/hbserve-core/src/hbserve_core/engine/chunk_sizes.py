"""Sizes of the chunks that prompts are computed in: `chunk_size`, or `auto`.

`auto` gives each step so many prompt tokens as take STEP_S, by what steps have taken so far, and at least
FEWEST_TOKENS, below which reading the weights takes longer than the products. A step that is longer computes hardly
more per second, and keeps those waiting that come meanwhile. The more waits, the longer it may be all the same. With
`itl_target_ms` a step takes no longer than that, decodes included.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Ids
from itertools import islice

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.sequence import ScheduledChunk, Sequence
from hbserve_core.engine.step_times import StepTimes, StepWork

STEP_S = 0.010
FEWEST_TOKENS = 1024
FEWEST_BESIDE_DECODES = 64
"""With a target for the time between tokens: prompts must go on, even where decodes alone take longer than that."""
SHORT_TOKENS = 2048
"""Prompts of which no more is left come before others: these wait little for them, which are a small part of the work,
and would wait long themselves."""
STEPS_OF_BACKLOG = 8
"""The more waits, the longer a step may be: what steps cost beside their tokens is what makes the last wait longest."""
MOST_OVERTAKERS = 64
"""So many of those that wait are looked at."""
SHARE_OF_LONG = 8
"""One part in so many of each step is for a long prompt in any case."""


class ChunkSizes:
    """How many tokens of prompts the next step computes, and of each."""

    def __init__(self, config: InstanceConfig, step_times: StepTimes) -> None:
        self._config = config
        self._step_times = step_times
        self._fixed = None if config.chunk_size == "auto" else config.chunk_size
        self.is_adaptive = self._fixed is None
        """Whether the sizes depend on anything, and short prompts come first."""
        self._target_s = STEP_S if config.itl_target_ms is None else config.itl_target_ms / 1e3
        self._fewest = FEWEST_TOKENS if config.itl_target_ms is None else FEWEST_BESIDE_DECODES
        self._of_step = self._fewest

    def of_step(self, decodes: Ids[ScheduledChunk], begun: Ids[Sequence], waiting: Iterable[Sequence]) -> int:
        """Prompt tokens of a step that also has these decodes. begun, waiting: prompts that are to be computed."""
        most = self._config.max_chunk_prefill_tokens
        if not self.is_adaptive:
            return most
        work = StepWork.of([(None, chunk.first, chunk.num_new_tokens) for chunk in decodes])
        if self._config.itl_target_ms is not None:
            first = begun[0].num_computed_tokens if begun else 0
            self._of_step = self._within_target(work, first, most)
            return self._of_step
        # Attention is no reason for more steps: they would have more of it, not less.
        wanted = self._within_target(work, 0, most)
        if not decodes:
            backlog = sum(each.num_uncomputed_tokens for each in (*begun, *islice(waiting, MOST_OVERTAKERS)))
            wanted = max(wanted, backlog // STEPS_OF_BACKLOG)
        self._of_step = min(most, wanted)
        return self._of_step

    def of(self, sequence: Sequence, wanted: int, budget: int, most: int) -> int:
        """Of one sequence with `wanted` tokens to compute. budget, most: prompt tokens, and any, left of the step."""
        budget, config = min(budget, most), self._config
        if self._fixed is not None:
            return min(wanted, self._fixed, budget)
        if not sequence.prefill_only or not self._of_step == budget < wanted <= 2 * budget:
            return min(wanted, budget)
        # Of its last two chunks, the last is half a step at most: its KV can only move after the first token.
        return min(max(budget, wanted - budget // 2), most, config.max_chunk_prefill_tokens)

    def is_short(self, num_tokens: int) -> bool:
        """Whether a prompt of which so much is left comes before those that came earlier."""
        return self.is_adaptive and num_tokens <= SHORT_TOKENS

    def left_for_long(self, budget: int) -> int:
        """How much of a step short prompts leave for a long one."""
        return budget // SHARE_OF_LONG

    def _within_target(self, decodes: StepWork, first: int, most: int) -> int:
        """The most tokens that are predicted to take no longer than the target."""
        low = size = min(self._fewest, most)
        while size < most:
            known, size = size, min(2 * size, most)
            if self._time_s(decodes, first, size, known) <= self._target_s:
                low = size
        high = min(2 * low, most)
        while high - low > max(32, low // 16):
            middle = (low + high) // 2
            if self._time_s(decodes, first, middle, low) <= self._target_s:
                low = middle
            else:
                high = middle
        return low

    def _time_s(self, decodes: StepWork, first: int, count: int, known: int) -> float:
        """Of a step with `count` prompt tokens; if none of that size was seen, in proportion to one with `known`."""
        if (time_s := self._step_times.predict_s(decodes.with_chunk(first, count))) is not None:
            return time_s
        if (time_s := self._step_times.predict_s(decodes.with_chunk(first, known))) is not None:
            return time_s * count / known
        return float("inf")
