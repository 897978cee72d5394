"""Products of a step's rows with weights on CUDA, each by the kernel that is fastest for its shape.

    rows      16-bit numbers                                                           float32
    1         small_linear for matrices below 2^23 numbers, and a small model's head   small_linear
    2         small_linear for those below 2^22 without a norm before them             small_linear
    4         small_linear for those of 2048 inputs or more                            cuBLAS
    … 64      skinny_linear, as for 3 and for all others above                         cuBLAS
    … 128     skinny_linear if there is a tile for every second multiprocessor         cuBLAS
    129 …     cuBLAS, as for all others above                                          cuBLAS

On Hopper, one product of 16-bit numbers computes gates and ups of many rows and applies the gates: hopper_gated.py.
Kernels other than cuBLAS's include norms, gates and additions, or do part of them, and start before the previous kernel
has ended. For narrower weights (narrow_linear.py) `skinny_linear` uses a kernel of theirs, and their `Linear` replaces
cuBLAS. benchmarks/cuda_products.py compares all other products; docs/performance-kernels.md has its results.

Shapes: M rows, I inputs, O outputs, E hidden_size.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch

from hbserve_core.cuda_runner.kernels.dependent_launch import num_processors
from hbserve_core.cuda_runner.kernels.experts import ExpertParts, Routing, combined, expert_parts
from hbserve_core.cuda_runner.kernels.few_rows_linear import (
    ScaledRows,
    SkinnyWorkspace,
    add_skinny_linear,
    num_tiles,
    skinny_linear,
    small_linear,
)
from hbserve_core.cuda_runner.kernels.hopper_gated import hopper_gated, suits_hopper_gated
from hbserve_core.cuda_runner.kernels.pointwise import gate_mul, rms_norm
from hbserve_core.model.layers import ExpertWeights, Linear, RmsNorm
from hbserve_core.model.rank_group import RankGroup

_MOST_SPLIT_ROWS = 64
_MOST_SKINNY_ROWS = {0: 128, 4: 128, 8: 64}
"""Largest number of rows of a skinny product, by bits of a narrow weight (0: any other weight). For more rows, 8-bit
floats are multiplied as they are."""
_SMALL_MATRIX = {1: 1 << 23, 2: 1 << 22, 4: 1 << 22}
"""Size of a matrix, in numbers, from which `small_linear` is not used, by number of rows. Alone it would be as fast for
larger matrices, but its many programs leave no room for the next kernel to start."""
_SMALL_INPUTS = {4: 2048}
"""Fewest inputs of a matrix for `small_linear`, by number of rows."""
_HEAD_OUTPUTS, _HEAD_INPUTS = 1 << 16, 2048
"""Bounds for `small_linear` with an LM head: from this many outputs on, the matrix is an LM head, and no kernel waits
to start after it. With more inputs than this, the stream's last addition was a skinny product, which leaves half of the
norm to the next product."""
_FEWEST_INPUTS = 512
"""Fewest inputs of one split: adding up the splits must not cost more than reading them in parallel gains. It is twice
as many if there is a tile for every third multiprocessor, because these read nearly as fast as all of them."""

_NARROW_PROGRAMS = {8: {16: 4, 32: 3, 64: 3}, 4: {16: 6, 32: 4, 64: 3}}
"""Programs per multiprocessor for a product with narrow weights, by bits and padded rows. A step of their loop reads
fewer bytes, so more steps must be in flight."""
_MOST_PROGRAMS = 6


Kind = Literal["plain", "normed", "gated"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Choice of how one product is computed."""

    kernel: Literal["small", "skinny", "cublas"]
    padded_rows: int = 0
    splits: int = 1
    """Number of parts into which the inputs are split, a power of two."""


