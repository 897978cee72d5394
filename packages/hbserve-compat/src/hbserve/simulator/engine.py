"""The engine of a modelled instance: its steps take the time that a profile says, and compute nothing.

One timer stands for several steps, up to the next one that changes something: for decode steps of the same sequences,
until the first of these sequences ends; for steps that have only prompts, until a prompt ends. A request that arrives
meanwhile cuts the timer short at the end of the current step. So the time of a simulation depends on the number of
requests, and not of tokens or chunks. An engine launches a step some time before the end of the one before it. A
request that arrives after that is in the step after the launched one.
"""

import asyncio
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.launch_times import ModelledLaunchTimes
from hbserve.simulator.profile import StepLaw
from hbserve_core.engine.step_times import MOST_OVERTAKERS, ChunkSizes, StepWork
from hbserve_rpc.messages import Role

GAPS_PER_S = 10_000
"""Times between two tokens are counted in units of 1 / GAPS_PER_S seconds."""


@dataclass(eq=False, slots=True)
class PromptWork:
    """A prompt, which is computed chunk by chunk."""

    num_tokens: int
    done: int
    """Tokens that have been computed, or were cached."""
    on_chunk: Callable[[float], object] | None
    """Called with the end of each chunk except the last. The call may come later than that time, but not after the end
    of the prompt or a call of `settle`. None: the same instance decodes."""
    on_done: Callable[[], None]
    """Called when all chunks of the prompt's last step have ended."""
    num_computed_tokens: int = field(init=False)
    """Tokens that will have been computed when all planned steps have ended."""
    _cached: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_computed_tokens = self._cached = self.done

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def prefill_only(self) -> bool:
        """Whether another instance decodes, which waits for the KV of the last chunk."""
        return self.on_chunk is not None

    @property
    def has_begun(self) -> bool:
        return self.num_computed_tokens > self._cached


@dataclass(eq=False, slots=True)
class DecodeWork:
    """A sequence that decodes: it gets a token in each step."""

    context: int
    remaining: int
    """Tokens that are still to be generated, at least one."""
    on_first: Callable[[float], object]
    """Called when its first step begins, with the time at which that will end; not if that step is its last."""
    on_done: Callable[[], None]
    end_step: int = -1
    is_gone: bool = False


@dataclass
class EngineFigures:
    """What an engine has computed."""

    busy_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps: Counter[int] = field(default_factory=Counter)
    """Number of times between two tokens of a sequence, by length in tenths of a millisecond."""

    @property
    def gaps_s(self) -> Counter[float]:
        return Counter({gap / GAPS_PER_S: count for gap, count in self.gaps.items()})


class _Chunks:
    """The chunks of one step, while they are being chosen."""

    def __init__(self, sizes: ChunkSizes, budget: int, most: int) -> None:
        """`budget`: prompt tokens that the step may have. `most`: tokens of any kind that it may still have."""
        self.chunks: list[tuple[PromptWork, int]] = []
        self.budget = budget
        self._sizes, self._most = sizes, most

    def take(self, works: Iterable[PromptWork]) -> None:
        """Take chunks of these prompts, in order, as long as there is room."""
        for work in works:
            count = self._sizes.of(work, work.num_uncomputed_tokens, self.budget, self._most)
            if count == 0:
                return
            self.budget = max(0, self.budget - count)
            self._most -= count
            self.chunks.append((work, count))


