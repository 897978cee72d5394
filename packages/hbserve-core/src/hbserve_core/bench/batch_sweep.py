"""Time of a decode step by batch size, beside the least time that it could take: `hbserve bench engine --sweep`.

The timed steps are those in which every request decodes, and none joins or ends. Each batch has fresh random prompts
that are really computed: with shared blocks, what should come from memory would come from the device's cache.

A *cliff* is a batch size that the engine serves badly, which shows in one of two ways:
    its step takes more than 3 % longer than that of a larger batch with the same context; or
    its share of the limit is below 0.8 of a neighbour's. Neighbours are the next sizes measured on either side, if one
    is at most twice the other.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from time import perf_counter, sleep
from typing import Any

import torch
from tqdm import tqdm

from hbserve_core.bench.device_limits import DeviceLimits, measure_limits
from hbserve_core.bench.model_work import DecodeLimit, decode_limit, stored_bytes
from hbserve_core.bench.workloads import Sizes, bench_config
from hbserve_core.config import InstanceConfig
from hbserve_core.engine.engine import Engine
from hbserve_core.engine.step import Runner
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.model_config import load_model_config
from hbserve_core.ranks.make_runner import make_runner
from hbserve_rpc import SamplingParams

BATCH_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 96, 128, 192, 256)
"""Batch sizes, dense where steps are short, and on both sides of the sizes at which another kernel or graph is
chosen."""

_NUM_STEPS = 48
_FEWEST_STEPS = 8
_ENOUGH_S = 3.0
"""Time after which _FEWEST_STEPS timed steps are enough: on a CPU that others use too, 48 took two minutes."""
_NUM_LAUNCHES = 240
"""Number of steps after which a new engine decides by 200 of them when it launches the next one."""
_STEPS_TO_PROMPT = 4
_NUM_PROMPT_LAUNCHES = 40
"""Number of steps with one prompt, and of steps with two. The first 16 of each teach the engine how long they take."""
_NUM_WARM = 4
"""Number of steps at the beginning of each batch that are not timed."""
_ROUNDS = 3
"""Number of times that a prompt is timed."""
_MOST_OF_THE_POOL = 0.98
"""Share of the pool that a batch may take: the engine keeps a hundredth of it for growth."""
_NOISE = 1.03
_MUCH_LESS = 0.8
_UNEVEN = 1.5


@dataclass(frozen=True)
class SweepPlan:
    """Plan of what to measure: every batch size with every context, both ascending.

    Raises:
        InvalidInstanceConfig: there are no sizes or contexts, or they are not ascending numbers from 1 on.
    """

    batch_sizes: tuple[int, ...] = BATCH_SIZES
    contexts: tuple[int, ...] = (512,)
    """Numbers of tokens of each prompt."""

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts"):
            values = getattr(self, name)
            if not values or min(values) < 1 or values != tuple(sorted(set(values))):
                raise InvalidInstanceConfig(f"{name}={values!r}: expected ascending numbers >= 1, at least one")


@dataclass(frozen=True)
class SweepRow:
    """Measurement of one batch size with one context."""

    context: int
    batch: int
    step_s: float
    """Median of the timed steps."""
    longest_step_s: float
    limit: DecodeLimit

    @property
    def share(self) -> float:
        return self.limit.limit_s / self.step_s

    def record(self) -> dict[str, float]:
        """Return all numbers in one dictionary, as for a file."""
        row: dict[str, Any] = asdict(self)
        limit: dict[str, float] = row.pop("limit")
        return row | limit | {"share": self.share, "copy_share": self.limit.copy_s / self.step_s}

    def __str__(self) -> str:
        limit, step_s = self.limit, self.step_s
        times = f"{self.batch:7d} {1e3 * step_s:9.3f} {1e3 * self.longest_step_s:9.3f}"
        rates = f"{limit.read_bytes / step_s / 1e9:8.4g} {limit.flops / step_s / 1e12:9.3g}"
        uneven = "  uneven" if self.longest_step_s > _UNEVEN * step_s else ""
        return f"{times} {rates} {1e3 * limit.limit_s:9.3f}  {limit.share_of(step_s)}{uneven}"


HEADINGS = f"{'batch':>7} {'step ms':>9} {'longest':>9} {'GB/s':>8} {'TFLOP/s':>9} {'limit ms':>9}"


@dataclass(frozen=True)
class Cliff:
    context: int
    batch: int
    why: str


def find_cliffs(rows: Sequence[SweepRow]) -> list[Cliff]:
    """Find the cliffs among rows in any order; the top of this file says what they are."""
    found = []
    for row in sorted(rows, key=lambda row: (row.context, row.batch)):
        others = [other for other in rows if other.context == row.context]
        if why := _slower_than_a_larger(row, others) or _worse_than_a_neighbour(row, others):
            found.append(Cliff(row.context, row.batch, why))
    return found


def _slower_than_a_larger(row: SweepRow, others: Sequence[SweepRow]) -> str | None:
    larger = [other for other in others if other.batch > row.batch and row.step_s > _NOISE * other.step_s]
    if not larger:
        return None
    fastest = min(larger, key=lambda other: other.step_s)
    return f"{1e3 * row.step_s:.4g} ms, batch {fastest.batch} takes {1e3 * fastest.step_s:.4g}"


def _worse_than_a_neighbour(row: SweepRow, others: Sequence[SweepRow]) -> str | None:
    below = max((other for other in others if other.batch < row.batch), key=lambda other: other.batch, default=row)
    above = min((other for other in others if other.batch > row.batch), key=lambda other: other.batch, default=row)
    near = [row, *(other for other in (below, above) if row.batch <= 2 * other.batch and other.batch <= 2 * row.batch)]
    best = max(near, key=lambda other: other.share)
    if row.share >= _MUCH_LESS * best.share:
        return None
    return f"share {row.share:.2f}, batch {best.batch} has {best.share:.2f}"


def sweep_config(model_path: str, plan: SweepPlan, **settings: object) -> InstanceConfig:
    """Return the configuration of an engine for all of the plan that fits, with the shapes of steps that an instance of
    usual size has.

    Raises what `load_model_config` raises.
    """
    config = bench_config(model_path, Sizes(), **settings)
    batch = max(config.max_num_seqs, *plan.batch_sizes)
    longest = plan.contexts[-1] + _num_steps(config, plan.batch_sizes[-1], plan.contexts[-1])
    limit = load_model_config(model_path).max_model_len
    room = min(limit, round(longest / _MOST_OF_THE_POOL) + config.block_size)
    return bench_config(model_path, Sizes(), **{**settings, "max_num_seqs": batch, "max_model_len": room})


def _num_steps(config: InstanceConfig, batch: int, context: int) -> int:
    """Return the largest number of tokens that a request of such a batch generates: while others join, and then while
    steps are timed."""
    joining = -(-batch * context // max(1, config.max_num_batched_tokens - batch)) + 1
    return joining + _NUM_WARM + _NUM_STEPS + 2


class BatchSweep:
    """Engine, with batches of requests on it."""

    def __init__(
        self,
        config: InstanceConfig,
        runner: Runner,
        clock: Callable[[], float] = perf_counter,
        sleep: Callable[[float], None] = sleep,
    ) -> None:
        """clock, sleep: clock and sleep of a device that has a time of its own."""
        self._config = config
        self._runner = runner
        self._clock, self._sleep = clock, sleep
        self._engine = Engine(config, runner, clock)
        self._random = random.Random(0)
        self._count = 0

    @cached_property
    def limits(self) -> DeviceLimits:
        """Limits of the device, measured when they are first asked for, which takes seconds on a CPU."""
        return measure_limits(self._runner.device, self._runner.dtype, self._config.tensor_parallel_size)

    def obstacle(self, batch: int, context: int) -> str | None:
        """Return why such a batch cannot be measured here, or None if it can."""
        longest, blocks = context + _num_steps(self._config, batch, context), self._engine.blocks
        if longest > self._runner.model_config.max_model_len:
            return f"{longest} tokens a sequence, the model takes {self._runner.model_config.max_model_len}"
        if batch * blocks.num_blocks_for(longest) > _MOST_OF_THE_POOL * blocks.num_blocks:
            return f"{batch} x {longest} tokens do not fit the pool of {blocks.num_blocks * blocks.block_size}"
        return None

    def measure(self, batch: int, context: int) -> SweepRow:
        """Measure a batch that has no `obstacle`. Raises LogitsNotFinite."""
        times, mean_context = self._step_times(batch, context)
        model, dtype, in_pool = self._runner.model_config, self._runner.dtype, self._runner.pool.dtype
        weights = stored_bytes(self._config, model, dtype, self._runner.device)
        limit = decode_limit(model, dtype, batch, mean_context, self.limits, in_pool, weights)
        return SweepRow(context, batch, statistics.median(times), max(times), limit)

    def step_s(self, batch: int, context: int) -> float:
        """Measure the median step time of a batch that has no `obstacle`. Raises LogitsNotFinite."""
        return statistics.median(self._step_times(batch, context)[0])

    def _step_times(self, batch: int, context: int) -> tuple[list[float], float]:
        """Measure the seconds of each step, and the mean number of tokens of a request while they were timed."""
        preemptions = self._engine.stats().num_preemptions
        names = self._add(batch, context, _num_steps(self._config, batch, context))
        ends: list[float] = []
        generated: list[float] = []
        while len(ends) <= _NUM_WARM + _NUM_STEPS and not _are_enough(ends[_NUM_WARM:]):
            assert self._engine.has_work(), "requests ended before they were timed"
            outputs = self._engine.step()
            for output in outputs:
                output.raise_error()
            if sum(output.token_id is not None and output.index > 0 for output in outputs) == batch:
                ends.append(self._clock())
                generated.append(sum(output.index for output in outputs) / batch)
        assert self._engine.stats().num_preemptions == preemptions, "the pool was full"
        self._end(names)
        times = [end - begin for begin, end in pairwise(ends[_NUM_WARM:])]
        # A request's n-th token is sampled after its prompt and n tokens.
        return times, context + statistics.mean(generated[_NUM_WARM + 1 :])

    def prompt_s(self, num_tokens: int) -> tuple[float, float]:
        """Measure the seconds from a lone prompt to its token, and from one prompt's token to the next one's, where
        each prompt is launched while the previous one is computed, if the runner does that. Returns medians of _ROUNDS,
        after a warm-up."""
        alone: list[float] = []
        for _ in range(_ROUNDS + 1):
            began_s = self._clock()
            self._add(1, num_tokens, 1)
            alone += [end_s - began_s for end_s in self._ends_of_tokens()]
        alone_s = statistics.median(alone[1:])
        if not self._runner.overlaps:
            return alone_s, alone_s
        ends: list[float] = []
        for _ in range(_ROUNDS + 2):
            self._add(1, num_tokens, 1)
            ends += self._tokens_of_a_step()
        ends += self._ends_of_tokens()
        return alone_s, statistics.median([end - begin for begin, end in pairwise(ends)][1:])

    def _ends_of_tokens(self) -> list[float]:
        """Run until no work is left. Returns when each token came."""
        ends: list[float] = []
        while self._engine.has_work():
            ends += self._tokens_of_a_step()
        return ends

    def _tokens_of_a_step(self) -> list[float]:
        """Run a step. Returns when each of its tokens came. Raises LogitsNotFinite."""
        outputs = self._engine.step()
        for output in outputs:
            output.raise_error()
        return [self._clock() for _ in outputs]

    def launched_ahead_s(self, batch: int, context: int, prompt: int | None = None) -> float:
        """Measure how long before the end of a step the engine launches the next one while such a batch decodes.
        prompt: number of tokens of a prompt that is computed beside it in every fourth step. Returns 0 if the engine
        does not launch ahead, as on a CPU, or if all steps are so short that each is followed at once."""
        if not self._runner.overlaps:
            return 0.0
        self._engine = Engine(self._config, self._runner, self._clock)  # a new one remembers no other steps
        count = min(_NUM_LAUNCHES, self._runner.model_config.max_model_len - context - 1)
        names = self._add(batch, context, count + 1)
        for step in range(count):
            if prompt is not None and step % _STEPS_TO_PROMPT == 0:
                self._add(1, prompt, 1)
            self._step_in_time()
        self._end(names)
        return self._engine.launch_times.slack_s

    def launched_ahead_of_prompts_s(self, prompt: int) -> float:
        """Measure the same while steps alternately compute one prompt of so many tokens and two, as on a busy instance
        that only computes prompts. Two are too long for a CUDA graph if one is as long as it may be, and the steps
        before them are no shorter than such a launch. Beside decodes most are shorter, and the engine does not count
        what comes late."""
        if not self._runner.overlaps:
            return 0.0
        self._engine = Engine(self._config, self._runner, self._clock)
        for step in range(2 * _NUM_PROMPT_LAUNCHES):
            self._add(1 + step % 2, prompt, 1)
            self._step_in_time()
        self._end(())
        return self._engine.launch_times.slack_s

    def _step_in_time(self) -> None:
        """Run a step like an instance, which waits for requests until the step must be launched."""
        while wait_s := self._engine.wait_s():
            self._sleep(wait_s)
        self._tokens_of_a_step()

    @property
    def device_name(self) -> str:
        """Name of the card, or "cpu"."""
        device = self._runner.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def kv_bytes_per_token(self) -> int:
        """Number of bytes of a token's keys and values on all ranks together."""
        block, ranks = self._runner.pool[0], self._config.tensor_parallel_size
        return block.numel() * block.element_size() // self._engine.blocks.block_size * ranks

    @property
    def kv_tokens(self) -> int:
        """Number of tokens for which the pool has room."""
        return self._engine.blocks.num_blocks * self._engine.blocks.block_size

    def _add(self, batch: int, context: int, num_tokens: int) -> list[str]:
        vocabulary = range(self._runner.model_config.vocab_size)
        names = []
        for _ in range(batch):
            self._count += 1
            names.append(str(self._count))
            params = SamplingParams(0.6, num_tokens, ignore_eos=True)
            self._engine.add(names[-1], self._random.choices(vocabulary, k=context), params)
        return names

    def _end(self, names: Sequence[str]) -> None:
        for name in names:
            self._engine.release(name)
        while self._engine.has_work():
            self._engine.step()


