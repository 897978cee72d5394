"""Attention of prompt chunks on Hopper, whose products and softmax run at the same time (FlashAttention-3, Shah 2024).

This is for heads of 128 numbers in 16 bits, without windows, caps and 8-bit pools; prefill_attention.py takes all
others. Keys and values only come from the pool, page by page, through the copy engine (TMA): `store_kv` has written the
chunk's own there. A program takes one tile of new tokens after the other, and consists of four groups of warps:

    two loaders    bring queries and keys, and values, into shared memory, as soon as there is room: one alone would be
                   waited for where pages are small
    two consumers  of 64 rows each: tensor cores have the products of one while the other one weighs its scores

Row r of a tile is new token r // G and query head r % G of a key head, as in prefill_attention.py. Keys are taken from
the last tile to the first, so that only the tiles that are taken first are masked.
Shapes: T rows of the step, N query heads, K key heads, G = N / K, R rows of a consumer.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hbserve_core.cuda_runner.kernels.attention_parts import LOG2_E, Scores
from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, num_processors
from hbserve_core.cuda_runner.kernels.hopper import BOXES, IS_HOPPER, PAGES, arrive, barriers, copy_in, meet, viewed

_D = gl.constexpr(128)
_HALF = gl.constexpr(64)
_ROWS = gl.constexpr(64)
_TILE = gl.constexpr(128)
"""Number of keys of a tile."""
_STAGES = gl.constexpr(2)
_FEWEST_ROWS = 512
"""Fewest rows of a step for this kernel. With fewer rows, shorter programs are as fast, and leave room for the next
kernel to start."""
_LOWEST = gl.constexpr(-1e30)
"""Score below every other one; a number, so that differences from it are numbers."""
_REGISTERS = 232, 40
"""Number of registers of a consumer's thread, and of a loader's."""


@gluon.jit
def _span(work, index, K: gl.constexpr):
    """Load the index-th piece of work, which is a tile and a key head: sequence (-1: there is none), first new token,
    the sequence's first row, its number of new tokens, and of tokens before. work: tiles and their stride, sequences
    and their stride, number of pieces."""
    tiles, tile_stride, sequences, stride, total = work
    tile = gl.minimum(index, total - 1) // K
    found = gl.load(tiles + tile)
    sequence = gl.maximum(found, 0)
    num_new = gl.load(sequences + stride + sequence)
    before = gl.load(sequences + 2 * stride + sequence) - num_new
    first_new, first_row = gl.load(tiles + tile_stride + tile), gl.load(sequences + sequence)
    return gl.where(index < total, found, -1), first_new, first_row, num_new, before


@gluon.jit
def _next(index, turn):
    """Compute the turn-th piece of work of a program from the previous one. Work is sorted, longest first, so the
    program that had the longest piece of one turn has the shortest of the next."""
    return 2 * turn * gl.num_programs(0) - 1 - index


@gluon.jit
def _end(before, first_new, num_new, G: gl.constexpr):
    """Compute the end of the positions that the last row of a tile sees."""
    return before + gl.minimum(first_new + 2 * _ROWS // G, num_new)


# ---- loader ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_queries(rows, first_row, first_column, memory, ready, free, turn, G: gl.constexpr):
    for group in gl.static_range(2):
        place = turn % 2 * 2 + group
        mbarrier.wait(free.index(place), (turn // 2 & 1) ^ 1)
        mbarrier.expect(ready.index(place), _ROWS * _D * 2)
        for half in gl.static_range(2):
            coordinates = [first_row + group * (_ROWS // G), first_column, half * _HALF]
            copy_in(rows, coordinates, ready.index(place), memory.index(place * 2 + half))


@gluon.jit
def _load_tile(pool_rows, table, start, end, first_row, column, ready, memory, stage, BLOCK_SIZE: gl.constexpr,
               BLOCK_ROWS: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Begin to copy a tile of positions from `start` on, page by page, with its halves apart. end: end of the
    context."""
    PAGES: gl.constexpr = _TILE // PAGE
    mbarrier.expect(ready, _TILE * _D * 2)
    first, last = start // PAGE, (end - 1) // PAGE
    for page in gl.static_range(PAGES):
        # Beyond the end there is nothing to read, but the barrier waits for this many bytes.
        place = gl.minimum(first + page, last)
        row = gl.load(table + place * PAGE // BLOCK_SIZE) * BLOCK_ROWS + first_row + place * PAGE % BLOCK_SIZE
        for half in gl.static_range(2):
            copy_in(pool_rows, [row, column + half * _HALF], ready, memory.index((stage * 2 + half) * PAGES + page))


@gluon.jit
def _clear_behind(values, stage, used, PAGE: gl.constexpr):
    """Set the values of a tile from row `used` on to zero. Their weights are 0, but 0 times a NaN would be NaN."""
    PAGES: gl.constexpr = _TILE // PAGE
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    rows = gl.arange(0, PAGE, gl.SliceLayout(1, layout))
    for page in range(used // PAGE, PAGES):
        inside = (page * PAGE + rows < used)[:, None]
        for half in gl.static_range(2):
            memory = values.index((stage * 2 + half) * PAGES + page)
            found = memory.load(layout)
            memory.store(gl.where(inside, found, gl.zeros_like(found)))
    fence_async_shared()


@gluon.jit
def _load_keys(work, qkv_rows, pool_rows, tables, width, layer_row, memory, ready, free, K: gl.constexpr,
               G: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_ROWS: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Load the keys, and the queries, of all pieces of work of this program."""
    index = gl.program_id(0)
    turn, used = 0, 0
    span = _span(work, index, K)
    table_width = gl.load(width)
    while span[0] >= 0:
        sequence, first_new, first_row, num_new, before = span
        head = index % K
        turn += 1
        index = _next(index, turn)
        # The next piece is loaded before it is needed, because its reads take long.
        span = _span(work, index, K)
        _load_queries(qkv_rows, first_row + first_new, head * G, memory[0], ready[0], free[0], turn - 1, G)
        table = tables + sequence.to(gl.int64) * table_width
        for start in range((_end(before, first_new, num_new, G) - 1) // _TILE * _TILE, -1, -_TILE):
            stage = used % _STAGES
            mbarrier.wait(free[1].index(stage), (used // _STAGES & 1) ^ 1)
            _load_tile(pool_rows, table, start, before + num_new, layer_row, head * _D, ready[1].index(stage),
                       memory[1], stage, BLOCK_SIZE, BLOCK_ROWS, PAGE)  # fmt: skip
            used += 1


@gluon.jit
def _load_values(work, pool_rows, tables, width, layer_row, memory, ready, free, K: gl.constexpr, G: gl.constexpr,
                 BLOCK_SIZE: gl.constexpr, BLOCK_ROWS: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    index = gl.program_id(0)
    turn, used, cleared = 0, 0, 0
    span = _span(work, index, K)
    table_width = gl.load(width)
    while span[0] >= 0:
        sequence, first_new, _, num_new, before = span
        head = index % K
        turn += 1
        index = _next(index, turn)
        span = _span(work, index, K)
        table = tables + sequence.to(gl.int64) * table_width
        context = before + num_new
        for start in range((_end(before, first_new, num_new, G) - 1) // _TILE * _TILE, -1, -_TILE):
            stage = used % _STAGES
            mbarrier.wait(free[2].index(stage), (used // _STAGES & 1) ^ 1)
            is_whole = start + _TILE <= context
            arrived = ready[2].index(gl.where(is_whole, stage, _STAGES))
            _load_tile(pool_rows, table, start, context, layer_row + BLOCK_SIZE, head * _D, arrived, memory[2], stage,
                       BLOCK_SIZE, BLOCK_ROWS, PAGE)  # fmt: skip
            if start + _TILE > context:
                mbarrier.wait(ready[2].index(_STAGES), cleared & 1)
                cleared += 1
                _clear_behind(memory[2], stage, context - start, PAGE)
                arrive(ready[2].index(stage))
            used += 1


# ---- consumers -------------------------------------------------------------------------------------------------------


@gluon.jit
def _rotate(queries, place, ready, phase, angles, norm, positions, heads, eps, HAS_NORM: gl.constexpr,
            layout: gl.constexpr):  # fmt: skip
    """Norm and rotate rows of queries in place when they have come. positions, heads: (R,)."""
    d = gl.arange(0, _HALF, gl.SliceLayout(0, layout))[None, :]
    angles += positions.to(gl.int64)[:, None] * _D + d
    cos, sin = gl.load(angles), gl.load(angles + _HALF)
    mbarrier.wait(ready, phase)
    given_low, given_high = queries.index(place * 2).load(layout), queries.index(place * 2 + 1).load(layout)
    low, high = given_low.to(gl.float32), given_high.to(gl.float32)
    if HAS_NORM:
        weights = norm + heads[:, None] * _D + d
        low_weights, high_weights = gl.load(weights).to(gl.float32), gl.load(weights + _HALF).to(gl.float32)
        scale = gl.rsqrt(gl.sum(low * low + high * high, 1) / _D + eps)[:, None]
        # Rounded where the plain torch version rounds.
        low = (low * scale).to(given_low.dtype).to(gl.float32) * low_weights
        high = (high * scale).to(given_low.dtype).to(gl.float32) * high_weights
    queries.index(place * 2).store((low * cos - high * sin).to(given_low.dtype))
    queries.index(place * 2 + 1).store((high * cos + low * sin).to(given_low.dtype))
    fence_async_shared()
    meet()


@gluon.jit
def _weigh(scores, highest, positions, start, first_position, scale, layout: gl.constexpr):
    """Compute weights (R, tile) relative to the highest scores so far, these scores, and the factors of earlier
    weights."""
    if start + _TILE - 1 > first_position:
        tokens = start + gl.arange(0, _TILE, gl.SliceLayout(0, layout))
        scores = gl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(scores, 1) * scale)
    return gl.exp2(scores * scale - new_highest[:, None]), new_highest, gl.exp2(highest - new_highest)


@gluon.jit
def _attend(query, keys, values, ready, free, used, last, positions, first_position, scale,
            layout: gl.constexpr):  # fmt: skip
    """Compute the weighted values of all tiles of keys, from the one that begins at `last` down to the first, and the
    sums of the weights."""
    _, key_ready, value_ready = ready
    _, key_free, value_free = free
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    nothing = gl.zeros([_ROWS, _TILE], gl.float32, layout)
    stage, phase = used % _STAGES, used // _STAGES & 1
    mbarrier.wait(key_ready.index(stage), phase)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    arrive(key_free.index(stage))
    highest = gl.full([_ROWS], _LOWEST, gl.float32, gl.SliceLayout(1, layout))
    weights, highest, faded = _weigh(scores, highest, positions, last, first_position, scale, layout)
    seen, result = gl.sum(weights, 1), gl.zeros([_ROWS, _D], gl.float32, layout)
    weights = gl.convert_layout(weights.to(query.dtype), operand)
    for start in range(last - _TILE, -1, -_TILE):
        used += 1
        next_stage, next_phase = used % _STAGES, used // _STAGES & 1
        mbarrier.wait(key_ready.index(next_stage), next_phase)
        coming = warpgroup_mma(query, keys.index(next_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(value_ready.index(stage), phase)
        adding = warpgroup_mma(weights, values.index(stage), result, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[coming])
        arrive(key_free.index(next_stage))
        exact, highest, faded = _weigh(scores, highest, positions, start, first_position, scale, layout)
        seen = seen * faded + gl.sum(exact, 1)
        result = warpgroup_mma_wait(0, deps=[adding]) * faded[:, None]
        arrive(value_free.index(stage))
        weights = gl.convert_layout(exact.to(query.dtype), operand)
        stage, phase = next_stage, next_phase
    mbarrier.wait(value_ready.index(stage), phase)
    result = warpgroup_mma_wait(0, deps=[warpgroup_mma(weights, values.index(stage), result, is_async=True)])
    arrive(value_free.index(stage))
    return result, seen, used + 1


@gluon.jit
def _store(out, memory, result, first_row, first_new, num_new, head, N: gl.constexpr, G: gl.constexpr):
    """Store the result by way of the queries' memory, so that whole lines are written."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    memory.store(result)
    meet()
    r, d = gl.arange(0, _ROWS, gl.SliceLayout(1, layout)), gl.arange(0, _D, gl.SliceLayout(0, layout))
    new = first_new + r // G
    row = (first_row + new).to(gl.int64) * (N * _D) + (head * G + r % G) * _D
    gl.store(out + row[:, None] + d[None, :], memory.load(layout), mask=(new < num_new)[:, None])
    fence_async_shared()


@gluon.jit
def _consume(group: gl.constexpr, work, angles, norm, eps, out, scale, memory, ready, free, N: gl.constexpr,
             K: gl.constexpr, HAS_NORM: gl.constexpr):  # fmt: skip
    G: gl.constexpr = N // K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    of_rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    queries, keys, values = memory
    halves, queries = viewed(queries, [8, _ROWS, _HALF]), viewed(queries, [4, _ROWS, _D])
    keys, values = viewed(keys, [_STAGES, _TILE, _D]), viewed(values, [_STAGES, _TILE, _D])
    index = gl.program_id(0)
    turn, used = 0, 0
    span = _span(work, index, K)
    while span[0] >= 0:
        _, first_new, first_row, num_new, before = span
        head = index % K
        turn += 1
        index = _next(index, turn)
        span = _span(work, index, K)
        last = (_end(before, first_new, num_new, G) - 1) // _TILE * _TILE
        first_new += group * (_ROWS // G)
        place, phase = (turn - 1) % 2 * 2 + group, (turn - 1) // 2 & 1
        # Rows that are not shown see what the last token sees, so that nothing divides by zero.
        r = gl.arange(0, _ROWS, gl.SliceLayout(1, of_rows))
        positions = before + gl.minimum(first_new + r // G, num_new - 1)
        _rotate(halves, place, ready[0].index(place), phase, angles, norm, positions, head * G + r % G, eps,
                HAS_NORM, of_rows)  # fmt: skip
        positions = gl.convert_layout(positions, gl.SliceLayout(1, layout))
        result, seen, used = _attend(queries.index(place), keys, values, ready, free, used, last, positions,
                                     before + first_new, scale, layout)  # fmt: skip
        result = (result / seen[:, None]).to(out.dtype.element_ty)
        _store(out, queries.index(place), result, first_row, first_new, num_new, head, N, G)
        arrive(free[0].index(place))


# ---- both ------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["tile_stride", "sequence_stride", "total", "layer_row"])
def _hopper_prefill(
    qkv_rows, pool_rows, out, angles, norm, eps, tables, width, tiles, tile_stride, sequences, sequence_stride, total,
    layer_row, scale, N: gl.constexpr, K: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_ROWS: gl.constexpr,
    PAGE: gl.constexpr, HAS_NORM: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    begin()
    G: gl.constexpr = N // K
    dtype: gl.constexpr = out.dtype.element_ty
    # There is memory for two tiles of queries: the next tile's come while this one's are used.
    queries = gl.allocate_shared_memory(dtype, [8, _ROWS // G, G, _HALF], qkv_rows.layout)
    keys = gl.allocate_shared_memory(dtype, [_STAGES * 2 * (_TILE // PAGE), PAGE, _HALF], pool_rows.layout)
    values = gl.allocate_shared_memory(dtype, [_STAGES * 2 * (_TILE // PAGE), PAGE, _HALF], pool_rows.layout)
    # The last barrier of values is for tiles of which a part must be cleared before they are ready.
    ready = barriers(4, 1), barriers(_STAGES, 1), barriers(_STAGES + 1, 1)
    free = barriers(4, 1), barriers(_STAGES, 2), barriers(_STAGES, 2)
    fence_async_shared()
    meet()
    memory = queries, keys, values
    work = tiles, tile_stride, sequences, sequence_stride, total
    gl.warp_specialize(
        [
            (_consume, (0, work, angles, norm, eps, out, scale, memory, ready, free, N, K, HAS_NORM)),
            (_consume, (1, work, angles, norm, eps, out, scale, memory, ready, free, N, K, HAS_NORM)),
            (_load_keys, (work, qkv_rows, pool_rows, tables, width, layer_row, memory, ready, free, K, G, BLOCK_SIZE,
                          BLOCK_ROWS, PAGE)),
            (_load_values, (work, pool_rows, tables, width, layer_row, memory, ready, free, K, G, BLOCK_SIZE,
                            BLOCK_ROWS, PAGE)),
        ],
        [4, 1, 1], [CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def suits_hopper(qkv: torch.Tensor, pool: torch.Tensor, scores: Scores | None) -> bool:
    """Return whether `hopper_prefill_attention` can take these, and is faster."""
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    group = qkv.shape[1] // head_dim // num_kv_heads - 2
    are_powers = block_size & (block_size - 1) == 0 and group & (group - 1) == 0
    fits = head_dim == _D.value and block_size >= 8 and group <= _ROWS.value and pool.is_contiguous()
    is_plain = qkv.dtype.itemsize == 2 and pool.dtype == qkv.dtype
    is_plain &= scores is None or (scores.window == 0 and scores.cap == 0)
    return IS_HOPPER and len(qkv) >= _FEWEST_ROWS and are_powers and fits and is_plain


def hopper_prefill_attention(
    qkv: torch.Tensor, out: torch.Tensor, pool: torch.Tensor, layer: int, cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None, tables: torch.Tensor, width: torch.Tensor, tiles: torch.Tensor,
    sequences: torch.Tensor, scores: Scores | None = None,
) -> None:  # fmt: skip
    """Do what `prefill_attention` does, which describes the arguments. Keys in qkv are not read."""
    _, num_layers, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads = out.shape[1] // head_dim
    group, page = num_heads // num_kv_heads, min(block_size, _TILE.value)
    weight, eps = norm or (cos_sin, 0.0)
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
    box, total = [_ROWS.value // group, group, _HALF.value], tiles.shape[1] * num_kv_heads
    _hopper_prefill[(min(total, num_processors(qkv.device)),)](
        TensorDescriptor.from_tensor(heads, box, BOXES),
        TensorDescriptor.from_tensor(pool.view(-1, num_kv_heads * head_dim), [page, _HALF.value], PAGES),
        out, cos_sin, weight, eps, tables, width, tiles, tiles.stride(0), sequences, sequences.stride(0), total,
        layer * 2 * block_size, (scores or Scores(head_dim**-0.5)).scale * LOG2_E, N=num_heads, K=num_kv_heads,
        BLOCK_SIZE=block_size, BLOCK_ROWS=num_layers * 2 * block_size, PAGE=page, HAS_NORM=norm is not None,
        CONSUMER_REGISTERS=_REGISTERS[0], LOADER_REGISTERS=_REGISTERS[1], num_warps=4, **LAUNCH,
    )  # fmt: skip
