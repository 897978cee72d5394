"""Weights that stay as narrow as they are stored, and products with them: our kernels in Triton's interpreter, or on a
card, beside torch with the same weights widened."""

import json
import shutil
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hbserve_core_interpreted import KERNELS, InterpretedRunner
from hbserve_core_quantised import change, quantised, write

from hbserve_core import Engine, InstanceConfig, InvalidInstanceConfig, make_runner
from hbserve_core.model.layers import ExpertWeights, Linear, RmsNorm
from hbserve_core.model.model_config import load_model_config
from hbserve_core.model.narrow_weight import (
    NarrowWeight,
    can_be_read_by_groups,
    fused,
    in_order,
    in_words,
    packed,
    step_of,
    unpacked,
)
from hbserve_core.model.shard import Shard
from hbserve_core.model.weights import load_weights
from hbserve_rpc import SamplingParams
from hbserve_testing.narrowing import present

pytest.importorskip("triton", reason="torch has Triton on Linux only")
pytestmark = KERNELS
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32]
HALVES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float16]
"""Of which rows are made 8-bit floats."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
OF_8_BIT_ROWS, OF_8_BIT_EXPERTS = 0.05, 0.06
"""Tolerance where the rows have 8 bits as well; of gates and ups, and of what comes of them, one after the other."""
EPS = 1e-6
ONE = 1 << 20
"""A group that no matrix here is larger than."""


def invented(outputs, inputs, narrow, generator, order=None):
    """narrow: "8 bits" or "4 bits", and inputs of a group."""
    kind, group = narrow
    group = min(group, inputs)
    shape = -(-inputs // group), outputs
    scales = torch.rand(shape, generator=generator) * 0.02 + 0.001
    if kind == "8 bits":
        numbers = torch.randn(outputs, inputs, generator=generator).mul(8).to(torch.float8_e4m3fn)
        weight = NarrowWeight(in_words(numbers, step_of(group)), scales, None, group, order)
    else:
        numbers = packed(torch.randint(0, 16, (outputs, inputs), generator=generator), step_of(group))
        zeros = torch.randint(0, 17, shape, generator=generator).to(torch.uint8)
        weight = NarrowWeight(numbers, scales.half(), zeros, group, order)
    return on_device(weight)


def on_device(weight):
    zeros, order = (each if each is None else each.to(DEVICE) for each in (weight.zeros, weight.input_order))
    return NarrowWeight(weight.values.to(DEVICE), weight.scales.to(DEVICE), zeros, weight.group, order)


def close(found, expected, dtype, of_8_bits=0.0):
    """of_8_bits: tolerance of such rows, or that of the type."""
    tolerance = of_8_bits or TOLERANCE[dtype]
    assert torch.isfinite(found).all()
    assert (found.float() - expected).norm() < tolerance * expected.norm()


SHAPES = [
    # rows, inputs, outputs of half of the matrix, splits
    (1, 256, 40, 1),
    (5, 384, 96, 2),
    (17, 256, 33, 2),
    (64, 128, 35, 1),
]
NARROW = [("8 bits", 128), ("8 bits", ONE), ("4 bits", 128), ("4 bits", 32), ("4 bits", 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "narrow"),
    [*zip(SHAPES, NARROW, strict=False), (SHAPES[2], NARROW[4]), (SHAPES[3], NARROW[2]), (SHAPES[1], NARROW[0])],
    ids=str,
)
def test_a_skinny_product_is_that_of_the_widened_weights(shape, narrow, dtype):
    """With bias; gated; added; and the half norm that follows."""
    check_skinny_products(shape, narrow, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow", [*NARROW[:3], ("4 bits", ONE)], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 128, 40), (2, 1280, 35), (8, 4224, 96)])
def test_a_product_of_few_rows_is_that_of_the_widened_weights(rows, inputs, outputs, narrow, dtype):
    """Of fewer runs of inputs than a program has warps, of a number that these cannot share, and of several rounds."""
    check_skinny_products((rows, inputs, outputs, 1), narrow, dtype)


def check_skinny_products(shape, narrow, dtype):
    from hbserve_core.cuda_runner.kernels.few_rows_linear import SkinnyWorkspace, add_skinny_linear, skinny_linear
    from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix

    rows, inputs, outputs, splits = shape
    generator = torch.Generator().manual_seed(rows)
    order = torch.randperm(inputs, generator=generator) if narrow == ("4 bits", 64) else None
    weight = invented(2 * outputs, inputs, narrow, generator, order)
    x, bias, before, norm = (
        torch.randn(size, generator=generator).to(dtype).to(DEVICE)
        for size in ((rows, inputs), (2 * outputs,), (rows, 2 * outputs), (2 * outputs,))
    )
    tiling = {"padded_rows": max(16, 1 << (rows - 1).bit_length()), "splits": splits}
    tiling["workspace"] = SkinnyWorkspace(splits * 64, 64, DEVICE)
    matrix, wide = NarrowMatrix(weight), weight.widened()

    close(skinny_linear(x, matrix, bias, **tiling), F.linear(x.float(), wide, bias.float()), dtype)
    gate, up = F.linear(x.float(), wide, bias.float()).chunk(2, -1)
    close(skinny_linear(x, matrix, bias, gated=True, **tiling), F.silu(gate) * up, dtype)
    added = before.clone()
    begun = present(add_skinny_linear(added, x, matrix, next_norm=norm, **tiling))
    close(added, before.float() + F.linear(x.float(), wide), dtype)
    close(begun.scaled, added.float() * norm.float(), dtype)
    close(begun.squares.sum(0)[:rows], added.float().square().sum(1), dtype)
    assert not tiling["workspace"].arrived.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_a_norm_that_has_begun_is_ended_in_the_product(narrow, dtype):
    from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows, SkinnyWorkspace, skinny_linear
    from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix

    generator = torch.Generator().manual_seed(0)
    weight = invented(70, 256, narrow, generator)
    x, norm = (torch.randn(size, generator=generator).to(dtype).to(DEVICE) for size in ((3, 256), (256,)))
    squares = F.pad(x.float().square().view(3, 4, 64).sum(-1).t(), (0, 13)).contiguous()
    found = skinny_linear(
        ScaledRows(x * norm, squares), NarrowMatrix(weight), padded_rows=16, splits=1,
        workspace=SkinnyWorkspace(1, 64, DEVICE), eps=EPS,
    )  # fmt: skip
    close(found, F.linear(F.rms_norm(x.float(), (256,), norm.float(), EPS), weight.widened()), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "narrow"),
    [(1, NARROW[1]), (130, NARROW[0]), (300, NARROW[0]), (130, NARROW[4]), (600, NARROW[4])],
    ids=str,
)
def test_any_number_of_rows_is_multiplied_and_added_to_what_is_there(rows, narrow, dtype):
    """In tiles, and by weights that are widened first; 8-bit floats by rows of the same, if these had 16 bits."""
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

    generator = torch.Generator().manual_seed(rows)
    inputs = 128 if narrow[0] == "4 bits" else 256
    order = torch.randperm(inputs, generator=generator) if narrow == ("4 bits", 64) else None
    weight = invented(37, inputs, narrow, generator, order)
    x, bias, before = (
        torch.randn(size, generator=generator).to(dtype).to(DEVICE) for size in ((rows, inputs), (37,), (rows, 37))
    )
    expected = F.linear(x.float(), weight.widened(), bias.float())
    linear, of_8_bits = NarrowLinear(weight, bias), 0.0
    if narrow[0] == "8 bits" and dtype != torch.float32:
        of_8_bits = OF_8_BIT_ROWS
    close(linear(x), expected, dtype, of_8_bits)
    added = before.clone()
    linear.add_to(added, x)
    close(added, before.float() + expected, dtype, of_8_bits)
    close(NarrowLinear(weight)(x), expected - bias.float(), dtype, of_8_bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [128, ONE], ids=["groups", "one group"])
@pytest.mark.parametrize(("rows", "inputs"), [(3, 384), (18, 256)])
def test_rows_in_8_bits_keep_what_8_bits_can(rows, inputs, group, dtype):
    """With scales of their own, whatever their size; rows of zeros stay so, and what is no number stays none."""
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, inputs, generator=generator) * torch.logspace(-3, 4, rows)[:, None]).to(dtype).to(DEVICE)
    x[0] = 0
    x[1, 5] = float("nan")
    wide, found = kept_by_8_bits(x, min(group, inputs))
    assert not wide[0].any()
    assert wide[1].isnan().nonzero().tolist() == [[5]]
    assert (wide[2:] - x[2:].float()).norm(dim=1).lt(0.04 * x[2:].float().norm(dim=1)).all()
    assert found.values[2:rows].float().abs().amax(1).eq(448).all()


def kept_by_8_bits(x, group):
    """In the order of x, and as kernels have it."""
    from hbserve_core.cuda_runner.kernels.eight_bit_rows import eight_bit_rows

    found = eight_bit_rows(x, group, step_of(group))
    values = in_order(found.values.view(torch.int16), step_of(group))
    places = torch.arange(x.shape[1], device=DEVICE) // group
    return (values.float() * found.scales.t()[:, places])[: len(x)], found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs", "group"), [(66, 256, 37, 128), (5, 96, 130, ONE)])
def test_a_product_of_8_bit_rows_is_that_of_what_they_keep(rows, inputs, outputs, group, dtype):
    from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix, eight_bit_linear

    generator = torch.Generator().manual_seed(rows)
    weight = invented(outputs, inputs, ("8 bits", group), generator)
    x, bias, before = (
        torch.randn(size, generator=generator).to(dtype).to(DEVICE)
        for size in ((rows, inputs), (outputs,), (rows, outputs))
    )
    expected = kept_by_8_bits(x, weight.group)[0] @ weight.widened().t()
    # A card's tensor cores add products of 8-bit floats with fewer bits than float32 has.
    of_sums = max(TOLERANCE[dtype], 3e-4)
    out = torch.empty_like(before)
    eight_bit_linear(x, NarrowMatrix(weight), bias, out, adds=False)
    close(out, expected + bias.float(), dtype, of_sums)
    added = before.clone()
    eight_bit_linear(x, NarrowMatrix(weight), None, added, adds=True)
    close(added, expected + before.float(), dtype, of_sums)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [65, 256])
@pytest.mark.parametrize(
    ("scales", "inputs", "is_known"), [("by block", 512, True), ("by block", 256, False), ("by row", 256, True)]
)
def test_cublas_multiplies_8_bit_rows_where_it_knows_the_scales(scales, inputs, is_known, rows):
    """Of blocks, where their number is one that it wants as it is."""
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper's cuBLAS is used for that")
    generator = torch.Generator().manual_seed(rows)
    given = invented(384, inputs, ("8 bits", 128 if scales == "by block" else ONE), generator)
    blocks = given.scales if scales == "by row" else given.scales[:, ::128].repeat_interleave(128, 1).contiguous()
    weight = NarrowWeight(given.values, blocks, None, given.group)
    x, bias, before = (
        torch.randn(size, generator=generator).to(torch.bfloat16).to(DEVICE)
        for size in ((rows, inputs), (384,), (rows, 384))
    )
    linear = NarrowLinear(weight, bias)
    assert linear._is_for_cublas(x) == is_known
    expected = kept_by_8_bits(x, weight.group)[0] @ weight.widened().t() + bias.float()
    close(linear(x), expected, torch.bfloat16)
    added = before.clone()
    linear.add_to(added, x)
    close(added, expected + before.float(), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "experts", "first", "narrow", "are_many"),
    [(2, 8, 0, NARROW[3], False), (40, 2, 0, NARROW[0], False), (35, 3, 3, NARROW[1], True)],
    ids=str,
)
def test_experts_with_narrow_weights_are_those_of_widened_ones(
    num_rows, experts, first, narrow, are_many, dtype, monkeypatch
):
    """Of 8 experts, of which this rank has some; more rows than one tile of an expert takes. are_many: pairs, whose
    tiles are large, and which many programs assign."""
    from hbserve_core.cuda_runner.kernels import experts as kernels
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

    if are_many:
        monkeypatch.setattr(kernels, "_CHUNK", 32)
        monkeypatch.setattr(kernels, "_MOST_AT_ONCE", 1)
        monkeypatch.setattr(kernels, "_MANY_PAIRS", 1)
    size, inner, generator = 256, 32, torch.Generator().manual_seed(num_rows)
    gate_up = invented(experts * 2 * inner, size, narrow, generator)
    down = invented(experts * size, inner, narrow, generator)
    rows = torch.randn(num_rows, size, generator=generator).to(dtype).to(DEVICE)
    logits = torch.randn(num_rows, 8, generator=generator).to(dtype).to(DEVICE)
    slots = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    routing = Routing(8, 2, True, first)
    into, back = (each.widened().view(experts, -1, each.shape[1]) for each in (gate_up, down))
    expected = combined(expert_parts(rows.float(), logits.float(), slots, into, back, routing), dtype=torch.float32)
    into, back = (NarrowLinear(each).of_experts(experts) for each in (gate_up, down))
    found = combined(expert_parts(rows, logits, slots, into, back, routing), dtype=dtype)
    close(found, expected, dtype, OF_8_BIT_EXPERTS if narrow[0] == "8 bits" and dtype != torch.float32 else 0.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("num_rows", "experts"), [(40, 3), (17, 2)])
def test_experts_with_one_scale_for_a_block_of_outputs_are_those_of_widened_ones(num_rows, experts, dtype):
    """Of rows in 8 bits; tiles of 64 and of 32 rows."""
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

    size, inner, generator = 256, 128, torch.Generator().manual_seed(num_rows)
    given = [
        invented(outputs, inputs, NARROW[0], generator)
        for outputs, inputs in ((experts * 2 * inner, size), (experts * size, inner), (experts * 2 * inner, size))
    ]
    blocks = [replace(each, scales=each.scales[:, ::128].repeat_interleave(128, 1).contiguous()) for each in given]
    into, back = (NarrowLinear(each).of_experts(experts) for each in blocks[:2])
    wide_into, wide_back = (each.widened().view(experts, -1, each.shape[1]) for each in blocks[:2])
    assert into._has_blocks
    assert not NarrowLinear(given[2]).of_experts(experts)._has_blocks
    rows, logits = (torch.randn(num_rows, n, generator=generator).to(dtype).to(DEVICE) for n in (size, experts))
    slots, routing = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE), Routing(experts, 2, True)
    found = combined(expert_parts(rows, logits, slots, into, back, routing), dtype=dtype)
    expected = combined(
        expert_parts(rows.float(), logits.float(), slots, wide_into, wide_back, routing), dtype=torch.float32
    )
    assert torch.isfinite(found).all()
    assert (found.float() - expected).norm() < OF_8_BIT_EXPERTS * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES if torch.cuda.is_available() else HALVES, ids=str)
@pytest.mark.parametrize("group", [128, ONE], ids=["groups", "one group"])
@pytest.mark.parametrize(("num_rows", "experts", "first"), [(70, 2, 1), (33, 8, 0)])
def test_norms_leave_rows_in_8_bits_for_the_products_behind_them(num_rows, experts, first, group, dtype):
    """As the norm alone, rows made 8 bits of it, and the sum of what experts have found would be; where products take
    rows as they are, nothing is left."""
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts
    from hbserve_core.cuda_runner.kernels.pointwise import rms_norm
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear
    from hbserve_core.cuda_runner.products import CudaProducts, ResidualStream

    size, inner, generator, products = 384, 128, torch.Generator().manual_seed(num_rows), CudaProducts(DEVICE)
    narrow = ("8 bits", group)
    into, back, qkv = (
        NarrowLinear(invented(outputs, inputs, narrow, generator))
        for outputs, inputs in ((experts * 2 * inner, size), (experts * size, inner), (96, size))
    )
    router = Linear(torch.randn(8, size, generator=generator).to(dtype).to(DEVICE))
    weights = ExpertWeights(router, into.of_experts(experts), back.of_experts(experts), first)
    rows = torch.randn(num_rows, size, generator=generator).to(dtype).to(DEVICE)
    norms = [RmsNorm(torch.rand(size, generator=generator).to(dtype).to(DEVICE), EPS) for _ in range(2)]
    slots, routing = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE), Routing(8, 2, True, first)

    normed = rms_norm(rows, norms[0].weight, EPS)
    parts = expert_parts(normed, router(normed), slots, weights.gate_up, weights.down, routing)
    expected = combined(parts, rows.clone())
    stream = ResidualStream(rows.clone())
    parts = products.expert_parts(stream, norms[0], weights, slots, routing)
    assert (stream.formed is None) == (dtype == torch.float32 or num_rows == 33)
    close(combined(parts, rows.clone()), expected, dtype)
    form = products.form_of_rows(rows, qkv)
    assert (form is None) == (dtype == torch.float32 or num_rows == 33)
    if form is not None:
        stream.add_parts(parts, norms[1], form)
        close(stream.rows, expected, dtype)
        close(stream.normed_by(norms[1]), rms_norm(expected, norms[1].weight, EPS), dtype)
        close(
            products.of_normed(stream, norms[1], qkv),
            qkv(rms_norm(expected, norms[1].weight, EPS)),
            dtype,
            OF_8_BIT_ROWS,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "experts", "first", "narrow", "renormalises"),
    [(1, 12, 0, NARROW[0], True), (2, 5, 3, NARROW[2], False), (1, 12, 0, NARROW[1], True)],
    ids=str,
)
def test_experts_of_few_rows_are_those_of_widened_ones(num_rows, experts, first, narrow, renormalises, dtype):
    """Of 12 experts, of which this rank has some; of rows whose norm has begun, with a norm behind. Of two, one is
    padding."""
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts
    from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

    size, inner, generator = 384, 128, torch.Generator().manual_seed(num_rows)
    gate_up = invented(experts * 2 * inner, size, narrow, generator)
    down = invented(experts * size, inner, narrow, generator)
    rows, logits, before, norm, next_norm = (
        torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
        for shape in ((num_rows, size), (num_rows, 12), (num_rows, size), (size,), (size,))
    )
    slots = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    slots[1:2] = -1
    routing = Routing(12, 6, renormalises, first)
    into, back = (each.widened().view(experts, -1, each.shape[1]) for each in (gate_up, down))
    normed = F.rms_norm(rows.float(), (size,), norm.float(), EPS)
    expected = combined(expert_parts(normed, logits.float(), slots, into, back, routing), before.float())
    into, back = (NarrowLinear(each).of_experts(experts) for each in (gate_up, down))
    assert into.suits_few(rows, back, routing.per_row)
    squares = F.pad(rows.float().square().view(num_rows, 6, 64).sum(-1).t(), (0, 16 - num_rows)).contiguous()
    found, begun = into.few_mlps(
        ScaledRows(rows * norm, squares), logits, slots, back, routing, eps=EPS, add_to=before.clone(),
        next_norm=next_norm,
    )  # fmt: skip
    close(found, expected, dtype)
    close(present(begun).scaled, found.float() * next_norm.float(), dtype)
    close(present(begun).squares.sum(0)[:num_rows], found.float().square().sum(1), dtype)
    alone, nothing = into.few_mlps(normed.to(dtype), logits, slots, back, routing, eps=0.0, add_to=None, next_norm=None)
    close(alone, expected - before.float(), dtype)
    assert nothing is None


@pytest.mark.parametrize("group", [32, 64, 96, 128, 256])
def test_4_bit_numbers_are_packed_by_parts_of_runs(group):
    numbers = torch.randint(0, 16, (3, 768), generator=torch.Generator().manual_seed(group))
    run = step_of(group)
    assert 768 % run == 0
    values = packed(numbers, run)
    parts = 4 if run >= 64 else 2
    word = torch.stack([numbers[:, part * run // parts] << 4 * part for part in range(parts)]).sum(0)
    assert torch.equal(values[:, 0], word.to(values.dtype))
    assert values.nbytes == numbers.numel() // 2
    assert torch.equal(unpacked(values, run).long(), numbers)


def test_words_of_8_bit_floats_are_of_halves_of_runs():
    values = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    words = in_words(values, 64)
    assert torch.equal(words[:, :2].contiguous().view(torch.float8_e4m3fn).float(), values[:, [0, 32, 1, 33]].float())
    assert torch.equal(in_order(words, 64).float(), values.float())


def test_groups_that_are_not_of_whole_steps_cannot_be_read():
    assert [can_be_read_by_groups(group) for group in (16, 24, 32, 96, 128, 200)] == [
        False, False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_projections_below_each_other_have_the_rows_of_all_in_any_order(narrow):
    generator = torch.Generator().manual_seed(1)
    parts = [invented(outputs, 128, narrow, generator) for outputs in (5, 3)]
    order = torch.randperm(8, generator=generator).to(DEVICE)
    whole = fused(parts)
    assert whole is not None
    expected = torch.cat([part.widened() for part in parts])
    assert torch.equal(whole.widened(), expected)
    assert torch.equal(whole.with_rows(order).widened(), expected[order])
    assert whole.nbytes == sum(part.nbytes for part in parts)


def test_projections_of_other_widths_groups_or_orders_are_not_fused():
    generator = torch.Generator().manual_seed(1)
    one = invented(4, 128, ("4 bits", 64), generator)
    order = torch.randperm(128, generator=generator)
    others = [None, invented(4, 128, ("8 bits", 128), generator), invented(4, 128, ("4 bits", 32), generator),
              invented(4, 128, ("4 bits", 64), generator, order)]  # fmt: skip
    assert [fused([one, other]) for other in others] == [None] * 4
    ordered = invented(4, 128, ("4 bits", 64), generator, order.flip(0))
    assert fused([others[3], ordered]) is None
    assert present(fused([ordered, ordered])).shape == (8, 128)


# ---- loading, and whole steps ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """One layer, whose parts for two ranks are of whole groups of 32."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised_folder(whole_folder, tmp_path_factory):
    """The same in some narrow format."""
    made = {}

    def make(kind):
        if kind not in made:
            where = tmp_path_factory.mktemp("narrow")
            if kind.startswith("fp8"):
                made[kind] = shutil.copytree(whole_folder, where / "model")
                block = {"fp8 by block": [32, 32], "fp8 by row": None, "fp8 by odd block": [24, 24]}[kind]
                quantised(made[kind], block, block is None)
            else:
                made[kind] = write(whole_folder, where, kind, 32)[0]
        return made[kind]

    return make


