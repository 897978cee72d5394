"""The prefix cache of a modelled instance: prompt prefixes whose KV it keeps, by the ids of their blocks."""

from collections.abc import Sequence
from itertools import islice


class PrefixCache:
    """An LRU cache of blocks. An id stands for a block and all before it."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: dict[int, None] = {}
        """Cached blocks, the least recently used one first. An OrderedDict would take half as much time again."""

    def find(self, hash_ids: Sequence[int]) -> int:
        """Return how many of the first blocks are cached."""
        blocks = self._blocks
        count = 0
        for hash_id in hash_ids:
            if hash_id not in blocks:
                break
            count += 1
        return count

    def add(self, hash_ids: Sequence[int]) -> None:
        blocks = self._blocks
        for hash_id in blocks.keys() & hash_ids:
            del blocks[hash_id]
        blocks.update(dict.fromkeys(reversed(hash_ids)))  # evict the end first: it needs the beginning
        if (too_many := len(blocks) - self._num_blocks) > 0:
            for hash_id in [*islice(blocks, too_many)]:
                del blocks[hash_id]
