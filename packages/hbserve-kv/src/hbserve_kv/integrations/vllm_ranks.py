"""Pairs of ranks of two vLLM servers, whose tensor parallelism may differ: who fetches from whom. Knows nothing of
vLLM.

Ranks hold KV heads as vLLM cuts them: equal parts, or one head each, which several ranks in a row have, where there are
fewer heads than ranks. Latents (MLA) are one head. Here, 4 ranks with 2 heads fetch from 2, and 2 from 4:

    0  0  1  1        0     1
    0     1           0  0  1  1      the second and the fourth have a head that nobody needs of them
"""

from collections.abc import Iterator

from hbserve_kv.memory.layout import HeadRange


def heads_of(rank: int, size: int, num_kv_heads: int) -> HeadRange:
    """Raises ValueError: neither is a multiple of the other."""
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(f"tensor parallelism of {size}: {num_kv_heads} KV heads are neither a multiple nor a divisor")
    if num_kv_heads >= size:
        return HeadRange.of_rank(rank, size, num_kv_heads)
    return HeadRange(rank // (size // num_kv_heads), 1, num_kv_heads)


def sources_of(rank: int, size: int, num_theirs: int, num_kv_heads: int) -> Iterator[tuple[int, int]]:
    """Ranks of the other side that rank `rank` has to do with, each with the number of ranks that fetch from it. Those
    from which nobody does are told so by one.

    Raises:
        ValueError: as `heads_of`, of either side.
    """
    fetched = [_fetched_by(each, size, num_theirs, num_kv_heads) for each in range(size)]
    for theirs in range(num_theirs):
        num_receivers = sum(theirs in each for each in fetched)
        if theirs in fetched[rank] or (not num_receivers and theirs % size == rank):
            yield theirs, num_receivers


def _fetched_by(rank: int, size: int, num_theirs: int, num_kv_heads: int) -> set[int]:
    """Of those that have the same head one, so that each has as few receivers as can be."""
    mine, copies, their_copies = heads_of(rank, size, num_kv_heads), size // num_kv_heads, num_theirs // num_kv_heads
    which = rank % max(1, copies) * their_copies // max(1, copies)
    firsts = range(0, num_theirs, max(1, their_copies))
    return {first + which for first in firsts if mine.common(heads_of(first, num_theirs, num_kv_heads))}
