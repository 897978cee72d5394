"""Ownership of KV blocks: who holds which block, and which blocks hold a prefix that may be wanted again.

A block is in exactly one of these states:
    held         reference count > 0: by one sequence, or by several that share a prefix
    free         reference count 0; it may still be cached, and is then found by its digest until it is given out
A held block may be quarantined: its request has ended, but a failed transfer may still read it or write to it.

A free block may still be read and written by steps that were launched before it was released, until these have ended.
That does not harm later steps, which are computed after them, but it would harm transfers, which are not ordered with
steps: see `allocate_idle`.

If all layers of the model have a sliding window, tokens see only the last positions. Blocks before these belong to
nobody. A block table has NO_BLOCK in their place, and so has a cached prefix, whose end is enough.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, takewhile

from hbserve_rpc.prompt_shape import DIGEST_BYTES, MOST_REPORTED, extend_digests

NO_BLOCK = -1
"""Entry in a list of a sequence's blocks for a block that no layer can see any more. Everything that shares or releases
blocks accepts it."""


class BlockManager:
    """Allocator that hands out blocks by number and knows nothing of tensors. Not thread-safe."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, window: int = 0) -> None:
        """window: the most positions that any layer sees, including the token's own; 0 means all."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
        self._prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        # Both are in the order in which blocks became free. Of the cached ones, the least recently used is evicted
        # first.
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._held_cached: dict[int, None] = {}
        """Held blocks that are also cached. They are kept apart so that a report need not look through all blocks while
        a step waits."""
        self.last_launched = self.last_ended = 0
        """Numbers of the last step launched and of the last that has ended. Counted by the engine."""
        self._last_steps = [0] * num_blocks
        self._quarantined: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._num_changes = 0
        """Number of changes to the set of cached blocks."""

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Number of free blocks that are kept as prefix cache."""
        return len(self._cached)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def first_seen(self, num_tokens: int) -> int:
        """Return the place of the first block that tokens after the first `num_tokens` see."""
        return max(0, num_tokens + 1 - self.window) // self.block_size if self.window else 0

    # ---- giving out and taking back ------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Allocate blocks for steps, with one reference each, and forget what they cached. The caller has checked that
        enough blocks are free."""
        return self._take(count, chain(reversed(self._empty), self._cached))

    def allocate_idle(self, count: int) -> list[int]:
        """Allocate blocks for transfers: first the blocks that no step in flight may touch, the oldest of these first.
        See `last_step`."""
        idle = (takewhile(self._is_idle, free) for free in (self._empty, self._cached))
        busy = (block_id for block_id in chain(self._empty, self._cached) if not self._is_idle(block_id))
        return self._take(count, chain(*idle, busy))

    def _take(self, count: int, free: Iterator[int]) -> list[int]:
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        # Ascending order helps transfers: a run of adjacent blocks moves as one piece.
        block_ids = sorted(islice(free, count))
        for block_id in block_ids:
            digest = self._digest_of.pop(block_id, None)
            if digest is None:
                del self._empty[block_id]
            else:
                del self._cached[block_id], self._block_of[digest]
                self._num_changes += 1
            self._references[block_id] = 1
        return block_ids

    def _is_idle(self, block_id: int) -> bool:
        return self._last_steps[block_id] <= self.last_ended

    def last_step(self, block_ids: Sequence[int]) -> int:
        """Return the number of the last launched step that may touch one of these blocks for its earlier owner."""
        return max((self._last_steps[block_id] for block_id in block_ids), default=0)

    def share(self, block_ids: Sequence[int]) -> None:
        """Add a reference to each of these blocks, which `find_prefix` or `find_part` has found."""
        for block_id in block_ids:
            if block_id == NO_BLOCK:
                continue
            if self._references[block_id] == 0:
                del self._cached[block_id]
                self._held_cached[block_id] = None
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Remove a reference from each block. Blocks without references become free. Of those that are cached, the last
        in the list is evicted first."""
        for block_id in reversed(block_ids):
            if block_id == NO_BLOCK:
                continue
            assert self._references[block_id] > 0, f"block {block_id} is released twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._last_steps[block_id] = self.last_launched
                if block_id in self._digest_of:
                    del self._held_cached[block_id]
                    self._cached[block_id] = None
                else:
                    self._empty[block_id] = None

    def quarantine(self, block_ids: Sequence[int]) -> None:
        """Take over the caller's references: the blocks stay out of use until `end_quarantine`.

        A block that may still be written was never cached; a block that may only be read is still valid for those who
        share it.
        """
        assert all(self._references[block_id] > 0 for block_id in block_ids), "a quarantined block is free"
        self._quarantined.update(block_ids)

    def end_quarantine(self, block_ids: Sequence[int]) -> None:
        self._quarantined -= Counter(block_ids)
        self.release(block_ids)

    # ---- the prefix cache ----------------------------------------------------------------------------------------

    def extend_digests(self, digests: list[bytes], token_ids: Sequence[int], num_tokens: int) -> None:
        """Extend the digests to the full blocks of the first `num_tokens` tokens. Digest i depends on blocks 0 to i, so
        no two prefixes have the same digest."""
        extend_digests(digests, token_ids, num_tokens, self.block_size)

    def find_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix from which a sequence can continue; with a window, only its
        end, with NO_BLOCK before it. Until the blocks are shared, they may be given to somebody else."""
        found: list[int] = []
        num_found = num_in_a_row = 0
        for count, digest in enumerate(digests, 1):
            block_id = self._block_of.get(digest, NO_BLOCK)
            if block_id == NO_BLOCK and not self.window:
                break
            found.append(block_id)
            num_in_a_row = 0 if block_id == NO_BLOCK else num_in_a_row + 1
            if num_in_a_row >= count - self.first_seen(count * self.block_size):
                num_found = count
        unseen = self.first_seen(num_found * self.block_size)
        return [NO_BLOCK] * unseen + found[unseen:num_found]

    def find_part(self, digests: Iterable[bytes], first: int) -> list[int]:
        """Return NO_BLOCK for each block before `first`, followed by as many blocks as are cached from there without a
        gap."""
        found = [NO_BLOCK] * first
        for digest in islice(digests, first, None):
            if (block_id := self._block_of.get(digest)) is None:
                break
            found.append(block_id)
        return found

    def num_free_besides(self, block_ids: Sequence[int]) -> int:
        """Return how many blocks would be free if these were shared first."""
        return self.num_free - sum(id_ != NO_BLOCK and self._references[id_] == 0 for id_ in block_ids)

    def cache(self, block_ids: Sequence[int], digests: Sequence[bytes]) -> None:
        """Let others find these blocks, whose keys and values are complete."""
        if not self._prefix_caching:
            return
        block_of, digest_of = self._block_of, self._digest_of
        for block_id, digest in zip(block_ids, digests, strict=True):
            if digest not in block_of and block_id not in digest_of:
                block_of[digest] = block_id
                digest_of[block_id] = digest
                self._held_cached[block_id] = None
                self._num_changes += 1

    def cached_digests(self, known: int = -1) -> tuple[int, bytes | None]:
        """Return a number for the state of the cache and the first DIGEST_BYTES of each cached block's digest, or None
        in place of the digests if that number is `known`.

        At most MOST_REPORTED blocks are reported: held blocks first, then the most recently used. If a prefix is
        reported in part, that part is its beginning.
        """
        if known == self._num_changes:
            return known, None
        reported = islice(chain(self._held_cached, reversed(self._cached)), MOST_REPORTED)
        return self._num_changes, b"".join([self._digest_of[block_id][:DIGEST_BYTES] for block_id in reported])

    def check_integrity(self, holders: Mapping[int, int] | None = None) -> None:
        """Raise AssertionError unless every block is in exactly one state and the cache is consistent.

        `holders`: the number of references that each block should have, quarantines not counted; 0 where absent.
        """
        for block_id, count in enumerate(self._references):
            is_free = (block_id in self._empty) + (block_id in self._cached)
            assert (count == 0) == is_free, f"block {block_id}: {count} references, {is_free} times free"
            assert (block_id in self._cached) <= (block_id in self._digest_of), f"block {block_id} caches nothing"
            assert count >= self._quarantined[block_id], f"block {block_id} is quarantined and free"
            if holders is not None:
                expected = holders.get(block_id, 0) + self._quarantined[block_id]
                assert count == expected, f"block {block_id}: {count} references, {expected} holders"
        assert {digest: block for block, digest in self._digest_of.items()} == self._block_of
        assert {*self._held_cached, *self._cached} == set(self._digest_of), "a cached block is neither held nor free"
        assert all(self._references[block_id] for block_id in self._held_cached)
        for free in (self._empty, self._cached):
            steps = [self._last_steps[block_id] for block_id in free]
            assert steps == sorted(steps), f"not in the order in which they became free: {list(free)}"
            assert not steps or steps[-1] <= self.last_launched
