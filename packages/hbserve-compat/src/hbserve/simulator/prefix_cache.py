"""Prefixes of prompts whose KV an instance keeps, known by the ids of their blocks."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Forgets the block that was not used for the longest time. An id stands for a block and all before it."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def find(self, hash_ids: Sequence[int]) -> int:
        """How many of the first blocks are there."""
        blocks = self._blocks
        count = 0
        for hash_id in hash_ids:
            if hash_id not in blocks:
                break
            count += 1
        return count

    def add(self, hash_ids: Sequence[int]) -> None:
        blocks = self._blocks
        for hash_id in reversed(hash_ids):  # the end of a prefix goes first: without its begin it is of no use
            if hash_id in blocks:
                blocks.move_to_end(hash_id)
            else:
                blocks[hash_id] = None
        for _ in range(len(blocks) - self._num_blocks):
            blocks.popitem(last=False)
