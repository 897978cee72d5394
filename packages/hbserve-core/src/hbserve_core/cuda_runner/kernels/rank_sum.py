"""Sums over the ranks of one host, by kernels that write into each other's memory. They come between two products of a
layer of which each rank has a part.

Every rank adds the rows of all ranks, in float32 and in the order of ranks, so that all get the same bits (a one-shot
all-reduce). The sum of a row stays in registers: it is added to the residual stream, rounded once, and normed for the
next product.

    few rows     are written into the others' memory, in 64-bit words of which half is the number of the sum: who finds
                 that has the other half (NCCL's LL protocol)
    many rows    have been written by their product where all can read them: each rank tells the others that its own are
                 there, and reads theirs

A sum has a number, which the device counts, so that a graph may contain it. Sums take turns with two halves of the
memory: a rank begins sum n + 2 when all others have begun n + 1, and so have ended n. A kernel that waits checks a word
in the host's memory at intervals, and continues with whatever is there when that is set: then nobody wants the sum any
more.
Shapes: T rows, E numbers of a row, W 32-bit words of a row, P ranks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from hbserve_core.cuda_runner.kernels.dependent_launch import INTERPRETED, LAUNCH, begin
from hbserve_core.cuda_runner.kernels.experts import ExpertParts, with_parts
from hbserve_core.cuda_runner.kernels.pointwise import normed_row

MOST_PROGRAMS = 256
"""Largest number of programs of a sum. All of them must be on the device at once, because each waits for others."""
FLAG_BYTES = 128
"""Distance between flags, which belong to different ranks."""
_FLAG_BYTES = tl.constexpr(FLAG_BYTES)
RUNNING, CLOSED, LATE = 0, 1, 2
"""Values of the host's word. A kernel that has waited for too long sets it to LATE."""
_LATE = tl.constexpr(LATE)
_LOOK_EVERY = tl.constexpr(256)
"""Number of checks of what others write between two checks whether anybody has given up."""
_ASK_EVERY = tl.constexpr(1 << 15)
"""Number of checks of what others write between two checks of the host's word, which takes some 20 ms. Hundreds of
programs that read the host's memory at once would hold each other up for a millisecond, and with them the other ranks,
which wait for them."""
_TIMEOUT_NS = tl.constexpr(600 * 10**9)


@triton.jit
def _now():
    now = tl.full((), 0, tl.int64)
    if not INTERPRETED:
        now = cuda.globaltimer()
    return now


@triton.jit
def _gives_up(words, looks, began):
    """Decide whether to stop waiting, after `looks` checks in vain. words: pointers to the device's word and to the
    host's."""
    found = tl.full((), 0, tl.int32)
    if looks % _LOOK_EVERY == 0:
        found = tl.load(words[0], volatile=True)
        if found == 0 and looks % _ASK_EVERY == 0:
            found = tl.load(words[1], volatile=True)
            if found == 0 and _now() - began > _TIMEOUT_NS:
                tl.store(words[1], _LATE)
                found = tl.full((), _LATE, tl.int32)
            if found != 0:
                tl.store(words[0], found)  # for all others, and for sums that follow
    return found != 0


@triton.jit
def _memory(bases, rank, offset, element: tl.constexpr):
    """Return a pointer into a rank's memory at a byte offset, which is a multiple of 16."""
    return tl.multiple_of((tl.load(bases + rank) + offset).to(tl.pointer_type(element)), 16)


@triton.jit
def _numbers(words, element: tl.constexpr):
    """Convert 32-bit words (W,) to numbers (E,) float32."""
    if element.primitive_bitwidth == 32:
        numbers = words.to(element, bitcast=True)
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        numbers = tl.interleave(low.to(element, bitcast=True), high.to(element, bitcast=True)).to(tl.float32)
    return numbers


@triton.jit
def _words(numbers, element: tl.constexpr, W: tl.constexpr):
    """Round numbers, float32, and convert them to words (W,) int32, from which `_numbers` recovers them."""
    if element.primitive_bitwidth == 32:
        words = numbers.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(numbers.to(element).to(tl.int16, bitcast=True), (W, 2)))
        words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return words


@triton.jit
def _send_words(words, there, inside, number):
    """Send 32-bit words (W,), each with the sum's number."""
    tl.store(there, (words.to(tl.int64) & 0xFFFFFFFF) | (number.to(tl.int64) << 32), mask=inside)


@triton.jit
def _wait_for_words(here, inside, number, words):
    """Wait until all words have come, and return them, (W,) int32."""
    found = tl.load(here, mask=inside, other=0, volatile=True)
    missing = tl.sum((inside & ((found >> 32).to(tl.int32) != number)).to(tl.int32), 0)
    looks, began = tl.full((), 0, tl.int32), _now()
    while missing > 0:
        found = tl.load(here, mask=inside, other=0, volatile=True)
        missing = tl.sum((inside & ((found >> 32).to(tl.int32) != number)).to(tl.int32), 0)
        looks += 1
        if _gives_up(words, looks, began):
            missing = tl.full((), 0, tl.int32)
    return found.to(tl.int32)


