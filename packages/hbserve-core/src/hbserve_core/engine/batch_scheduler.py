"""Which tokens of which sequences the next step computes.

One token budget for everything: decodes first, then chunks of prompts that have begun, then new sequences. A sequence
gets the blocks of all its known tokens when it is admitted; from then on it grows by a block at a time, and if none is
left, the newest sequence gives all of its blocks up and is computed again later.
"""

from array import array
from collections import deque

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.block_manager import BlockManager
from hbserve_core.engine.sequence import ScheduledChunk, Sequence


class BatchScheduler:
    """The queues of one engine. `running` is ordered by admission, oldest first."""

    def __init__(self, config: InstanceConfig, blocks: BlockManager) -> None:
        self._config = config
        self._blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_reserved = 0
        """Sequences outside these queues that will join `running`, or that hold blocks until something has ended: a
        transfer, or the step that is being computed."""
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.exhausted: list[Sequence] = []
        """Sequences that cannot go on: they hold the whole pool, or all of it that anybody will ever give back."""
        self._watermark = max(1, blocks.num_blocks // 100)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step; empty if nothing can be computed now. Blocks for it are allocated."""
        self._budget = self._config.max_num_batched_tokens
        self._prefill_budget = self._config.max_chunk_prefill_tokens
        preemptions = self.num_preemptions
        batch = self._decodes()
        batch += self._chunks([sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1])
        if self.num_preemptions == preemptions:
            batch += self._admissions()
        return batch

    def _decodes(self) -> list[ScheduledChunk]:
        batch = []
        for sequence in list(self.running):
            # A sequence further back in this list may have been preempted for one before it.
            if sequence.num_uncomputed_tokens != 1 or self._budget == 0 or not sequence.block_table:
                continue
            if self._grow(sequence):
                self._budget -= 1
                batch.append(ScheduledChunk(sequence, 1))
        return batch

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's next token. False: it was itself preempted, or cannot go on at all."""
        if len(sequence.block_table) * self._blocks.block_size >= sequence.num_tokens:
            return True
        while self._blocks.num_free == 0:
            # Who holds the whole pool could never be admitted again; who is alone has nobody to wait for.
            alone = len(self.running) == 1 and self.num_reserved == 0
            if alone or len(sequence.block_table) == self._blocks.num_blocks:
                self.running.remove(sequence)
                self.exhausted.append(sequence)
                return False
            # The blocks of a prefill-only sequence are being sent. `sequence` itself is not one: those never grow.
            victim = next(each for each in reversed(self.running) if not each.prefill_only)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table.extend(self._blocks.allocate(1))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.release(sequence)
        sequence.num_computed_tokens = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _chunks(self, sequences: list[Sequence]) -> list[ScheduledChunk]:
        batch = []
        for sequence in sequences:
            if count := self._chunk_size(sequence.num_uncomputed_tokens):
                self._budget -= count
                self._prefill_budget -= count
                batch.append(ScheduledChunk(sequence, count))
        return batch

    def _chunk_size(self, wanted: int) -> int:
        """How many of `wanted` tokens this step may compute; without chunking, all of a prompt or nothing."""
        if self._config.chunked_prefill_enabled:
            return min(wanted, self._config.chunk_size, self._budget, self._prefill_budget)
        if wanted <= self._config.max_num_batched_tokens:
            return wanted if wanted <= self._budget else 0
        # Longer than a prompt may be: what a preempted sequence computes again, its output included.
        return self._budget

    def _admissions(self) -> list[ScheduledChunk]:
        batch: list[ScheduledChunk] = []
        while self.waiting and len(self.running) + self.num_reserved < self._config.max_num_seqs:
            sequence = self.waiting[0]
            # At least the last known token is computed: the next one is sampled from it.
            prefix = self._find_prefix(sequence, sequence.num_tokens - 1)
            count = self._chunk_size(sequence.num_tokens - len(prefix) * self._blocks.block_size)
            if count == 0 or not self._allocate(sequence, prefix):
                break
            self.waiting.popleft()
            sequence.num_computed_tokens = sequence.num_cached_tokens
            self.running.append(sequence)
            batch += self._chunks([sequence])
        return batch

    def _find_prefix(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Cached blocks among those that `num_tokens` fill."""
        self._extend_digests(sequence)
        return self._blocks.find_prefix(sequence.block_digests[: num_tokens // self._blocks.block_size])

    def _allocate(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Give the sequence `prefix` and blocks for the rest of its known tokens, if that leaves some for growth."""
        wanted = self._blocks.num_blocks_for(sequence.num_tokens) - len(prefix)
        watermark = self._watermark if self.running or self.num_reserved else 0
        if self._blocks.num_free_besides(prefix) < wanted + watermark:
            return False
        self._blocks.share(prefix)
        sequence.block_table = array("i", prefix + self._blocks.allocate(wanted))
        sequence.num_cached_tokens = sequence.num_shared_tokens = len(prefix) * self._blocks.block_size
        self.num_cached_tokens += sequence.num_cached_tokens
        return True

    def reserve(self, sequence: Sequence) -> bool:
        """Give a sequence blocks whose content others will bring. False: no room now."""
        if len(self.running) + self.num_reserved >= self._config.max_num_seqs:
            return False
        if not self._allocate(sequence, self._find_prefix(sequence, sequence.num_tokens)):
            return False
        self.num_reserved += 1
        return True

    def share(self, sequence: Sequence, end: int) -> None:
        """A token was sampled from the keys and values of tokens [0, end): full blocks may be found by others.

        Not earlier: if there is a NaN in a block, or whatever spoils what is computed from it, nothing can be sampled.
        """
        first, last = sequence.num_shared_tokens // self._blocks.block_size, end // self._blocks.block_size
        sequence.num_shared_tokens = end
        if last > first:
            self._extend_digests(sequence)
            for i in range(first, last):
                self._blocks.cache(sequence.block_table[i], sequence.block_digests[i])

    def _extend_digests(self, sequence: Sequence) -> None:
        self._blocks.extend_digests(sequence.block_digests, sequence.token_ids, sequence.num_read_tokens)

    def release(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        sequence.block_table = array("i")

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of whichever queue it is in; its blocks stay its own."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