def loaded(folder, rank=0, size=1, make_narrow=None, dtype=torch.float32):
    config = load_model_config(folder)
    return load_weights(
        config, "safetensors", dtype, torch.device("cpu"), Shard(rank, size), make_narrow=make_narrow
    )  # fmt: skip


class Kept(Linear):
    """A product that nobody computes."""

    narrow_bits = 8

    def __init__(self, weight, bias=None):
        self.weight, self.bias = weight, bias

    def of_experts(self, count):
        return self.weight, count


KINDS = ["fp8 by block", "fp8 by row", "awq", "gptq", "gptq act-order", "gptq one group"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_narrow_is_what_is_widened_otherwise(quantised_folder, kind, caplog):
    """On one rank, and of two, where outputs or inputs are shared."""
    folder = quantised_folder(kind)
    sizes = [(0, 1), (1, 2)] if kind != "gptq act-order" else [(0, 1)]
    for rank, size in sizes:
        narrow = loaded(folder, rank, size, Kept)
        assert "16 bits or more" not in caplog.text
        for ours, theirs in zip(narrow.layers, loaded(folder, rank, size).layers, strict=True):
            for name in ("qkv", "output", "gate_up", "down"):
                weight, wide = getattr(ours, name).weight, getattr(theirs, name).weight
                assert isinstance(weight, NarrowWeight)
                assert weight.values.is_contiguous()
                assert weight.scales.is_contiguous()
                torch.testing.assert_close(weight.widened(), wide.to_dense() if wide.is_mkldnn else wide)
        caplog.clear()


def test_inputs_keep_their_bits_where_the_checkpoint_was_made_for_such(quantised_folder):
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

    by_row = quantised_folder("fp8 by row")  # of compressed-tensors, which say nothing of inputs
    assert not any(layer.qkv.weight.takes_8_bits() for layer in loaded(by_row, make_narrow=NarrowLinear).layers)
    group = {"weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8, "dynamic": True}}
    change(by_row, config_groups={"g": group})
    assert all(layer.qkv.weight.takes_8_bits() for layer in loaded(by_row, make_narrow=NarrowLinear).layers)
    change(by_row, config_groups={"g": group | {"input_activations": None}})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("are_whole", [False, True])
def test_experts_stay_narrow_as_well(model_folder, rank, are_whole):
    """Those of one of two ranks, or its part of each."""
    config = load_model_config(model_folder("qwen3-moe"))
    experts = replace(present(config.switches.experts), whole_on_ranks=are_whole, intermediate_size=64)
    config = replace(
        config, scale_block=(32, 32), intermediate_size=128, switches=replace(config.switches, experts=experts)
    )
    given = config, "dummy", torch.float32, torch.device("cpu"), Shard(rank, 2)
    some = [(each, name) for each in experts.layers for name in ("gate_up", "down")]
    narrow, wide = load_weights(*given, make_narrow=Kept).layers, load_weights(*given).layers
    assert some
    for layer, name in some:
        weight, count = getattr(present(narrow[layer].experts), name)
        expected = getattr(present(wide[layer].experts), name)
        assert count == len(expected) == (2 if are_whole else 4)
        assert torch.equal(weight.widened().view(expected.shape), expected)


@pytest.mark.parametrize(("kind", "most"), [("fp8 by block", 0.6), ("gptq", 0.36)])
def test_projections_take_fewer_bytes(quantised_folder, kind, most):
    """Of 16-bit ones. Groups are of 32 here, so scales take more than of 128."""
    taken = given = 0
    for layer in loaded(quantised_folder(kind), make_narrow=Kept, dtype=torch.bfloat16).layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            outputs, inputs = linear.weight.shape
            taken, given = taken + linear.weight.nbytes, given + 2 * outputs * inputs
    assert taken < most * given


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("fp8 by block", 4, r"tensor_parallel_size=4: .*proj\.weight: 32 inputs share a scale, .*widen_weights=true"),
        ("gptq", 4, r"tensor_parallel_size=4: .*proj\.weight: 32 inputs share a scale"),
        ("gptq act-order", 2, r"proj\.weight: inputs that share a scale are not next to each other \(act-order\)"),
    ],
)
def test_ranks_that_would_share_a_group_are_refused_by_name(quantised_folder, kind, size, message):
    for rank in range(size):
        with pytest.raises(InvalidInstanceConfig, match=message):
            loaded(quantised_folder(kind), rank, size, Kept)