@triton.jit
def _set_flag(flag, number):
    """Set a flag of another device, after everything that was written before."""
    tl.debug_barrier()
    if INTERPRETED:
        tl.store(flag, number)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
            " @p st.release.sys.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r", [flag.to(tl.int64), number], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _wait_for_flag(flag, number, words):
    """Wait for a flag. What was written before it may then be read, bypassing the first-level cache."""
    # An atomic load that acquires is a fence, and hundreds of these at once would hold up the rank that sets the flag.
    found = tl.load(flag, volatile=True)
    looks, began = tl.full((), 0, tl.int32), _now()
    while found != number:
        looks += 1
        found = tl.load(flag, volatile=True)
        if _gives_up(words, looks, began):
            found = number
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [flag.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def _count(numbers, number, PROGRAMS: tl.constexpr):
    """Give every program of the next sum its number. Each has a copy of its own, because none may count before all have
    read."""
    places = tl.arange(0, PROGRAMS)
    own = places % tl.num_programs(0) == tl.program_id(0)
    # 0 is skipped, because memory is full of zeros before the first sum.
    tl.store(numbers + places, tl.full((PROGRAMS,), tl.where(number == -1, 2, number + 1), tl.int32), mask=own)


@triton.jit
def _finish_row(total, out, norm, normed, row, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, NORMS: tl.constexpr):
    """Write a row whose sum is complete, and the normed row."""
    columns = tl.arange(0, PADDED)
    inside, place = columns < SIZE, row * SIZE + columns
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=inside)
    if NORMS:
        tl.store(normed + place, normed_row(rounded, norm, eps, columns, inside, SIZE), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "first"])
