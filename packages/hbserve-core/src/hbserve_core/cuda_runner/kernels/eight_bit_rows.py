"""Rows as 8-bit floats, for products of many of them with weights of 8-bit floats.

Tensor cores multiply these at twice the rate of 16 bits. Each row, or each group of its inputs, is divided by what
makes its largest number the largest 8-bit float (dynamic scales).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin

_LARGEST = tl.constexpr(448.0)
_AT_ONCE = 2048
"""Inputs of a program, of whole groups."""
_ROWS = 16
"""Rows are made a multiple of these, as cuBLAS wants them; what is in the last ones is not looked at."""


@dataclass(frozen=True, slots=True)
class EightBitRows:
    values: torch.Tensor
    """(padded M, I) float8_e4m3fn, in the order in which words of weights have them (see model/narrow_weight.py)."""
    scales: torch.Tensor
    """(I / group, padded M) float32, by which they are to be multiplied."""


@triton.jit(do_not_specialize=["num_rows"])
def _eight_bit_rows(
    x, values, scales, num_rows, num_inputs, RUNS: tl.constexpr, RUN: tl.constexpr, ONE_GROUP: tl.constexpr
):
    begin()
    HALF: tl.constexpr = RUN // 2
    row, runs = tl.program_id(0).to(tl.int64), tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    inside, first = (runs * RUN < num_inputs)[:, None], row * num_inputs + runs[:, None] * RUN
    low = tl.load(x + first + tl.arange(0, HALF)[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + first + HALF + tl.arange(0, HALF)[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    if ONE_GROUP:
        largest = tl.broadcast_to(tl.max(largest, 0), (RUNS,))
    # Rows of zeros stay so.
    scale = tl.maximum(largest, 1e-30) / _LARGEST
    both = tl.reshape(tl.join(low / scale[:, None], high / scale[:, None]), (RUNS, RUN))
    tl.store(values + first + tl.arange(0, RUN)[None, :], both.to(tl.float8e4nv), mask=inside)
    if ONE_GROUP:
        tl.store(scales + row + 0 * runs, scale, mask=runs == 0)
    else:
        tl.store(scales + runs * num_rows + row, scale, mask=runs * RUN < num_inputs)


def eight_bit_rows(x: torch.Tensor, group: int, run: int) -> EightBitRows:
    """Of rows (M, I). group: inputs that share a scale, a run or all of them; run: of the weight's words."""
    (rows, inputs), one_group = x.shape, group == x.shape[1]
    assert one_group or group == run
    padded = triton.cdiv(rows, _ROWS) * _ROWS
    values = torch.empty((padded, inputs), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((inputs // group, padded), dtype=torch.float32, device=x.device)
    runs = triton.next_power_of_2(inputs // run)
    at_once = runs if one_group else min(_AT_ONCE // run, runs)
    _eight_bit_rows[(rows, triton.cdiv(inputs // run, at_once))](
        x,
        values,
        scales,
        padded,
        inputs,
        at_once,
        run,
        one_group,
        num_warps=4 if at_once * run <= 4096 else 8,
        **LAUNCH,
    )
    return EightBitRows(values, scales)