def test_what_kernels_cannot_read_is_widened_and_said(quantised_folder, caplog):
    weights = loaded(quantised_folder("fp8 by odd block"), make_narrow=Kept)
    assert not any(layer.down.narrow_bits for layer in weights.layers)
    assert "weights are 8-bit floats; they are kept and multiplied in 16 bits or more" in caplog.text


@pytest.mark.usefixtures("fewer_programs")
@pytest.mark.parametrize("kind", ["fp8 by block", "gptq act-order"])
def test_tokens_of_narrow_weights_are_those_of_widened_ones(generate, quantised_folder, prompt, kind):
    """A prompt and a decode beside the plain runner, which tests of loading compare with transformers."""
    folder = quantised_folder(kind)
    settings: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "chunk_size": 16}
    runner = InterpretedRunner(folder, False, False, **settings)
    assert all(layer.qkv.narrow_bits for layer in runner.decoder._weights.layers)
    config = InstanceConfig(model_path=str(folder), device="cpu", block_size=8, num_blocks=16, **settings)
    engines = Engine(runner.config, runner), Engine(config, make_runner(config))
    found, expected = (generate(each, {"r": prompt(5)}, 2) for each in engines)
    assert found == expected


@pytest.mark.usefixtures("fewer_programs")
@pytest.mark.parametrize(
    ("sizes", "are_narrow"),
    [({"moe_intermediate_size": 40}, (True, False)), ({"hidden_size": 72, "moe_intermediate_size": 64}, (False, True))],
)
def test_experts_of_which_one_matrix_cannot_stay_narrow_give_the_same_tokens(
    generate, model_folder, tmp_path, prompt, sizes, are_narrow
):
    """Its inputs are no whole number of groups."""
    folder = shutil.copytree(model_folder("qwen3-moe"), tmp_path / "model")
    change(folder, quant_method="fp8", weight_block_size=[32, 32])
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | sizes))
    settings: dict[str, Any] = {
        "max_num_seqs": 2, "max_num_batched_tokens": 16, "chunk_size": 16, "load_format": "dummy", "num_blocks": 16,
    }  # fmt: skip
    runner = InterpretedRunner(folder, False, False, **settings)
    experts = present(runner.decoder._weights.layers[0].experts)
    assert tuple(not isinstance(each, torch.Tensor) for each in (experts.gate_up, experts.down)) == are_narrow
    config = InstanceConfig(model_path=str(folder), device="cpu", block_size=8, **settings)
    engines = Engine(runner.config, runner), Engine(config, make_runner(config))
    found, expected = (generate(each, {"r": prompt(5)}, 3) for each in engines)
    assert found == expected


