"""The engine of a modelled instance: steps that take the time which a profile says, and compute nothing.

Steps are one timer, up to the next one after which something is otherwise: decode steps of the same sequences up to the
first that is the last of one, steps of prompts alone up to the end of a prompt. Who comes meanwhile cuts it short at
the end of the step that is under way. So a simulation takes about as long as it has requests, not tokens or chunks.
An engine launches a step some time before the end of the one before it; who comes after that is in the step behind it.
"""

import asyncio
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hbserve.simulator.profile import StepLaw
from hbserve_rpc.settings import EngineSettings

FEWEST_TOKENS = 1024
STEPS_OF_BACKLOG = 8
FEWEST_BESIDE_DECODES = 64
"""As hbserve_core/engine/step_times.py has them, for chunk_size "auto"."""
FEWEST_ROWS_MORE, MOST_ROWS_MORE = 32, 128
"""As hbserve_core/cuda_runner/step_packer.py has them: between the rows of two graphs of steps with prompts."""
STEPS_REMEMBERED = 200
"""As there: by the launches of so many steps it is decided when the next one is to be."""


@dataclass(frozen=True)
class EngineLimits:
    """Settings of an engine that its steps depend on, by their names in the configuration; None for "auto"."""

    chunk_size: int | None = 512
    itl_target_ms: float | None = None
    max_chunk_prefill_tokens: int = 4096
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    most_graph_tokens: int = 2048

    @classmethod
    def of(cls, settings: EngineSettings) -> "EngineLimits":
        """Those of a deployment's engines."""
        return cls(
            None if settings.chunk_size == "auto" else settings.chunk_size,
            settings.itl_target_ms,
            settings.max_chunk_prefill_tokens,
            settings.max_num_batched_tokens,
            settings.max_num_seqs,
            settings.most_graph_tokens,
        )

    def graph_rows(self, num_tokens: int) -> int:
        """What a step with prompts and so many tokens is padded to on a GPU, and computes."""
        if num_tokens > self.most_graph_tokens:
            return num_tokens
        more = max(FEWEST_ROWS_MORE, min(MOST_ROWS_MORE, (1 << (num_tokens.bit_length() - 1)) // 4))
        return min(self.most_graph_tokens, math.ceil(num_tokens / more) * more)


@dataclass(eq=False)
class PromptWork:
    """A prompt that is computed chunk by chunk."""

    num_tokens: int
    done: int
    """Tokens that are computed, or were cached."""
    on_chunk: Callable[[float], object] | None
    """Told when each chunk but the last has ended, at the latest at the end of the prompt, or by `settle`."""
    on_done: Callable[[], None]
    """Told when all chunks of its last step are."""
    planned: int = 0
    """Tokens that are computed when the steps that are planned have ended."""

    def __post_init__(self) -> None:
        self.planned = self.done


@dataclass(eq=False)
class DecodeWork:
    """A sequence that gets a token in each step."""

    context: int
    remaining: int
    """Tokens that it is still to get, at least one."""
    on_first: Callable[[float], object]
    """Told, as its first step begins, when that ends; unless it is its last."""
    on_done: Callable[[], None]
    end_step: int = -1
    is_gone: bool = False


@dataclass
class EngineFigures:
    """What an engine has done."""

    busy_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps_s: Counter[float] = field(default_factory=Counter)
    """Times between two tokens of a sequence, to a tenth of a millisecond, and how many of each."""


class ModelledEngine:
    """Belongs to one event loop, whose time it takes."""

    def __init__(self, law: StepLaw, limits: EngineLimits) -> None:
        self.limits = limits
        self.figures = EngineFigures()
        self.prompts: deque[PromptWork] = deque()
        self.batch = self.keys = 0
        """Sequences that decode, and their tokens together."""
        self._law = law
        self._loop = asyncio.get_running_loop()
        self._step = 0
        """Decode steps so far."""
        self._joining: list[DecodeWork] = []
        self._ends: list[tuple[int, int, DecodeWork]] = []
        self._numbers = itertools.count()
        self._planned: deque[tuple[float, list[tuple[PromptWork, int]]]] = deque()
        """Steps with prompts, from the one that is under way on: when each ends, and its chunks."""
        self._timer: asyncio.Handle | None = None
        self._end_s = math.inf
        """Of what is under way."""
        self._missed: list[PromptWork | DecodeWork] = []
        """Have come when the step after the one that is under way was launched already."""
        self._mixed_left = self._eager_left = 0
        """Steps until the last one with prompts and decodes is forgotten, and the last one without a CUDA graph."""
        self._began_s = 0.0
        self._steps_under_way = 0
        """Of decodes, from `_began_s` on."""
        self._first_end_s: float | None = None
        """Of these, the end of the first, where some have joined in it, and it was not counted yet."""
        self._has_died = False

    def add(self, work: PromptWork | DecodeWork) -> None:
        """It is in the next step that is not launched yet."""
        if self._has_died:
            return
        if self._timer is None:  # all that comes in this moment is in the step
            self._timer = self._loop.call_soon(self._begin)
        else:
            self._cut_short()
            ahead_s = self._launched_ahead_s()
            if ahead_s and self._end_s - self._loop.time() < ahead_s:
                self._missed.append(work)
                return
        self._queue(work)

    def _launched_ahead_s(self) -> float:
        if self._eager_left:
            return self._law.launched_ahead_eager_s
        return self._law.launched_ahead_mixed_s if self._mixed_left else self._law.launched_ahead_s

    def _queue(self, work: PromptWork | DecodeWork) -> None:
        if isinstance(work, PromptWork):
            self.prompts.append(work)
        else:
            self._joining.append(work)

    def remove(self, work: PromptWork | DecodeWork) -> None:
        """It was aborted: it is in no step after the one that is under way."""
        if work in self._missed:
            self._missed.remove(work)
        elif isinstance(work, PromptWork):
            if work in self.prompts:
                self.prompts.remove(work)
                self._cut_short()
        elif work in self._joining:
            self._joining.remove(work)
        elif not work.is_gone and work.end_step >= 0:
            self._pass_first()
            work.is_gone = True
            self.batch -= 1
            self.keys -= work.context + max(0, work.remaining - (work.end_step - self._step))

    def stop(self) -> None:
        """Its process has died: nothing of it is heard any more."""
        if self._timer is not None:
            self._timer.cancel()
        self.settle()
        self._has_died = True

    def settle(self) -> None:
        """Take in the chunks that have ended, for whoever depends on what was told of them."""
        now_s = self._loop.time()
        while len(self._planned) > 1 and self._planned[0][0] <= now_s:
            end_s, chunks = self._planned.popleft()
            self._count(1, 0, end_s - self._began_s, chunks)
            self._began_s = end_s
            for work, count in chunks:
                work.done += count
                if work.on_chunk is not None:
                    work.on_chunk(end_s)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _cut_short(self) -> None:
        """End what is under way after the step that is under way."""
        if len(self._planned) > 1:
            self.settle()
        if len(self._planned) > 1:
            end_s = self._planned[0][0]
            while len(self._planned) > 1:
                for work, count in self._planned.pop()[1]:
                    work.planned -= count
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
            return
        for work in joined:
            if work.remaining > 1:
                work.on_first(first_end_s)
        self._queue_missed()
        self._end_at(end_s)

    def _queue_missed(self) -> None:
        for work in self._missed:
            self._queue(work)
        self._missed.clear()

    def _plan(self, behind_prompts: bool) -> None:
        """The next step; without decodes, all up to the end of a prompt, unless somebody is to be in the one after."""
        end_s = self._began_s
        while True:
            chunks = self._choose_chunks()
            new_tokens, pairs = self.batch, 0.0
            ends = self.batch > 0 or bool(self._missed)
            for work, count in chunks:
                new_tokens += count
                pairs += count * (work.planned + count / 2)
                work.planned += count
                ends = ends or work.planned == work.num_tokens
            end_s += self._prompts_step_s(new_tokens, pairs) - self._law.prompt_behind_s * behind_prompts
            behind_prompts = True
            self._planned.append((end_s, chunks))
            if ends or not chunks:
                return

    def _prompts_step_s(self, new_tokens: int, pairs: float) -> float:
        rows = self.limits.graph_rows(new_tokens) if self._law.has_graphs else new_tokens
        return self._law.step_s(rows, pairs, self.keys)

    def _begin_decodes(self, count: int, *, has_first: bool) -> float:
        """So many decode steps, the first of which may be some sequences' own first; returns the end of the last."""
        self._steps_under_way = count
        if not has_first or count == 1:
            return self._began_s + self._law.decode_steps_s(count, self.batch, self.keys)
        self._first_end_s = first_end_s = self._began_s + self._law.decode_steps_s(1, self.batch, self.keys)
        return first_end_s + self._law.decode_steps_s(count - 1, self.batch, self.keys + self.batch)

    def _pass_first(self) -> None:
        """Count the first of the decode steps that are under way, if it has ended."""
        if (end_s := self._first_end_s) is not None and end_s <= self._loop.time():
            self._first_end_s = None
            self._count_decodes(1, end_s)

    def _count_decodes(self, count: int, end_s: float) -> None:
        self._count(count, self.batch, end_s - self._began_s, ())
        self._began_s = end_s
        self._step += count
        self.keys += count * self.batch
        self._steps_under_way -= count

    def _choose_chunks(self) -> list[tuple[PromptWork, int]]:
        left = self._budget()
        chunks = []
        for work in self.prompts:
            if left <= 0:
                break
            count = min(work.num_tokens - work.planned, left, self.limits.chunk_size or left)
            chunks.append((work, count))
            left -= count
        return chunks

    def _budget(self) -> int:
        """Prompt tokens of the next step."""
        limits = self.limits
        most = min(limits.max_chunk_prefill_tokens, limits.max_num_batched_tokens - self.batch)
        if limits.chunk_size is not None:
            return most
        if limits.itl_target_ms is not None and self.batch:
            return self._within(limits.itl_target_ms / 1e3, most)
        backlog = sum(work.num_tokens - work.planned for work in self.prompts)
        return min(most, max(FEWEST_TOKENS, backlog // STEPS_OF_BACKLOG))

    def _within(self, target_s: float, most: int) -> int:
        first = self.prompts[0]
        low, high = FEWEST_BESIDE_DECODES, max(FEWEST_BESIDE_DECODES, most)
        while low < high:
            middle = (low + high + 1) // 2
            pairs = middle * (first.planned + middle / 2)
            if self._prompts_step_s(self.batch + middle, pairs) <= target_s:
                low = middle
            else:
                high = middle - 1
        return low

    def _end(self) -> None:
        self._end_s = math.inf  # who is added by what ends here goes on in the next step
        self.settle()
        now_s = self._loop.time()
        chunks: Sequence[tuple[PromptWork, int]] = ()
        if self._planned:
            chunks = self._planned.popleft()[1]
            self._count(1, self.batch, now_s - self._began_s, chunks)
            self._step += bool(self.batch)
            self.keys += self.batch
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
        self._end_chunks(chunks)
        self._begin(behind_prompts=bool(chunks))

    def _count(self, count: int, batch: int, took_s: float, chunks: Iterable[tuple[PromptWork, int]]) -> None:
        figures = self.figures
        figures.busy_s += took_s
        if batch:
            figures.output_tokens += count * batch
            figures.gaps_s[round(took_s / count, 4)] += count * batch
        if self._mixed_left or self._eager_left:
            self._mixed_left = max(0, self._mixed_left - count)
            self._eager_left = max(0, self._eager_left - count)
        if chunks:
            num_tokens = sum([chunk for _, chunk in chunks])
            figures.prompt_tokens += num_tokens
            if batch + num_tokens > self.limits.most_graph_tokens:
                self._eager_left = STEPS_REMEMBERED
            elif batch:
                self._mixed_left = STEPS_REMEMBERED

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
