"""Products of experts (see experts.py) whose weights are narrower than 16 bits (see narrow_linear.py).

The experts' matrices are stacked in one of (X * O, I), so an expert is a range of its rows.
Shapes: T rows, P pairs of a row and an expert, K of each row, X experts, I inputs, O outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.eight_bit_rows import EightBitForm, EightBitRows
from hbserve_core.cuda_runner.kernels.experts import ExpertTiles, Routing, expert_of, rows_of_tile
from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows, weight_rows
from hbserve_core.cuda_runner.kernels.narrow_few_experts import few_expert_mlps, suits_few_experts
from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix, sum_of_groups
from hbserve_core.cuda_runner.kernels.pointwise import activated

_FEWEST_8_BIT_ROWS = 32
"""Fewest rows of a tile for which it is worth converting rows to 8-bit floats."""
_BLOCK, _MOST_ROWS_OF_BLOCKS = 128, 64
"""Number of outputs that share a scale, all of which a program then has, and of 8-bit rows that its registers can hold
beside them."""


@triton.jit
def _sum_of_blocks(
    x, x_scales, num_scales, weight, scales, second, total, used, num_inputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute what `sum_of_groups` does, for 8-bit rows and a weight with one scale for each half of the outputs: the
    first at `scales`, the other `second` places after it. This takes less time than loading a scale for each output."""
    result = tl.zeros((OUTPUTS, ROWS), tl.float32)
    is_first = tl.arange(0, OUTPUTS) < OUTPUTS // 2
    for start in tl.range(0, num_inputs, STEP, num_stages=STAGES):
        columns = (start + tl.arange(0, STEP))[None, :]
        part = tl.dot(tl.load(weight + columns), tl.trans(tl.load(x + columns, mask=used[:, None], other=0.0)))
        own = scales + start // STEP * total
        of_weight = tl.where(is_first, tl.load(own), tl.load(own + second))
        of_x = tl.load(x_scales + start // STEP * num_scales, mask=used, other=0.0)
        result += part * of_weight[:, None] * of_x[None, :]
    return result


@triton.jit
def _narrow_experts(
    rows, x_scales, num_scales, words, scales, pairs, ends, shares, out, num_inputs, num_outputs, group_size,
    X: tl.constexpr, PADDED_X: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, BITS: tl.constexpr,
    ONE_GROUP: tl.constexpr, BY_BLOCK: tl.constexpr,
):  # fmt: skip
    # The row of a pair is row pair // K of `rows`. With gates there are no shares.
    begin()
    expert = expert_of(ends, tl.program_id(1), X, PADDED_X)
    if expert >= X:
        return
    pair = tl.load(pairs + tl.program_id(1) * ROWS + tl.arange(0, ROWS))
    used, row = pair >= 0, tl.maximum(pair, 0) // K
    height = num_outputs * 2 if GATED else num_outputs
    own = expert * height + weight_rows(tl.program_id(0), num_outputs, OUTPUTS, GATED)
    PARTS: tl.constexpr = words.dtype.element_ty.primitive_bitwidth // BITS
    x = rows + row.to(tl.int64)[:, None] * num_inputs
    weight = words + own[:, None].to(tl.int64) * (num_inputs // PARTS)
    if BY_BLOCK:
        first = expert * height + tl.program_id(0) * (OUTPUTS // 2 if GATED else OUTPUTS)
        result = _sum_of_blocks(
            x, x_scales + row, num_scales, weight, scales + first, num_outputs if GATED else 0, X * height, used,
            num_inputs, ROWS, OUTPUTS, STEP, STAGES,
        )  # fmt: skip
    else:
        result = sum_of_groups(
            x, x_scales + row, num_scales, weight, scales, own, 0, num_inputs, used, X * height, group_size, ROWS,
            OUTPUTS, STEP, STAGES, BITS, ONE_GROUP,
        )  # fmt: skip
    COUNT: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (2, COUNT, ROWS)), (1, 2, 0)))
        result = activated(gate, False) * up
    else:
        result *= tl.load(shares + pair, mask=used, other=0.0)[None, :]
    outputs = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    place = pair.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=used[None, :] & (outputs < num_outputs)[:, None])