def _are_enough(ends: Sequence[float]) -> bool:
    """Return whether these timed steps are enough. ends: the time when each ended, after the end of the step before
    them."""
    return len(ends) > _FEWEST_STEPS and ends[-1] - ends[0] >= _ENOUGH_S


def run_sweep(
    config: InstanceConfig, plan: SweepPlan, say: Callable[[str], None], keep: Callable[[SweepRow], None]
) -> None:
    """Measure the plan, and say a block of lines for each context, and what the cliffs are. `keep` is called with each
    row when it has been measured.

    config: from `sweep_config`. Raises what `make_runner` raises, and LogitsNotFinite if the model gives no numbers.
    """
    runner = make_runner(config)
    try:
        sweep, rows = BatchSweep(config, runner), []
        say(f"limits of this device: {sweep.limits}")
        say("cliff: over 3 % slower than a larger batch, or below 0.8 of the share of a neighbour within a factor of 2")
        say("uneven: a step took over 1.5 times the median")
        for context in plan.contexts:
            say(f"context {context}\n{HEADINGS}")
            measured = list(_rows(sweep, plan, context, keep))
            say("\n".join(_lines(sweep, plan, context, measured)))
            rows += measured
        say(_summary(rows, plan))
    finally:
        runner.close()


def _rows(sweep: BatchSweep, plan: SweepPlan, context: int, keep: Callable[[SweepRow], None]) -> Iterator[SweepRow]:
    # Without a terminal there is no progress bar.
    for batch in tqdm(plan.batch_sizes, desc=f"context {context}", disable=None, leave=False):
        if sweep.obstacle(batch, context) is None:
            row = sweep.measure(batch, context)
            keep(row)
            yield row


def _lines(sweep: BatchSweep, plan: SweepPlan, context: int, rows: Sequence[SweepRow]) -> Iterator[str]:
    cliffs = {cliff.batch for cliff in find_cliffs(rows)}
    line_of = {row.batch: f"{row}{'  cliff' if row.batch in cliffs else ''}" for row in rows}
    for batch in plan.batch_sizes:
        yield line_of.get(batch) or f"{batch:7d} skipped: {sweep.obstacle(batch, context)}"


def _summary(rows: Sequence[SweepRow], plan: SweepPlan) -> str:
    if not rows:
        return "cliffs: nothing was measured"
    several = len(plan.contexts) > 1
    cliffs = [
        f"batch {cliff.batch}{f' at {cliff.context}' if several else ''} ({cliff.why})" for cliff in find_cliffs(rows)
    ]
    return f"cliffs: {', '.join(cliffs) or 'none'}"
