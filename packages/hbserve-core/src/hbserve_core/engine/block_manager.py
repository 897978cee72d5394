"""Ownership of KV blocks: who holds which, and which of them hold a prefix that somebody may want again.

A block is in exactly one of these states:
    held         reference count > 0: by one sequence, or by several that share a prefix
    free         reference count 0; it may still be cached, and is then found by its digest until it is given out
A held block may be quarantined: its request has ended, but a failed transfer may still read it or write to it.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence


class BlockManager:
    """Hands out blocks by number; knows nothing of tensors. Not thread-safe."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        # Given out from the front. Cached blocks come back to the end: the least recently used one is evicted first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._quarantined: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---- giving out and taking back ------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Blocks with one reference each; what they cached is forgotten. The caller has seen that so many are free."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._forget(block_id)
            self._references[block_id] = 1
        return block_ids

    def share(self, block_ids: Sequence[int]) -> None:
        """One more reference to each block; `find_prefix` has found them."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                del self._free[block_id]
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One reference less. Blocks without any are free; of those cached, the last of the list is evicted first."""
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} is released twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._digest_of:
                    self._free.move_to_end(block_id, last=False)

    def quarantine(self, block_ids: Sequence[int]) -> None:
        """Take over the caller's references: the blocks stay out of use until `end_quarantine`.

        A block in which bytes may land was never cached; one that may only be read is still good for who shares it.
        """
        assert all(self._references[block_id] > 0 for block_id in block_ids), "a quarantined block is free"
        self._quarantined.update(block_ids)

    def end_quarantine(self, block_ids: Sequence[int]) -> None:
        self._quarantined -= Counter(block_ids)
        self.release(block_ids)

    # ---- the prefix cache ----------------------------------------------------------------------------------------

    def extend_digests(self, digests: list[bytes], token_ids: Sequence[int], num_tokens: int) -> None:
        """Bring the digests of the full blocks of the first `num_tokens` tokens up to date. Digest i depends on blocks
        0 to i.

        128 bits of BLAKE2b: that two prefixes have the same one by chance does not happen.
        """
        for i in range(len(digests), num_tokens // self.block_size):
            parent = digests[i - 1] if i else b""
            tokens = array("q", token_ids[i * self.block_size : (i + 1) * self.block_size])
            digests.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())

    def find_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest cached prefix. They may be given to somebody else until they are shared."""
        found: list[int] = []
        for digest in digests:
            if (block_id := self._block_of.get(digest)) is None:
                break
            found.append(block_id)
        return found

    def num_free_besides(self, block_ids: Sequence[int]) -> int:
        """Free blocks, if those were shared first."""
        return self.num_free - sum(self._references[block_id] == 0 for block_id in block_ids)

    def cache(self, block_id: int, digest: bytes) -> None:
        """The block's keys and values are there, all of them: others may find it."""
        if self._prefix_caching and digest not in self._block_of and block_id not in self._digest_of:
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def _forget(self, block_id: int) -> None:
        if (digest := self._digest_of.pop(block_id, None)) is not None:
            del self._block_of[digest]

    def check_integrity(self, holders: Mapping[int, int] | None = None) -> None:
        """Raise AssertionError unless every block is in exactly one state and the cache is consistent.

        `holders`: how many references each block should have, those of quarantines not counted; 0 where absent.
        """
        for block_id, count in enumerate(self._references):
            assert (count > 0) != (block_id in self._free), f"block {block_id}: {count} references, free or lost"
            assert count >= self._quarantined[block_id], f"block {block_id} is quarantined and free"
            if holders is not None:
                expected = holders.get(block_id, 0) + self._quarantined[block_id]
                assert count == expected, f"block {block_id}: {count} references, {expected} holders"
        assert {digest: block for block, digest in self._digest_of.items()} == self._block_of