class ModelledEngine:
    """The engine. It belongs to one event loop, and uses that loop's clock."""

    def __init__(self, law: StepLaw, limits: EngineLimits, role: Role = "hybrid") -> None:
        self.limits = limits
        self.figures = EngineFigures()
        self.prompts: deque[PromptWork] = deque()
        self.batch = self.keys = 0
        """Number of sequences that decode, and of all their tokens."""
        self._law = law
        self._chunk_sizes = ChunkSizes(limits, role, self._predict_s, has_graphs=law.has_graphs)
        self._launch_times = ModelledLaunchTimes(law, limits.most_graph_tokens)
        self._loop = asyncio.get_running_loop()
        self._step = 0
        """Number of decode steps so far."""
        self._joining: list[DecodeWork] = []
        self._ends: list[tuple[int, int, DecodeWork]] = []
        self._numbers = itertools.count()
        self._planned: deque[tuple[float, int, list[tuple[PromptWork, int]]]] = deque()
        """Planned steps with prompts, beginning with the current one: its end, its prompt tokens, and its chunks."""
        self._timer: asyncio.Handle | None = None
        self._end_s = math.inf
        """End of the steps that the timer stands for."""
        self._missed: list[PromptWork | DecodeWork] = []
        """Work that arrived when the step after the current one had already been launched."""
        self._began_s = 0.0
        self._steps_under_way = 0
        """Number of decode steps that the timer stands for, from `_began_s` on."""
        self._first_end_s: float | None = None
        """End of the first of these steps, if sequences have joined in it and it has not been counted yet."""
        self._has_died = False

    def add(self, work: PromptWork | DecodeWork) -> None:
        """Add work to the next step that has not been launched yet."""
        if self._has_died:
            return
        if self._timer is None:  # `call_soon`, so that all work that arrives at this moment is in the step
            self._timer = self._loop.call_soon(self._begin)
        else:
            self._cut_short()
            step_s = (self._end_s - self._began_s) / max(1, self._steps_under_way)
            ahead_s = self._launch_times.ahead_s(step_s)
            if ahead_s and self._end_s - self._loop.time() < ahead_s and self._has_next():
                self._missed.append(work)
                return
        self._queue(work)

    @property
    def is_idle(self) -> bool:
        """Whether no step is running or about to begin."""
        return self._timer is None

    def _has_next(self) -> bool:
        """Whether there is work for the step after the current one. If there is none, that step has not been launched,
        and new work is launched at once, however late it comes."""
        return bool(self.batch or self._joining or any(work.num_uncomputed_tokens for work in reversed(self.prompts)))

    def _queue(self, work: PromptWork | DecodeWork) -> None:
        if isinstance(work, PromptWork):
            self.prompts.append(work)
        else:
            self._joining.append(work)

    def remove(self, work: PromptWork | DecodeWork) -> None:
        """Remove aborted work: it is in no step after the current one."""
        if work in self._missed:
            self._missed.remove(work)
        elif isinstance(work, PromptWork):
            if work in self.prompts:
                self.prompts.remove(work)
                self._cut_short()
        elif work in self._joining:
            self._joining.remove(work)
        elif not work.is_gone and work.end_step >= 0:
            self._cut_short()
            work.is_gone = True
            self.batch -= 1
            self.keys -= work.context + max(0, work.remaining - (work.end_step - self._step))

    def stop(self) -> None:
        """Let the engine die with its process: none of its callbacks are called any more."""
        if self._timer is not None:
            self._timer.cancel()
        self.settle()
        self._has_died = True

    def settle(self) -> None:
        """Record the chunks that have ended, and call their `on_chunk`, for code that depends on it."""
        now_s, planned = self._loop.time(), self._planned
        while len(planned) > 1 and planned[0][0] <= now_s:
            end_s, num_tokens, chunks = planned.popleft()
            self._count(1, 0, end_s - self._began_s, num_tokens)
            self._began_s = end_s
            for work, count in chunks:
                work.done += count
                if work.on_chunk is not None:
                    work.on_chunk(end_s)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _cut_short(self) -> None:
        """Let the timer fire at the end of the current step."""
        if len(self._planned) > 1:
            self.settle()
        if len(self._planned) > 1:
            end_s = self._planned[0][0]
            while len(self._planned) > 1:
                for work, count in self._planned.pop()[2]:
                    work.num_computed_tokens -= count
            self._end_at(end_s)
        if self._steps_under_way > 1:
            self._pass_first()
            self._cut_decodes()

    def _cut_decodes(self) -> None:
        if self._first_end_s is not None:
            self._steps_under_way = 1
            self._end_at(self._first_end_s)
            return
        elapsed_s = self._loop.time() - self._began_s
        fewest = self._law.fewest_steps(elapsed_s, self.batch, self.keys, self._steps_under_way)
        if fewest < self._steps_under_way:
            self._steps_under_way = fewest
            self._end_at(self._began_s + self._law.decode_steps_s(fewest, self.batch, self.keys))

    def _end_at(self, end_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._end_s = end_s
        self._timer = self._loop.call_at(end_s, self._end)

    def _begin(self, *, behind_prompts: bool = False) -> None:
        self._timer, self._end_s = None, math.inf
        if self._missed and not (self.prompts or self.batch or self._joining):  # nothing else was launched
            self._queue_missed()
        joined, self._joining = self._joining, []
        for work in joined:
            self.batch += 1
            self.keys += work.context
            work.end_step = self._step + work.remaining
            heapq.heappush(self._ends, (work.end_step, next(self._numbers), work))
        self._began_s = self._loop.time()
        if self.prompts:
            self._plan(behind_prompts)
            end_s = first_end_s = self._planned[-1][0]
        elif self.batch:
            while self._ends[0][2].is_gone:
                heapq.heappop(self._ends)
            count = 1 if self._missed else self._ends[0][0] - self._step
            end_s = first_end_s = self._begin_decodes(count, has_first=bool(joined))
            if self._first_end_s is not None:
                first_end_s = self._first_end_s
        else:
            self._launch_times.idle()
            return
        for work in joined:
            if work.remaining > 1:
                work.on_first(first_end_s)
        if self._missed:
            self._queue_missed()
        self._end_at(end_s)

    def _queue_missed(self) -> None:
        for work in self._missed:
            self._queue(work)
        self._missed.clear()

    def _plan(self, behind_prompts: bool) -> None:
        """Plan the next step; without decodes, all steps to the end of a prompt, unless work waits to join the
        second."""
        end_s, ends = self._began_s, self.batch > 0 or bool(self._missed)
        while True:
            chunks = self._choose_chunks()
            num_tokens, pairs = 0, 0.0
            for work, count in chunks:
                num_tokens += count
                pairs += count * (work.num_computed_tokens + count / 2)
                work.num_computed_tokens += count
                ends = ends or work.num_computed_tokens == work.num_tokens
            end_s += self._prompts_step_s(self.batch + num_tokens, pairs, is_behind=behind_prompts)
            behind_prompts = True
            self._planned.append((end_s, num_tokens, chunks))
            if ends or not chunks:
                return

    def _prompts_step_s(self, new_tokens: int, pairs: float, *, is_behind: bool = False) -> float:
        rows = self.limits.graph_rows(new_tokens) if self._law.has_graphs else new_tokens
        return self._law.step_s(rows, pairs, self.keys, is_behind=is_behind)

    def _begin_decodes(self, count: int, *, has_first: bool) -> float:
        """Begin `count` decode steps; returns their end. has_first: the first of them is some sequences' own first."""
        self._steps_under_way = count
        if not has_first or count == 1:
            return self._began_s + self._law.decode_steps_s(count, self.batch, self.keys)
        self._first_end_s = first_end_s = self._began_s + self._law.decode_steps_s(1, self.batch, self.keys)
        return first_end_s + self._law.decode_steps_s(count - 1, self.batch, self.keys + self.batch)

    def _pass_first(self) -> None:
        """Count the first of the current decode steps, if it has ended."""
        if (end_s := self._first_end_s) is not None and end_s <= self._loop.time():
            self._first_end_s = None
            self._count_decodes(1, end_s)

    def _count_decodes(self, count: int, end_s: float) -> None:
        self._count(count, self.batch, end_s - self._began_s, 0)
        self._began_s = end_s
        self._step += count
        self.keys += count * self.batch
        self._steps_under_way -= count

    def _choose_chunks(self) -> list[tuple[PromptWork, int]]:
        """Choose the chunks of a step as hbserve_core's BatchScheduler does when blocks are not scarce."""
        limits, sizes = self.limits, self._chunk_sizes
        step = _Chunks(sizes, limits.max_chunk_prefill_tokens, max(0, limits.max_num_batched_tokens - self.batch))
        if not sizes.is_adaptive:
            step.take(self.prompts)
            return step.chunks
        begun = [work for work in self.prompts if work.has_begun]
        waiting = [work for work in self.prompts if not work.has_begun]
        step.budget = sizes.of_step(self._decode_work(), begun, waiting)
        short = [work for work in begun if sizes.is_short(work.num_uncomputed_tokens)]
        kept = sizes.left_for_long(step.budget) if len(short) < len(begun) else 0
        step.budget -= kept
        step.take(sorted(short, key=lambda work: work.num_uncomputed_tokens))
        step.take(work for work in waiting[:MOST_OVERTAKERS] if sizes.is_short(work.num_uncomputed_tokens))
        step.budget += kept
        taken = {work for work, _ in step.chunks}
        step.take(work for work in begun if work not in short)
        step.take(work for work in waiting if work not in taken)
        return step.chunks

    def _decode_work(self) -> StepWork:
        keys = self.keys + self.batch
        return StepWork(self.batch, keys, 2 * keys - self.batch)

    def _predict_s(self, work: StepWork) -> float:
        return self._prompts_step_s(work.num_tokens, (work.num_pairs - self._decode_work().num_pairs) / 2)

    def _end(self) -> None:
        self._end_s = math.inf  # work that is added by callbacks below belongs to the next step
        if len(self._planned) > 1:
            self.settle()
        now_s = self._loop.time()
        chunks: Sequence[tuple[PromptWork, int]] = ()
        if self._planned:
            _, num_tokens, chunks = self._planned.popleft()
            self._count(1, self.batch, now_s - self._began_s, num_tokens)
            self._step += bool(self.batch)
            self.keys += self.batch
        if self._first_end_s is not None:
            self._pass_first()
        if self._steps_under_way:
            self._count_decodes(self._steps_under_way, now_s)
        ended = []
        while self._ends and (self._ends[0][0] <= self._step or self._ends[0][2].is_gone):
            work = heapq.heappop(self._ends)[2]
            if not work.is_gone:
                work.is_gone = True
                self.batch -= 1
                self.keys -= work.context + work.remaining
                ended.append(work)
        for work in ended:
            work.on_done()
        if chunks:
            self._end_chunks(chunks)
        self._begin(behind_prompts=bool(chunks))

    def _count(self, count: int, batch: int, took_s: float, num_tokens: int) -> None:
        """Count `count` steps with `batch` decodes each; with `num_tokens` prompt tokens if it is a single step."""
        figures = self.figures
        figures.busy_s += took_s
        if batch:
            figures.output_tokens += count * batch
            figures.gaps[int(took_s / count * GAPS_PER_S + 0.5)] += count * batch
        figures.prompt_tokens += num_tokens
        self._launch_times.ended(count, took_s / count, batch, num_tokens)

    def _end_chunks(self, chunks: Iterable[tuple[PromptWork, int]]) -> None:
        ended = []
        for work, count in chunks:
            work.done += count
            if work.done < work.num_tokens:
                if work.on_chunk is not None:
                    work.on_chunk(self._loop.time())
            elif work in self.prompts:  # else it was aborted meanwhile
                self.prompts.remove(work)
                ended.append(work)
        for work in ended:
            work.on_done()
