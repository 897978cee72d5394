"""Prompt prefixes whose KV an instance keeps, by the ids of their blocks."""

from collections.abc import Sequence
from itertools import islice


class PrefixCache:
    """An LRU cache of blocks. An id stands for a block and all before it."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: dict[int, None] = {}
        """The least recently used block comes first. An OrderedDict would take half as much time again."""

    def find(self, hash_ids: Sequence[int]) -> int:
        """How many of the first blocks are cached."""
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
        blocks.update(dict.fromkeys(reversed(hash_ids)))  # the end goes first: without its begin it is of no use
        if (too_many := len(blocks) - self._num_blocks) > 0:
            for hash_id in [*islice(blocks, too_many)]:
                del blocks[hash_id]