def has_blocks(matrix: NarrowMatrix, outputs: int) -> bool:
    """Return whether each block of outputs of an expert has one scale for a step of inputs."""
    if not matrix.takes_8_bits() or len(matrix.scales) == 1 or outputs % (2 * _BLOCK):
        return False
    blocks = matrix.scales.view(len(matrix.scales), -1, _BLOCK)
    return bool((blocks == blocks[:, :, :1]).all())


class NarrowExperts:
    """One matrix of each expert, in the form that `expert_parts` takes if they are not a tensor."""

    def __init__(self, matrix: NarrowMatrix, count: int) -> None:
        """count: number of experts, whose matrices are stacked in `matrix`."""
        self.matrix = matrix
        self.shape = count, len(matrix) // count, matrix.shape[1]
        self._has_blocks = has_blocks(matrix, self.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def form_of_rows(self, rows: torch.Tensor, per_row: int) -> EightBitForm | None:
        is_for_8_bits = rows_of_tile(len(rows) * per_row, len(self)) >= _FEWEST_8_BIT_ROWS
        if rows.dtype.itemsize == 2 and is_for_8_bits and self.matrix.takes_8_bits():
            return EightBitForm(self.matrix.group, self.matrix.run)
        return None

    def gate_up(self, rows: torch.Tensor, formed: EightBitRows | None, out: torch.Tensor, tiles: ExpertTiles) -> None:
        """Compute the inputs of `down` from rows (T, E), and write them to `out` (P, F). formed: the rows in 8 bits, if
        they are already there."""
        self._launch(rows, formed, out, tiles, tiles.per_row, {"GATED": True})

    def down(self, rows: torch.Tensor, out: torch.Tensor, tiles: ExpertTiles) -> None:
        """Compute the experts' results from rows (P, F), and write them to `out` (P, E), each times its share."""
        self._launch(rows, None, out, tiles, 1, {"GATED": False})

    def suits_few(self, rows: torch.Tensor, down: "NarrowExperts", per_row: int) -> bool:
        return suits_few_experts(rows, self.matrix, down.matrix, per_row)

    def few_mlps(
        self, x: torch.Tensor | ScaledRows, logits: torch.Tensor, slots: torch.Tensor, down: "NarrowExperts",
        routing: Routing, *, eps: float, add_to: torch.Tensor | None, next_norm: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ScaledRows | None]:  # fmt: skip
        matrices = self.matrix, down.matrix, len(self)
        return few_expert_mlps(x, logits, slots, *matrices, routing, eps=eps, add_to=add_to, next_norm=next_norm)

    def _launch(
        self, rows: torch.Tensor, formed: EightBitRows | None, out: torch.Tensor, tiles: ExpertTiles, per_row: int,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        matrix, count = self.matrix, len(self)
        form = self.form_of_rows(rows, tiles.per_row // per_row)
        given: torch.Tensor | EightBitRows = rows
        if form is not None:
            given = form.of(rows) if formed is None else formed
        by_block = form is not None and self._has_blocks and tiles.rows <= _MOST_ROWS_OF_BLOCKS
        stages = 4 if rows.dtype.itemsize == 2 else 2
        options |= {"OUTPUTS": _BLOCK if by_block else 64, "STEP": matrix.run, "STAGES": stages, "num_warps": 4}
        values, words, x_scales = matrix.operands(given)
        outputs_at_once = options["OUTPUTS"] // 2 if options["GATED"] else options["OUTPUTS"]
        _narrow_experts[(triton.cdiv(out.shape[1], outputs_at_once), tiles.count)](
            values, x_scales, x_scales.shape[1], words, matrix.scales, tiles.pairs, tiles.ends, tiles.shares, out,
            rows.shape[1], out.shape[1], matrix.group, X=count,
            PADDED_X=triton.next_power_of_2(count), K=per_row, ROWS=tiles.rows, BITS=matrix.bits,
            ONE_GROUP=len(matrix.scales) == 1, BY_BLOCK=by_block, **options, **LAUNCH,
        )  # fmt: skip