@pytest.mark.usefixtures("fewer_programs")
def test_weights_are_widened_where_the_configuration_says_so(quantised_folder):
    runner = InterpretedRunner(quantised_folder("fp8 by block"), widen_weights=True)
    assert not any(layer.qkv.narrow_bits for layer in runner.decoder._weights.layers)


@pytest.mark.usefixtures("fewer_programs")
@pytest.mark.parametrize("keep_activations", [False, True])
def test_inputs_keep_their_bits_where_the_configuration_says_so(model_folder, tmp_path, keep_activations):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    change(folder, quant_method="fp8", weight_block_size=[1, 4096])
    runner = InterpretedRunner(folder, keep_activations=keep_activations, load_format="dummy")
    taken = {cast("Any", layer.qkv.weight).takes_8_bits() for layer in runner.decoder._weights.layers}
    assert taken == {not keep_activations}


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_card_tokens_are_those_of_widened_weights(quantised_folder, prompt, kind, graphs):
    prompts = {str(length): prompt(length) for length in (1, 7, 40, 90)}

    def tokens(**chosen):
        config = InstanceConfig(model_path=str(quantised_folder(kind)), device="cuda", dtype="float32", block_size=8,
                                num_blocks=128, cuda_graph_enabled=graphs, **chosen)  # fmt: skip
        engine = Engine(config, make_runner(config))
        for name, given in prompts.items():
            engine.add(name, given, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        found: dict[str, list[int]] = {name: [] for name in prompts}
        while engine.has_work():
            for output in engine.step():
                found[output.request_id] += output.token_ids
        return found

    assert tokens() == tokens(widen_weights=True)
