"""Choice of the tokens and sequences that the next step computes.

One token budget covers everything: decodes first, then chunks of prompts that have begun, then new sequences. With
`chunk_size: auto`, short prompts go before long ones, begun or new. Among sequences that wait, to be computed or for
blocks, the lowest `SamplingParams.priority` goes first; running sequences keep their places. A sequence gets the blocks
of all its known tokens when it is admitted. From then on it grows one block at a time; if none is left, the newest
sequence gives up all its blocks and is computed again later.

Blocks that no layer sees any more are given back when a token has been sampled, not earlier, because the prompt may be
cached as a whole; blocks that are being sent are kept until the end. A sequence never has more tokens than the pool has
room for, whether layers still see them or not: it could not be computed again.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Ids
from itertools import chain, islice
from typing import Any

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.block_manager import NO_BLOCK, BlockManager
from hbserve_core.engine.sequence import Phase, ScheduledChunk, Sequence
from hbserve_core.engine.step_times import MOST_OVERTAKERS, ChunkSizes, StepWork
from hbserve_rpc.counts import Histogram

STEP_TOKENS = [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0]
"""Bounds of the histogram of tokens per step, the same as vLLM's."""


def _place(queue: "deque[Sequence]", priority: int, is_first: bool) -> int:
    """Return the place in a queue for a sequence of this priority, before its equals or behind them. It is usually an
    end of the queue."""
    place = 0 if is_first else len(queue)
    while is_first and place < len(queue) and queue[place].params.priority < priority:
        place += 1
    while not is_first and place and queue[place - 1].params.priority > priority:
        place -= 1
    return place


