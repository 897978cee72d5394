"""Pairs of ranks of two vLLM servers, whose tensor parallelism may differ: which rank fetches from which. Imports no
vLLM.

Ranks hold KV heads as vLLM splits them: in equal parts or, if there are fewer heads than ranks, one head each, which
several ranks in a row have. Latents (MLA) are one head. In this drawing, with 2 heads in all, 4 ranks fetch from 2, and
2 ranks fetch from 4:

    0  0  1  1        0     1
    0     1           0  0  1  1      nobody fetches from the second and the fourth
"""

from collections.abc import Iterator

from hbserve_kv.memory.layout import HeadRange


def heads_of(rank: int, size: int, num_kv_heads: int) -> HeadRange:
    """Return the heads of rank `rank` of `size`. Raises ValueError if neither of `size` and `num_kv_heads` is a
    multiple of the other."""
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(f"tensor parallelism of {size}: {num_kv_heads} KV heads are neither a multiple nor a divisor")
    if num_kv_heads >= size:
        return HeadRange.of_rank(rank, size, num_kv_heads)
    return HeadRange(rank // (size // num_kv_heads), 1, num_kv_heads)


def sources_of(rank: int, size: int, num_theirs: int, num_kv_heads: int) -> Iterator[tuple[int, int]]:
    """Yield the ranks of the other side to which rank `rank` talks, each with the number of ranks that fetch from it.
    If that is 0, `rank` is the one that tells it so.

    Raises:
        ValueError: see `heads_of`, for either side.
    """
    fetched = [_fetched_by(each, size, num_theirs, num_kv_heads) for each in range(size)]
    for theirs in range(num_theirs):
        num_receivers = sum(theirs in each for each in fetched)
        if theirs in fetched[rank] or (not num_receivers and theirs % size == rank):
            yield theirs, num_receivers


def _fetched_by(rank: int, size: int, num_theirs: int, num_kv_heads: int) -> set[int]:
    """Choose one of the ranks that have the same head, for each head, so that each rank has as few receivers as
    possible."""
    mine, copies, their_copies = heads_of(rank, size, num_kv_heads), size // num_kv_heads, num_theirs // num_kv_heads
    which = rank % max(1, copies) * their_copies // max(1, copies)
    firsts = range(0, num_theirs, max(1, their_copies))
    return {first + which for first in firsts if mine.common(heads_of(first, num_theirs, num_kv_heads))}
