"""The engine of a modelled instance: steps that take the time which a profile says, and compute nothing.

Decode steps of the same sequences are one timer, up to the next one that ends; who joins meanwhile cuts it short at the
end of the step that is under way. So a simulation takes about as long as it has requests, not tokens.
"""

import asyncio
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hbserve.simulator.profile import StepLaw
from hbserve_rpc.settings import EngineSettings

FEWEST_TOKENS = 1024
STEPS_OF_BACKLOG = 8
FEWEST_BESIDE_DECODES = 64
"""As hbserve_core/engine/step_times.py has them, for chunk_size "auto"."""


@dataclass(frozen=True)
class EngineLimits:
    """Settings of an engine that its steps depend on, by their names in the configuration; None for "auto"."""

    chunk_size: int | None = 512
    itl_target_ms: float | None = None
    max_chunk_prefill_tokens: int = 4096
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256

    @classmethod
    def of(cls, settings: EngineSettings) -> "EngineLimits":
        """Those of a deployment's engines."""
        return cls(
            None if settings.chunk_size == "auto" else settings.chunk_size,
            settings.itl_target_ms,
            settings.max_chunk_prefill_tokens,
            settings.max_num_batched_tokens,
            settings.max_num_seqs,
        )


@dataclass(eq=False)
class PromptWork:
    """A prompt that is computed chunk by chunk."""

    num_tokens: int
    done: int
    """Tokens that are computed, or were cached."""
    on_chunk: Callable[[], object] | None
    """Called at the end of each chunk but the last."""
    on_done: Callable[[], None]


@dataclass(eq=False)
class DecodeWork:
    """A sequence that gets a token in each step."""

    context: int
    remaining: int
    """Tokens that it is still to get, at least one."""
    on_first: Callable[[], None]
    """Called after its first step, unless that is its last."""
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
        self._fresh: list[DecodeWork] = []
        """Those whose first step is under way."""
        self._ends: list[tuple[int, int, DecodeWork]] = []
        self._numbers = itertools.count()
        self._chunks: list[tuple[PromptWork, int]] = []
        self._timer: asyncio.Handle | None = None
        self._began_s = 0.0
        self._steps_under_way = 0
        self._has_died = False

    def add_prompt(self, work: PromptWork) -> None:
        self.prompts.append(work)
        self._look()

    def add_decode(self, work: DecodeWork) -> None:
        self._joining.append(work)
        self._look()

    def remove(self, work: PromptWork | DecodeWork) -> None:
        """It was aborted: it is in no step after the one that is under way."""
        if isinstance(work, PromptWork):
            if work in self.prompts:
                self.prompts.remove(work)
        elif work in self._joining:
            self._joining.remove(work)
        elif not work.is_gone and work.end_step >= 0:
            work.is_gone = True
            self.batch -= 1
            self.keys -= work.context + max(0, work.remaining - (work.end_step - self._step))

    def stop(self) -> None:
        """Its process has died: nothing of it is heard any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._has_died = True

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Something has come: it is in the next step."""
        if self._has_died:
            return
        if self._timer is None:  # all that comes in this moment is in the step
            self._timer = self._loop.call_soon(self._begin)
        elif self._steps_under_way > 1:
            self._cut_short()

    def _cut_short(self) -> None:
        """End what is under way after the step that is under way."""
        elapsed_s = self._loop.time() - self._began_s
        fewest = self._law.fewest_steps(elapsed_s, self.batch, self.keys, self._steps_under_way)
        if fewest < self._steps_under_way:
            assert self._timer is not None
            self._timer.cancel()
            self._steps_under_way = fewest
            end_s = self._began_s + self._law.decode_steps_s(fewest, self.batch, self.keys)
            self._timer = self._loop.call_at(end_s, self._end)

    def _begin(self) -> None:
        self._timer = None
        for work in self._joining:
            self.batch += 1
            self.keys += work.context
            work.end_step = self._step + work.remaining
            heapq.heappush(self._ends, (work.end_step, next(self._numbers), work))
        self._fresh, self._joining = self._joining, []
        self._chunks = self._choose_chunks() if self.prompts else []
        if self._chunks:
            new_tokens = self.batch + sum(count for _, count in self._chunks)
            pairs = sum(count * (work.done + count / 2) for work, count in self._chunks)
            self._steps_under_way = 1
            time_s = self._law.step_s(new_tokens, pairs, self.keys)
        elif self.batch:
            while self._ends[0][2].is_gone:
                heapq.heappop(self._ends)
            self._steps_under_way = 1 if self._fresh else self._ends[0][0] - self._step
            time_s = self._law.decode_steps_s(self._steps_under_way, self.batch, self.keys)
        else:
            return
        self._began_s = self._loop.time()
        self._timer = self._loop.call_at(self._began_s + time_s, self._end)

    def _choose_chunks(self) -> list[tuple[PromptWork, int]]:
        left = self._budget()
        chunks = []
        for work in self.prompts:
            if left <= 0:
                break
            count = min(work.num_tokens - work.done, left, self.limits.chunk_size or left)
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
        backlog = sum(work.num_tokens - work.done for work in self.prompts)
        return min(most, max(FEWEST_TOKENS, backlog // STEPS_OF_BACKLOG))

    def _within(self, target_s: float, most: int) -> int:
        first = self.prompts[0]
        low, high = FEWEST_BESIDE_DECODES, max(FEWEST_BESIDE_DECODES, most)
        while low < high:
            middle = (low + high + 1) // 2
            pairs = middle * (first.done + middle / 2)
            if self._law.step_s(self.batch + middle, pairs, self.keys) <= target_s:
                low = middle
            else:
                high = middle - 1
        return low

    def _end(self) -> None:
        count, batch = self._steps_under_way, self.batch
        took_s = self._loop.time() - self._began_s
        self._count(count, batch, took_s)
        self._step += count if batch else 0
        self.keys += count * batch
        self._steps_under_way = 0
        ended = []
        while self._ends and (self._ends[0][0] <= self._step or self._ends[0][2].is_gone):
            work = heapq.heappop(self._ends)[2]
            if not work.is_gone:
                work.is_gone = True
                self.batch -= 1
                self.keys -= work.context + work.remaining
                ended.append(work)
        for work in self._fresh:
            if not work.is_gone:
                work.on_first()
        for work in ended:
            work.on_done()
        self._end_chunks()
        self._begin()

    def _count(self, count: int, batch: int, took_s: float) -> None:
        figures = self.figures
        figures.busy_s += took_s
        if batch:
            figures.output_tokens += count * batch
            figures.gaps_s[round(took_s / count, 4)] += count * batch
        figures.prompt_tokens += sum(chunk for _, chunk in self._chunks)

    def _end_chunks(self) -> None:
        for work, count in self._chunks:
            work.done += count
            if work.done < work.num_tokens:
                if work.on_chunk is not None:
                    work.on_chunk()
            elif self.prompts and self.prompts[0] is work:
                self.prompts.popleft()
                work.on_done()
            elif work in self.prompts:  # else it was aborted meanwhile
                self.prompts.remove(work)
                work.on_done()
