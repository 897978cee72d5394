"""Products of experts (see experts.py) whose weights are narrower than 16 bits (see narrow_linear.py).

The experts' matrices are below each other in one of (X * O, I), so an expert is some rows of it.
Shapes: T rows, P pairs of a row and an expert, K of each row, X experts, I inputs, O outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.eight_bit_rows import EightBitRows, eight_bit_rows
from hbserve_core.cuda_runner.kernels.experts import ExpertTiles, Routing, expert_of
from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows, weight_rows
from hbserve_core.cuda_runner.kernels.narrow_few_experts import few_expert_mlps, suits_few_experts
from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix, sum_of_groups
from hbserve_core.cuda_runner.kernels.pointwise import activated

_FEWEST_8_BIT_ROWS = 32
"""Of a tile, that are worth being made 8-bit floats."""


@triton.jit
def _narrow_experts(
    rows, x_scales, num_scales, words, scales, pairs, ends, shares, out, num_inputs, num_outputs, group_size,
    X: tl.constexpr, PADDED_X: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):  # fmt: skip
    # Each pair's row is row pair // K of `rows`. With gates there are no shares.
    begin()
    expert = expert_of(ends, tl.program_id(1), X, PADDED_X)
    if expert >= X:
        return
    pair = tl.load(pairs + tl.program_id(1) * ROWS + tl.arange(0, ROWS))
    used, row = pair >= 0, tl.maximum(pair, 0) // K
    height = num_outputs * 2 if GATED else num_outputs
    own = expert * height + weight_rows(tl.program_id(0), num_outputs, OUTPUTS, GATED)
    PARTS: tl.constexpr = words.dtype.element_ty.primitive_bitwidth // BITS
    result = sum_of_groups(
        rows + row.to(tl.int64)[:, None] * num_inputs, x_scales + row, num_scales,
        words + own[:, None].to(tl.int64) * (num_inputs // PARTS), scales, own, 0, num_inputs, used, X * height,
        group_size, ROWS, OUTPUTS, STEP, STAGES, BITS, ONE_GROUP,
    )  # fmt: skip
    COUNT: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (2, COUNT, ROWS)), (1, 2, 0)))
        result = activated(gate, GELU) * up
    else:
        result *= tl.load(shares + pair, mask=used, other=0.0)[None, :]
    outputs = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    place = pair.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=used[None, :] & (outputs < num_outputs)[:, None])


class NarrowExperts:
    """One matrix of each expert, as `expert_mlps` takes them where they are no tensor."""

    def __init__(self, matrix: NarrowMatrix, count: int) -> None:
        """count: experts, whose matrices are below each other."""
        self.matrix = matrix
        self.shape = count, len(matrix) // count, matrix.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def gate_up(self, rows: torch.Tensor, out: torch.Tensor, tiles: ExpertTiles, gelu: bool) -> None:
        """Write to `out` (P, F), of rows (T, E)."""
        self._launch(rows, out, tiles, tiles.per_row, {"GATED": True, "GELU": gelu})

    def down(self, rows: torch.Tensor, out: torch.Tensor, tiles: ExpertTiles) -> None:
        """Write to `out` (P, E), each times its share, of rows (P, F)."""
        self._launch(rows, out, tiles, 1, {"GATED": False, "GELU": False})

    def suits_few(self, rows: torch.Tensor, down: "NarrowExperts", per_row: int) -> bool:
        return suits_few_experts(rows, self.matrix, down.matrix, per_row)

    def few_mlps(
        self, x: torch.Tensor | ScaledRows, logits: torch.Tensor, slots: torch.Tensor, down: "NarrowExperts",
        routing: Routing, *, eps: float, add_to: torch.Tensor | None, next_norm: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ScaledRows | None]:  # fmt: skip
        matrices = self.matrix, down.matrix, len(self)
        return few_expert_mlps(x, logits, slots, *matrices, routing, eps=eps, add_to=add_to, next_norm=next_norm)

    def _launch(
        self, rows: torch.Tensor, out: torch.Tensor, tiles: ExpertTiles, per_row: int, options: dict[str, Any]
    ) -> None:
        matrix, count = self.matrix, len(self)
        given: torch.Tensor | EightBitRows = rows
        if rows.dtype.itemsize == 2 and tiles.rows >= _FEWEST_8_BIT_ROWS and matrix.takes_8_bits():
            given = eight_bit_rows(rows, matrix.group, matrix.run)
        options |= {"OUTPUTS": 64, "STEP": matrix.run, "STAGES": 4 if rows.dtype.itemsize == 2 else 2, "num_warps": 4}
        values, words, x_scales = matrix.operands(given)
        outputs_at_once = options["OUTPUTS"] // 2 if options["GATED"] else options["OUTPUTS"]
        _narrow_experts[(triton.cdiv(out.shape[1], outputs_at_once), tiles.count)](
            values, x_scales, x_scales.shape[1], words, matrix.scales, tiles.pairs, tiles.ends, tiles.shares, out,
            rows.shape[1], out.shape[1], matrix.group, X=count,
            PADDED_X=triton.next_power_of_2(count), K=per_row, ROWS=tiles.rows, BITS=matrix.bits,
            ONE_GROUP=len(matrix.scales) == 1, **options, **LAUNCH,
        )  # fmt: skip