def _sum_few(
    partial, parts, experts, first, out, norm, normed, eps, bases, numbers, device_word, host_word, start, capacity,
    num_rows, SIZE: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, PADDED_WORDS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr,
    X: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Sum few rows over all ranks. start: offset of the memory for few rows, in bytes. capacity: bytes of a rank's part
    of one half of it. If there are parts (K > 0), see `ExpertParts`, `partial` is first assembled from them."""
    begin()
    program = tl.program_id(0)
    number = tl.load(numbers + program)
    half = start + (number & 1) * (RANKS - 1) * capacity
    w, columns = tl.arange(0, PADDED_WORDS), tl.arange(0, PADDED)
    inside = w < WORDS
    for row in range(program, num_rows, tl.num_programs(0)):
        if K > 0:
            found = with_parts(tl.zeros((PADDED,), tl.float32), parts, experts, row, columns, first, SIZE, X, K)
            words = _words(found, out.dtype.element_ty, PADDED_WORDS)
            tl.store(partial + row * WORDS + w, words, mask=inside)
        else:
            words = tl.load(partial + row * WORDS + w, mask=inside, other=0)
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                there = _memory(bases, rank, half + (RANK - rank - 1 + RANKS) % RANKS * capacity, tl.int64)
                _send_words(words, there + row * WORDS + w, inside, number)
    tl.debug_barrier()
    for row in range(program, num_rows, tl.num_programs(0)):
        if ADDS:
            place = row * SIZE + columns
            residual = tl.load(out + place, mask=columns < SIZE, other=0.0).to(tl.float32)
        total = tl.zeros((PADDED,), tl.float32)
        for rank in tl.static_range(RANKS):
            if rank == RANK:
                words = tl.load(partial + row * WORDS + w, mask=inside, other=0)
            else:
                here = _memory(bases, RANK, half + (rank - RANK - 1 + RANKS) % RANKS * capacity, tl.int64)
                words = _wait_for_words(here + row * WORDS + w, inside, number, (device_word, host_word))
            total += _numbers(words, out.dtype.element_ty)
        if ADDS:
            total += residual
        _finish_row(total, out, norm, normed, row, eps, SIZE, PADDED, NORMS)
    _count(numbers, number, PROGRAMS)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_many(
    out, norm, normed, eps, bases, numbers, device_word, host_word, start, num_rows, SIZE: tl.constexpr,
    PADDED: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, ADDS: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """Sum many rows over all ranks. start: offset of the rows in every rank's memory, which begins with flags, one of
    each other rank in each half."""
    begin()
    program = tl.program_id(0)
    number = tl.load(numbers + program)
    flags = (number & 1) * (RANKS - 1) * _FLAG_BYTES
    if program == 0:
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                slot = (RANK - rank - 1 + RANKS) % RANKS
                _set_flag(_memory(bases, rank, flags + slot * _FLAG_BYTES, tl.int32), number)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            slot = (rank - RANK - 1 + RANKS) % RANKS
            _wait_for_flag(_memory(bases, RANK, flags + slot * _FLAG_BYTES, tl.int32), number, (device_word, host_word))
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    for row in range(program, num_rows, tl.num_programs(0)):
        place = row * SIZE + columns
        total = tl.zeros((PADDED,), tl.float32)
        for rank in tl.static_range(RANKS):
            rows = _memory(bases, rank, start, out.dtype.element_ty)
            # The load bypasses the first-level cache, which does not see what others have written.
            total += tl.load(rows + place, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        if ADDS:
            total += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
        _finish_row(total, out, norm, normed, row, eps, SIZE, PADDED, NORMS)
    _count(numbers, number, PROGRAMS)


@dataclass(frozen=True)
class SharedMemory:
    """Memory that the ranks of a host have mapped into each other, as one of them sees it: flags, what others send for
    sums of few rows, and two places for many rows of its own."""

    rank: int
    num_ranks: int
    bases: torch.Tensor
    """Address in this process of each rank's memory, (P,) int64."""
    numbers: torch.Tensor
    """Number of the next sum, for each program, 1 at first, (MOST_PROGRAMS,) int32. It belongs to this rank alone."""
    device_word: torch.Tensor
    """Word on the device, (1,) int32: 0, or the value of the host's word that a kernel has seen. It belongs to this
    rank alone."""
    host_word: torch.Tensor
    """Word in the host's pinned memory, (1,) int32: RUNNING, CLOSED or LATE."""
    few_bytes: int
    """Bytes of the largest sum of few rows."""
    many_bytes: int
    """Bytes of the largest sum of many rows."""

    @property
    def few_start(self) -> int:
        return 2 * (self.num_ranks - 1) * FLAG_BYTES

    @property
    def many_start(self) -> int:
        return self.few_start + 2 * (self.num_ranks - 1) * 2 * self.few_bytes

    @property
    def num_bytes(self) -> int:
        """Number of bytes of each rank's memory, which must be zeros before the first sum."""
        return self.many_start + 2 * self.many_bytes

    def rows_at_once(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return how many of rows (T, E) to compute and sum at a time: equal parts, as few as fit in a place for many
        rows."""
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        # With more ranks, each of which reads the rows of all, NCCL is faster for this many rows.
        if num_bytes <= self.many_bytes or self.num_ranks > 2:
            return shape[0]
        return -(-shape[0] // -(-num_bytes // self.many_bytes))


def rank_sum(
    partial: torch.Tensor,
    memory: SharedMemory,
    *,
    start: int | None = None,
    add_to: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    normed_to: torch.Tensor | None = None,
    parts: ExpertParts | None = None,
    programs: int = MOST_PROGRAMS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum every rank's `partial` (T, E), which takes up to `few_bytes` unless `start` is given. All ranks must launch
    the sum.

    start: `partial` consists of many rows, which lie in every rank's memory from this byte on. They may be written
    again after the sum that follows. add_to: (T, E), to which the sum is added in place, rounded once, and which is
    returned. norm: weights (E,) and eps of an RMS norm; then the normed result is returned too, in `normed_to` (T, E)
    if given. parts: experts' output from which `partial` is first assembled, for few rows only; then `partial` is only
    memory for that.
    """
    rows, size = partial.shape
    assert partial.is_contiguous()
    assert start is not None or partial.nbytes <= memory.few_bytes
    out = torch.empty_like(partial) if add_to is None else add_to
    normed = torch.empty_like(partial) if norm is not None and normed_to is None else normed_to
    weight, eps = norm or (out, 0.0)
    padded = triton.next_power_of_2(size)
    grid = (min(rows, programs),)
    options = {
        "SIZE": size, "PADDED": padded, "RANK": memory.rank, "RANKS": memory.num_ranks, "PROGRAMS": MOST_PROGRAMS,
        "ADDS": add_to is not None, "NORMS": norm is not None, "num_warps": max(1, min(8, padded // 512)),
    } | LAUNCH  # fmt: skip
    written = out, weight, out if normed is None else normed, eps
    shared = memory.bases, memory.numbers, memory.device_word, memory.host_word
    if start is None:
        per_word = 4 // partial.dtype.itemsize
        words = {"WORDS": size // per_word, "PADDED_WORDS": padded // per_word}
        of_few = memory.few_start, 2 * memory.few_bytes
        given = (partial, partial, 0) if parts is None else (parts.rows, parts.experts, parts.first)
        words |= {"X": 0, "K": 0} if parts is None else {"X": parts.count, "K": parts.experts.shape[1]}
        _sum_few[grid](partial.view(torch.int32), *given, *written, *shared, *of_few, rows, **words, **options)
    else:
        _sum_many[grid](*written, *shared, start, rows, **options)
    return out, normed