class BatchScheduler:
    """Queues of one engine: one for each phase that has a queue. Only `move` changes a phase or a queue."""

    def __init__(self, config: InstanceConfig, blocks: BlockManager, chunk_sizes: ChunkSizes) -> None:
        self._config = config
        self._chunk_sizes = chunk_sizes
        self._blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        """Running sequences in the order of admission, oldest first."""
        self.reserving: deque[Sequence] = deque()
        self.out_of_blocks: deque[Sequence] = deque()
        self._held: deque[Sequence] = deque()
        self._ending: deque[Sequence] = deque()
        self._queues = {
            Phase.WAITING: self.waiting,
            Phase.RUNNING: self.running,
            Phase.RESERVING: self.reserving,
            Phase.OUT_OF_BLOCKS: self.out_of_blocks,
            Phase.HELD: self._held,
            Phase.ENDING: self._ending,
        }
        self.iteration_tokens = Histogram.over(STEP_TOKENS)
        """Histogram of the number of tokens in each step."""
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._watermark = max(1, blocks.num_blocks // 100)
        self._budget = self._prefill_budget = 0
        """Tokens for which the step that is being scheduled still has room: tokens of any kind, and prompt tokens."""

    @property
    def num_reserved(self) -> int:
        """Number of sequences that are not computed and whose blocks come back when something else has ended: a
        transfer, or the step in flight. Held ones may also join `running`."""
        return len(self._held) + len(self._ending)

    @property
    def _is_full(self) -> bool:
        """Whether the largest allowed number of sequences (`max_num_seqs`) have blocks."""
        return len(self.running) + self.num_reserved >= self._config.max_num_seqs

    def stats(self) -> dict[str, Any]:
        """Return the fields of EngineStats that concern queues and blocks."""
        return {
            "num_waiting": len(self.waiting) + len(self.reserving),
            "num_running": len(self.running),
            "num_reserved": self.num_reserved,
            "num_blocks": self._blocks.num_blocks,
            "num_free_blocks": self._blocks.num_free,
            "num_cached_blocks": self._blocks.num_cached,
            "num_reserved_blocks": sum(_num_held(sequence) for sequence in [*self._held, *self._ending]),
            "num_quarantined_blocks": self._blocks.num_quarantined,
            "num_cached_tokens": self.num_cached_tokens,
            "num_preemptions": self.num_preemptions,
            "iteration_tokens": self.iteration_tokens.copy(),
        }

    def move(self, sequence: Sequence, phase: Phase, *, is_promised: bool = False) -> None:
        """Move a sequence to another phase and to the end of that phase's queue. Queues of sequences that wait are
        ordered by priority: the sequence joins behind its equals, or before them if it `is_promised` room. It keeps its
        blocks."""
        before = sequence.phase
        sequence.enter(phase)
        if (queue := self._queues.get(before)) is not None:
            queue.remove(sequence)
        if (queue := self._queues.get(phase)) is not None:
            waits = phase in (Phase.WAITING, Phase.RESERVING)
            place = _place(queue, sequence.params.priority, is_promised) if waits else len(queue)
            queue.insert(place, sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """Choose the next step's chunks and allocate blocks for them. Returns an empty list if nothing can be computed
        now."""
        config, preemptions = self._config, self.num_preemptions
        self._budget, self._prefill_budget = config.max_num_batched_tokens, config.max_chunk_prefill_tokens
        batch = self._decodes()
        may_admit = self.num_preemptions == preemptions
        begun = [each for each in self.running if len(each.token_ids) - each.num_computed_tokens > 1]
        if self._chunk_sizes.is_adaptive:
            decodes = StepWork.of([(None, chunk.first, chunk.num_new_tokens) for chunk in batch])
            self._prefill_budget = self._chunk_sizes.of_step(decodes, begun, self.waiting)
            batch += self._short_chunks(begun, may_admit)
            begun = [sequence for sequence in begun if not self._is_short(sequence)]
        batch += self._chunks(begun)
        if may_admit:
            batch += self._admissions()
        if batch:
            self.iteration_tokens.observe(config.max_num_batched_tokens - self._budget)
        return batch

    def _decodes(self) -> list[ScheduledChunk]:
        batch = []
        for sequence in list(self.running):
            # A sequence further back in this list may have been preempted for one before it.
            num_tokens = len(sequence.token_ids)  # not a property: each call counts when there are 256 of them
            if num_tokens - sequence.num_computed_tokens != 1 or self._budget == 0:
                continue
            if sequence.phase is Phase.RUNNING and self._grow(sequence, num_tokens):
                self._budget -= 1
                batch.append(ScheduledChunk(sequence, 1))
        return batch

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the sequence's next token. Returns False if the sequence was itself preempted, or cannot
        continue at all."""
        if len(sequence.block_table) * self._blocks.block_size >= num_tokens:
            return True
        is_longest = len(sequence.block_table) == self._blocks.num_blocks
        while self._blocks.num_free == 0 or is_longest:
            # One that needs the whole pool could never be admitted again; one that is alone has nobody to wait for.
            alone = len(self.running) == 1 and self.num_reserved == 0
            if alone or is_longest:
                self.move(sequence, Phase.OUT_OF_BLOCKS)
                return False
            # The blocks of a prefill-only sequence are being sent. `sequence` itself is never one, because those do not
            # grow.
            victim = next(each for each in reversed(self.running) if not each.prefill_only)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table.extend(self._blocks.allocate(1))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.move(sequence, Phase.WAITING, is_promised=True)
        self.release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _chunks(self, sequences: list[Sequence]) -> list[ScheduledChunk]:
        batch = []
        for sequence in sequences:
            if count := self._chunk_size(sequence, sequence.num_uncomputed_tokens):
                self._budget -= count
                self._prefill_budget = max(0, self._prefill_budget - count)
                batch.append(ScheduledChunk(sequence, count))
        return batch

    def _chunk_size(self, sequence: Sequence, wanted: int) -> int:
        """Return how many of `wanted` tokens this step may compute."""
        return self._chunk_sizes.of(sequence, wanted, self._prefill_budget, self._budget)

    def _admissions(self) -> list[ScheduledChunk]:
        batch: list[ScheduledChunk] = []
        while self.waiting and (chunk := self._admit(self.waiting[0])):
            batch += chunk
        return batch

    def _is_short(self, sequence: Sequence) -> bool:
        return self._chunk_sizes.is_short(sequence.num_uncomputed_tokens)

    def _short_chunks(self, begun: list[Sequence], may_admit: bool) -> list[ScheduledChunk]:
        """Schedule chunks of short prompts that have begun, the shortest first, then of new ones. A long prompt that
        has begun keeps a share of the step."""
        short = [sequence for sequence in begun if self._is_short(sequence)]
        kept = self._chunk_sizes.left_for_long(self._prefill_budget) if len(short) < len(begun) else 0
        self._prefill_budget -= kept
        batch = self._chunks(sorted(short, key=lambda sequence: sequence.num_uncomputed_tokens))
        if may_admit:
            batch += self._short_admissions()
        self._prefill_budget += kept
        return batch

    def _short_admissions(self) -> list[ScheduledChunk]:
        """Admit short new prompts that overtake longer ones, as long as there is also room for the first prompt in the
        queue."""
        batch: list[ScheduledChunk] = []
        for sequence in list(islice(self.waiting, MOST_OVERTAKERS)):
            if self._prefill_budget == 0 or sequence.params.priority > self.waiting[0].params.priority:
                break
            if self._is_short(sequence):
                first = self.waiting[0].num_tokens if sequence is not self.waiting[0] else 0
                needed = self._blocks.num_blocks_for(first) + self._blocks.num_blocks_for(sequence.num_tokens)
                if self._blocks.num_free < needed + self._watermark:
                    break
                batch += self._admit(sequence)
        return batch

    def _admit(self, sequence: Sequence) -> list[ScheduledChunk]:
        """Admit a sequence and return its first chunk, or an empty list if there is no room."""
        if self._is_full:
            return []
        # At least the last known token is computed, because the next one is sampled from it. If log-probabilities of
        # the prompt are wanted, all tokens are computed: cached keys and values do not tell how a token scores the next
        # one.
        may_skip = sequence.num_tokens - 1 if sequence.is_scored else 0
        prefix = self._blocks.find_prefix(self._digests(sequence, may_skip))
        count = self._chunk_size(sequence, sequence.num_tokens - len(prefix) * self._blocks.block_size)
        if count == 0 or not self._allocate(sequence, prefix, self._blocks.allocate):
            return []
        sequence.num_computed_tokens = sequence.num_findable_tokens
        self.move(sequence, Phase.RUNNING)
        return self._chunks([sequence])

    def _digests(self, sequence: Sequence, num_tokens: int) -> Iterator[bytes]:
        """Yield the digests of the blocks that `num_tokens` tokens fill. Each is computed only when it is asked for,
        because the prompt waits for them and usually not even its first block is cached."""
        digests, block_size = sequence.block_digests, self._blocks.block_size
        for place in range(num_tokens // block_size):
            self._blocks.extend_digests(digests, sequence.token_ids, (place + 1) * block_size)
            yield digests[place]

    def _allocate(self, sequence: Sequence, prefix: list[int], allocate: Callable[[int], list[int]]) -> bool:
        """Give the sequence `prefix` and blocks for the rest of its known tokens. Returns False, and does nothing, if
        that would not leave some blocks for growth."""
        wanted = self._blocks.num_blocks_for(sequence.num_tokens) - len(prefix)
        watermark = self._watermark if self.running or self.num_reserved else 0
        if self._blocks.num_free_besides(prefix) < wanted + watermark:
            return False
        self._blocks.share(prefix)
        sequence.block_table = array("i", prefix + allocate(wanted))
        sequence.num_findable_tokens = len(prefix) * self._blocks.block_size
        sequence.num_cached_tokens = sequence.num_findable_tokens if prefix and prefix[-1] != NO_BLOCK else 0
        sequence.is_trusted = True  # its earlier blocks are gone, and are computed again here
        self.num_cached_tokens += sequence.num_cached_tokens
        return True

    def grant(self) -> Sequence | None:
        """Give blocks, which others will fill, to the first sequence that reserves some. Returns None if there is no
        room now.

        A step in flight may still touch the blocks for their earlier owner: see `BlockManager.last_step`.
        """
        # Preempted sequences come first: they were promised room earlier.
        if not self.reserving or self.waiting or self._is_full:
            return None
        sequence = self.reserving[0]
        # Everything that is seen from the last block on counts as full, because some of several choices begin there.
        full = sequence.num_tokens // self._blocks.block_size * self._blocks.block_size
        prefix = self._blocks.find_part(self._digests(sequence, full), self._blocks.first_seen(full))
        if not self._allocate(sequence, prefix, self._blocks.allocate_idle):
            return None
        self.move(sequence, Phase.HELD)
        return sequence

    def cache(self, sequence: Sequence, end: int) -> None:
        """Let other sequences find the full blocks of tokens [0, end), from whose keys and values a token has been
        sampled.

        Called no earlier than that, because nothing can be sampled if a block holds a NaN, or anything else that spoils
        what is computed from it.
        """
        first, last = sequence.num_findable_tokens // self._blocks.block_size, end // self._blocks.block_size
        sequence.num_findable_tokens = end
        if last > first and sequence.is_trusted:
            self.make_digests(sequence, end)
            self._blocks.cache(sequence.block_table[first:last], sequence.block_digests[first:last])
        if self._blocks.window and not (sequence.prefill_only or sequence.choices):  # others will read their blocks
            self._free_unseen(sequence)

    def _free_unseen(self, sequence: Sequence) -> None:
        """Give back the blocks that no step launched from now on will see."""
        table = sequence.block_table
        # The blocks of a step in flight are kept: others are to find them when its token has been read.
        last = self._blocks.first_seen(sequence.num_findable_tokens)
        first = last
        while first and table[first - 1] != NO_BLOCK:
            first -= 1
        if first < last:
            self._blocks.release(table[first:last])
            table[first:last] = array("i", [NO_BLOCK]) * (last - first)

    def make_digests(self, sequence: Sequence, end: int) -> None:
        """Compute the digests of the blocks that tokens [0, end) fill, all of which have been read. `cache` needs them,
        and it is better to compute them during a step than after it."""
        self._blocks.extend_digests(sequence.block_digests, sequence.token_ids, end)

    def fork(self, parent: Sequence, choices: Ids[Sequence]) -> None:
        """Let the choices continue, each with one token more than the parent has computed.

        They share its full blocks. The last block, if it is not full, goes to the first of them; the others compute its
        few tokens again, in blocks of their own. A choice that finds no room waits for it, as preempted sequences do.
        """
        self.move(parent, Phase.FORKED)
        num_tokens, late = parent.num_computed_tokens, list[Sequence]()
        for choice in choices:
            num_kept = num_tokens if choice is choices[0] else num_tokens - num_tokens % self._blocks.block_size
            num_new_blocks = int(num_kept < num_tokens)
            # If the prompt fills the pool, it could never be admitted. It ends in the next step, because it has no room
            # to grow.
            may_wait = self._blocks.num_blocks_for(choice.num_tokens) <= self._blocks.num_blocks
            if may_wait and (self._is_full or self._blocks.num_free < num_new_blocks):
                late.append(choice)
                continue
            kept = parent.block_table[: self._blocks.num_blocks_for(num_kept)]
            self._blocks.share(kept)
            choice.block_table = kept + array("i", self._blocks.allocate(num_new_blocks))
            choice.block_digests = parent.block_digests.copy()
            choice.num_computed_tokens = num_kept
            choice.num_cached_tokens, choice.num_findable_tokens = parent.num_cached_tokens, parent.num_findable_tokens
            choice.is_trusted = parent.is_trusted
            self.move(choice, Phase.RUNNING)
        for choice in reversed(late):
            self.move(choice, Phase.WAITING, is_promised=True)
        self.release(parent)

    def release(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        sequence.block_table = array("i")

    def check_integrity(self, requests: Collection[Sequence]) -> None:
        """Raise AssertionError unless each of an engine's sequences is in its phase's queue and has the blocks that its
        phase says, and each block is held by exactly those that have it. Between steps only."""
        choices = [each for parent in requests for each in parent.choices]
        sequences = [*requests, *(each for each in choices if each.phase not in (Phase.NEW, Phase.ENDED))]
        holding = [sequence.block_table for sequence in sequences if sequence.phase is not Phase.QUARANTINED]
        holders = Counter(chain.from_iterable(holding))
        del holders[NO_BLOCK]
        self._blocks.check_integrity(holders)
        for phase, queue in self._queues.items():
            expected = Counter(each for each in sequences if each.phase is phase)
            assert Counter(queue) == expected, f"{phase.name}: {queue}, not {list(expected)}"
        assert not self.out_of_blocks, "these end within their step"
        for sequence in sequences:
            num_blocks, phase = len(sequence.block_table), sequence.phase
            assert phase not in (Phase.NEW, Phase.ENDED), f"{sequence.request_id} is {phase.name}"
            if phase in (Phase.WAITING, Phase.RESERVING, Phase.FORKED):
                assert num_blocks == 0, f"{sequence.request_id} is {phase.name}, with blocks {sequence.block_table}"
            elif phase in (Phase.RUNNING, Phase.ENDING):
                needed = self._blocks.num_blocks_for(sequence.num_computed_tokens)
                assert num_blocks >= needed, f"{sequence.request_id} is {phase.name}: {num_blocks} of {needed} blocks"
                seen = sequence.block_table[self._blocks.first_seen(sequence.num_computed_tokens) :]
                assert NO_BLOCK not in seen, f"{sequence.request_id} is {phase.name}, and sees {sequence.block_table}"
        quarantined = {block for each in sequences if each.phase is Phase.QUARANTINED for block in each.block_table}
        assert len(quarantined) == self._blocks.num_quarantined


def _num_held(sequence: Sequence) -> int:
    return len(sequence.block_table) - sequence.block_table.count(NO_BLOCK)