def choose(
    rows: int, weight: tuple[int, int], itemsize: int, kind: Kind, num_processors: int, narrow_bits: int = 0
) -> Choice:
    """Choose the fastest way to multiply this many rows of numbers of `itemsize` bytes with a weight matrix (O, I) of
    the same.

    kind: "normed" if a norm comes before the product, "gated" if in addition half of the outputs are gates, otherwise
    "plain". narrow_bits: bits of the weight if it is narrower; then only `skinny`, or its replacement for cuBLAS, can
    read it.
    """
    outputs, inputs = weight
    if itemsize > 2:
        return Choice("small" if rows <= 2 and not narrow_bits else "cublas")
    if not narrow_bits and _is_small(rows, outputs, inputs, kind):
        return Choice("small")
    gated = kind == "gated"
    tiles = num_tiles(outputs // 2 if gated else outputs, gated)
    if rows > _MOST_SKINNY_ROWS[narrow_bits] or (rows > _MOST_SPLIT_ROWS and 2 * tiles < num_processors):
        return Choice("cublas")
    padded, splits = max(16, 1 << (rows - 1).bit_length()), 1
    if rows <= _MOST_SPLIT_ROWS:
        programs = num_processors * (_NARROW_PROGRAMS[narrow_bits][padded] if narrow_bits else 1)
        fewest = _FEWEST_INPUTS * (1 if narrow_bits or 3 * tiles < num_processors else 2)
        splits = max(1, min(programs // tiles, inputs // fewest))
    return Choice("skinny", padded, 1 << (splits.bit_length() - 1))


def _is_small(rows: int, outputs: int, inputs: int, kind: Kind) -> bool:
    is_small = outputs * inputs < _SMALL_MATRIX.get(rows, 0) and inputs >= _SMALL_INPUTS.get(rows, 0)
    if is_small and (rows == 1 or kind == "plain"):
        return True
    return rows == 1 and outputs >= _HEAD_OUTPUTS and inputs <= _HEAD_INPUTS


class RowForm(Protocol):
    """Form in which products with narrow weights read many rows: see kernels/eight_bit_rows.py. Two objects are equal
    if their forms are."""

    def of(self, x: torch.Tensor) -> Any:
        """Return rows (M, I) in this form."""

    def of_normed(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, parts: ExpertParts | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Return rows (M, E) normed by weights (E,), and the same in this form. parts: experts' output, which is first
        added to x in place."""


@dataclass(slots=True)
class ResidualStream:
    """Residual stream, to which every layer adds, with what is already known of the next norm."""

    rows: torch.Tensor
    """Rows of the stream, (M, E)."""
    scaled: ScaledRows | None = None
    """Rows as the last addition left them, if it has already begun the next norm."""
    normed: torch.Tensor | None = None
    """Result of the next norm, (M, E), if the last addition has already done all of it."""
    formed: tuple[RowForm, Any] | None = None
    """Form, and `normed` in it, if a product has asked for it, or will."""

    def normed_by(self, norm: RmsNorm | None) -> torch.Tensor:
        """Return the rows normed by this norm, which must be the next one."""
        return normed(self.rows, norm) if self.normed is None else self.normed

    def formed_by(self, norm: RmsNorm | None, form: RowForm) -> Any:
        """Return the normed rows in this form. They are then also available as `normed`."""
        if self.normed is None and norm is not None:
            self.normed, found = form.of_normed(self.rows, norm.weight, norm.eps)
            self.formed = form, found
        elif self.formed is None or self.formed[0] != form:
            self.formed = form, form.of(self.normed_by(norm))
        assert self.formed is not None
        return self.formed[1]

    def begins(self, next_norm: RmsNorm | None) -> torch.Tensor | None:
        """Return the weights (E,) of the next norm if the addition before it may begin the norm, otherwise None."""
        # Rows that are not yet divided by their rms could exceed the range of float16.
        return None if next_norm is None or self.rows.dtype == torch.float16 else next_norm.weight

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (M, E) in place."""
        self.changes()
        self.rows += rows

    def add_parts(self, parts: ExpertParts, norm: RmsNorm, form: RowForm) -> None:
        """Add the experts' output in place, and do all of the next norm, whose result will be read in this form."""
        self.changes()
        self.normed, found = form.of_normed(self.rows, norm.weight, norm.eps, parts)
        self.formed = form, found

    def changes(self) -> None:
        """Forget what has been computed of the next norm, because the rows change."""
        self.scaled = self.normed = self.formed = None

    def add_sum(self, partial: torch.Tensor, group: RankGroup, next_norm: RmsNorm | None) -> None:
        """Add the sum of every rank's `partial` (M, E) in place. next_norm: the norm that follows."""
        self.changes()
        self.normed = group.add_sum(self.rows, partial, _of_kernels(next_norm))

    def add_sum_of_parts(self, parts: ExpertParts, group: RankGroup, next_norm: RmsNorm | None) -> None:
        """Add the sum of all ranks' experts in place. next_norm: the norm that follows."""
        partial = torch.empty_like(self.rows)
        if group.takes_parts(partial):
            self.changes()
            self.normed = group.add_sum(self.rows, partial, _of_kernels(next_norm), parts=parts)
        else:
            self.add_sum(combined(parts, dtype=partial.dtype), group, next_norm)


class CudaProducts:
    """Products with the weights of one model, or of one rank's part of it, which wait for nothing."""

    def __init__(self, device: torch.device, gelu: bool = False) -> None:
        """gelu: whether gates go through gelu instead of silu."""
        self._gelu = gelu
        self._num_processors = num_processors(device)
        self._workspace = SkinnyWorkspace(_MOST_PROGRAMS * self._num_processors, _MOST_SPLIT_ROWS, device)

    def of_normed(self, stream: ResidualStream, norm: RmsNorm | None, linear: Linear) -> torch.Tensor:
        """Multiply the stream's rows, which are normed first; returns (M, O)."""
        choice = self._choose(stream.rows, linear, "normed")
        if choice.kernel == "small":
            return small_linear(stream.rows, linear.weight, linear.bias, norm=_of_kernels(norm))
        if choice.kernel == "skinny":
            return self._skinny(choice, stream.scaled or stream.normed_by(norm), norm, linear)
        return self._of_many(stream, norm, linear)

    def form_of_rows(self, rows: torch.Tensor, linear: Linear) -> RowForm | None:
        """Return the form in which normed rows (M, I) are multiplied, or None if they are multiplied as they are."""
        form: RowForm | None = linear.form_of_rows(rows)
        return form if self._choose(rows, linear, "normed").kernel == "cublas" else None

    def _of_many(self, stream: ResidualStream, norm: RmsNorm | None, linear: Linear) -> torch.Tensor:
        if form := self.form_of_rows(stream.rows, linear):
            result: torch.Tensor = cast("Any", linear).of_formed(stream.formed_by(norm, form), stream.rows)
            return result
        return linear(stream.normed_by(norm))

    def expert_parts(
        self,
        stream: ResidualStream,
        norm: RmsNorm | None,
        weights: ExpertWeights,
        slots: torch.Tensor,
        routing: Routing,
    ) -> ExpertParts:
        """Compute the experts' output for the stream's rows, which are normed first. Other arguments: see
        experts.py."""
        gate_up, formed = weights.gate_up, None
        if not isinstance(gate_up, torch.Tensor) and (form := gate_up.form_of_rows(stream.rows, routing.per_row)):
            formed = stream.formed_by(norm, form)
        rows = stream.normed_by(norm)
        logits = self.of(rows, weights.router)
        return expert_parts(rows, logits, slots, gate_up, weights.down, routing, formed=formed)

    def gated(self, stream: ResidualStream, norm: RmsNorm | None, linear: Linear) -> torch.Tensor:
        """Compute silu(gate) * up, or gelu(gate) * up, (M, O), from the stream's rows, which are normed first. The
        weight is (2 O, E), gates then ups."""
        choice = self._choose(stream.rows, linear, "gated")
        if choice.kernel == "small":
            return small_linear(
                stream.rows, linear.weight, linear.bias, norm=_of_kernels(norm), gated=True, gelu=self._gelu
            )
        if choice.kernel == "skinny":
            return self._skinny(choice, stream.scaled or stream.normed_by(norm), norm, linear, gated=True)
        if suits_hopper_gated(stream.rows, linear.weight, linear.bias):
            return hopper_gated(stream.normed_by(norm), linear.weight, self._gelu)
        return gate_mul(self._of_many(stream, norm, linear), self._gelu)

    def add_to(self, stream: ResidualStream, inputs: torch.Tensor, linear: Linear, next_norm: RmsNorm | None) -> None:
        """Add the product of rows (M, I) to the stream in place, rounded once. next_norm: the norm that follows."""
        choice = self._choose(inputs, linear, "plain")
        stream.changes()
        if choice.kernel == "small":
            small_linear(inputs, linear.weight, linear.bias, add_to=stream.rows)
        elif choice.kernel == "cublas":
            linear.add_to(stream.rows, inputs)
        else:
            stream.scaled = add_skinny_linear(
                stream.rows,
                inputs,
                linear.weight,
                linear.bias,
                padded_rows=choice.padded_rows,
                splits=choice.splits,
                workspace=self._workspace,
                next_norm=stream.begins(next_norm),
            )

    def add_sum_to(
        self, stream: ResidualStream, inputs: torch.Tensor, linear: Linear, group: RankGroup, next_norm: RmsNorm | None
    ) -> None:
        """Add the sum of all ranks' products of rows (M, I) to the stream in place, part by part if there are more rows
        than the group sums by kernels at once. next_norm: the norm that follows."""
        count = group.rows_at_once((len(inputs), len(linear.weight)), inputs.dtype)
        if count == len(inputs):
            stream.add_sum(self.of(inputs, linear, group), group, next_norm)
            return
        normed, norm = torch.empty_like(stream.rows), _of_kernels(next_norm)
        parts = [slice(first, first + count) for first in range(0, len(inputs), count)]
        found = [
            group.add_sum(stream.rows[part], self.of(inputs[part], linear, group), norm, normed[part]) for part in parts
        ]
        stream.changes()
        stream.normed = None if any(each is None for each in found) else normed

    def of(self, inputs: torch.Tensor, linear: Linear, group: RankGroup | None = None) -> torch.Tensor:
        """Multiply rows (M, I); returns (M, O). group: the group that will sum the result over its ranks."""
        choice = self._choose(inputs, linear, "plain")
        if choice.kernel == "small":
            return small_linear(inputs, linear.weight, linear.bias)
        if choice.kernel == "skinny":
            return self._skinny(choice, inputs, None, linear)
        out = None if group is None else group.partial((len(inputs), len(linear.weight)), inputs.dtype)
        if out is None:
            return linear(inputs)
        linear.into(out, inputs)
        return out

    def _choose(self, rows: torch.Tensor, linear: Linear, kind: Kind) -> Choice:
        outputs, inputs = linear.weight.shape
        itemsize = rows.dtype.itemsize
        return choose(len(rows), (outputs, inputs), itemsize, kind, self._num_processors, linear.narrow_bits)

    def _skinny(
        self,
        choice: Choice,
        inputs: torch.Tensor | ScaledRows,
        norm: RmsNorm | None,
        linear: Linear,
        gated: bool = False,
    ) -> torch.Tensor:
        return skinny_linear(
            inputs,
            linear.weight,
            linear.bias,
            padded_rows=choice.padded_rows,
            splits=choice.splits,
            workspace=self._workspace,
            eps=norm.eps if norm else 0.0,
            gated=gated,
            gelu=self._gelu,
        )


def normed(rows: torch.Tensor, norm: RmsNorm | None) -> torch.Tensor:
    return rows if norm is None else rms_norm(rows, norm.weight, norm.eps)


def _of_kernels(norm: RmsNorm | None) -> tuple[torch.Tensor, float] | None:
    return None if norm is None else (norm.weight, norm.eps)
