"""Kernels that read and write rows, and compute next to nothing.

They run at the beginning and end of a step, and between products of cuBLAS; our own products include them.

    host_copy    a step's numbers to the device, and sampled tokens back
    embed        token ids, some of them known only to the device, to rows of the embedding table
    rms_norm     rows to normed rows
    gate_mul     gate and up to silu(gate) * up

Shapes: T rows of one step, E hidden_size, F intermediate_size, V vocab_size, C numbers to copy.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, begin_step

_COPY_BLOCK = 1024
_MOST_COPIED = 1 << 18
"""Largest number of elements that our kernel copies. For more, a copy engine is faster."""


@triton.jit(do_not_specialize=["count"])
def _host_copy(source, target, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + places, tl.load(source + places, mask=places < count), mask=places < count)


def host_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Queue a copy of as many numbers of `source` as `target` (C,) has. One of them is on the device, the other in
    pinned memory.

    A step of decodes has one copy before it and one after it. A copy engine takes some 7 us for each, mostly to begin
    and to be waited for. A kernel that reads or writes the host's memory itself takes 3 us, which counts where steps
    follow each other. It begins when the previous kernel has ended, and lets none begin before it has ended: see
    `begin_step` in dependent_launch.py.
    """
    count = len(target)
    if count > _MOST_COPIED:
        target.copy_(source[:count], non_blocking=True)
    elif count:
        _host_copy[(triton.cdiv(count, _COPY_BLOCK),)](source, target, count, _COPY_BLOCK, num_warps=4)


@triton.jit
def _embed(ids, sources, sampled, table, first, num_tokens, out, SIZE: tl.constexpr, PADDED: tl.constexpr):
    begin_step()  # it is the step's first kernel
    row = tl.program_id(0)
    source = tl.load(sources + row)
    token = tl.load(ids + row)
    if source >= 0:
        token = tl.load(sampled + source)
    token -= first
    columns = tl.arange(0, PADDED)
    size = tl.where((token >= 0) & (token < num_tokens), SIZE, 0)
    values = tl.load(table + token.to(tl.int64) * SIZE + columns, mask=columns < size, other=0.0)
    tl.store(out + row.to(tl.int64) * SIZE + columns, values, mask=columns < SIZE)


def embed(
    ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor, table: torch.Tensor, first_token: int = 0
) -> torch.Tensor:
    """Look up rows (T, E) of `table` (V, E), which holds tokens from `first_token` on; zeros for others.

    ids, sources: (T,) int32. Row t is token ids[t] or, if sources[t] is not negative, sampled[sources[t]]: a token that
    the previous step has sampled and the host has not read yet. sampled: (R,) int32.
    """
    size = table.shape[1]
    out = torch.empty((len(ids), size), dtype=table.dtype, device=table.device)
    _embed[(len(ids),)](
        ids, sources, sampled, table, first_token, len(table), out, size, triton.next_power_of_2(size), num_warps=4,
        **LAUNCH,
    )  # fmt: skip
    return out


@triton.jit
def normed_row(given, weight, eps, columns, inside, SIZE: tl.constexpr):
    """Norm a row (padded E,), which is 0 outside, by weights (E,)."""
    exact = given.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + eps)
    normed = (exact * scale).to(given.dtype).to(tl.float32)
    result = normed * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return result.to(given.dtype)


@triton.jit
def _rms_norm(x, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    begin()
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    given = tl.load(x + row + columns, mask=inside, other=0.0)
    tl.store(out + row + columns, normed_row(given, weight, eps, columns, inside, SIZE), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm rows (T, E) by an RMS norm with weight (E,)."""
    rows, size = x.shape
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    _rms_norm[(rows,)](x, weight, out, eps, size, padded, num_warps=4 if padded <= 2048 else 8, **LAUNCH)
    return out


@triton.jit
def activated(gate, GELU: tl.constexpr):
    """Compute silu(gate), or gelu(gate) in its tanh approximation, which can also be written with a sigmoid. gate:
    float32."""
    slope = gate
    if GELU:
        slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    return gate / (1.0 + tl.exp(-slope))


@triton.jit
def _gate_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    begin()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
    tl.store(out + row * SIZE + columns, activated(gate.to(tl.float32), GELU).to(gate.dtype) * up, mask=inside)


def gate_mul(gate_up: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """Compute silu(gate) * up, or gelu(gate) * up, (T, F), from (T, 2 F), gate then up."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(size))
    _gate_mul[(rows, triton.cdiv(size, block))](gate_up, out, size, block, gelu, num_warps=4, **LAUNCH)
    return out
