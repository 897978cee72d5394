"""Which kernel multiplies which shape: the table that was measured, without a GPU."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="torch has Triton on Linux only")

from hbserve_core.cuda_runner.kernels.few_rows_linear import TILE_OUTPUTS, _tiling, num_tiles
from hbserve_core.cuda_runner.products import Choice, CudaProducts, ResidualStream, choose
from hbserve_core.model.layers import Linear, RmsNorm
from hbserve_core.model.rank_group import RankGroup

PROCESSORS = 132
# hidden_size, intermediate_size, heads, key heads, head_dim
MODELS = {
    "SmolLM2-135M": (576, 1536, 9, 3, 64), "Qwen3-0.6B": (1024, 3072, 16, 8, 128), "Qwen3-4B": (2560, 9728, 32, 8, 128),
    "Qwen3-8B": (4096, 12288, 32, 8, 128), "Llama-3-8B": (4096, 14336, 32, 8, 128),
    "Qwen3-32B": (5120, 25600, 64, 8, 128),
}  # fmt: skip


def weights(model, ranks=1):
    """(O, I) and kind of each of a layer's products."""
    hidden, inner, heads, key_heads, head_dim = MODELS[model]
    heads, key_heads, inner = heads // ranks, max(1, key_heads // ranks), inner // ranks
    return {
        "qkv": ((heads + 2 * key_heads) * head_dim, hidden, "normed"), "output": (hidden, heads * head_dim, "plain"),
        "gate_up": (2 * inner, hidden, "gated"), "down": (hidden, inner, "plain"),
    }  # fmt: skip


def chosen(rows, weight, itemsize=2):
    outputs, inputs, kind = weight
    return choose(rows, (outputs, inputs), itemsize, kind, PROCESSORS)


@pytest.mark.parametrize("model", MODELS)
def test_few_rows_are_a_skinny_product_and_many_are_for_cublas(model):
    for weight in weights(model).values():
        for rows in range(5, 65):
            found = chosen(rows, weight)
            assert found.kernel == "skinny"
            assert found.padded_rows >= max(16, rows)
            assert found.padded_rows in (16, 32, 64)
        assert {chosen(rows, weight).kernel for rows in (129, 144, 256)} == {"cublas"}


def test_up_to_128_rows_are_a_skinny_product_where_the_tiles_are_many():
    kernels = {name: chosen(96, weight) for name, weight in weights("Qwen3-8B").items()}
    assert {name for name, choice in kernels.items() if choice.kernel == "skinny"} == {"qkv", "gate_up"}
    assert kernels["qkv"] == Choice("skinny", 128, 1)
    assert kernels["down"] == Choice("cublas")


@pytest.mark.parametrize(
    ("model", "rows", "small"),
    [
        ("Qwen3-0.6B", 1, {"qkv", "output", "gate_up", "down"}),
        ("Qwen3-0.6B", 2, {"output", "down"}),
        ("Qwen3-0.6B", 4, {"output", "down"}),
        ("SmolLM2-135M", 1, {"qkv", "output", "gate_up", "down"}),
        ("SmolLM2-135M", 2, {"output", "down"}),
        ("SmolLM2-135M", 4, set()),
        ("Qwen3-4B", 1, set()),
        ("Qwen3-8B", 1, set()),
        ("Qwen3-8B", 4, set()),
    ],
)
def test_very_few_rows_are_a_gemv_where_the_matrix_is_small(model, rows, small):
    kernels = {name: chosen(rows, weight).kernel for name, weight in weights(model).items()}
    assert {name for name, kernel in kernels.items() if kernel == "small"} == small
    assert set(kernels.values()) <= {"small", "skinny"}


def test_the_head_is_a_gemv_for_a_single_row_of_a_small_model():
    assert [chosen(rows, (151936, 1024, "normed")).kernel for rows in (1, 2, 4)] == ["small", "skinny", "skinny"]
    assert chosen(1, (151936, 4096, "normed")).kernel == "skinny"


def test_float32_is_multiplied_by_kernels_that_do_not_round_it():
    for rows in range(1, 257):
        kernels = {chosen(rows, weight, itemsize=4).kernel for weight in weights("Qwen3-8B").values()}
        assert kernels == ({"small"} if rows <= 2 else {"cublas"})


@pytest.mark.parametrize(
    ("model", "splits"),
    [
        ("Qwen3-0.6B", {"qkv": 1, "output": 4, "gate_up": 1, "down": 4}),
        ("Qwen3-8B", {"qkv": 1, "output": 2, "gate_up": 1, "down": 2}),
        ("Qwen3-32B", {"qkv": 1, "output": 1, "gate_up": 1, "down": 1}),
    ],
)
def test_inputs_are_split_where_there_are_too_few_tiles_for_the_processors(model, splits):
    assert {name: chosen(8, weight).splits for name, weight in weights(model).items()} == splits


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_split_product_fits_the_workspace(model, ranks):
    if MODELS[model][2] % ranks:
        ranks = 3
    for outputs, inputs, kind in weights(model, ranks).values():
        splits, gated = chosen(8, (outputs, inputs, kind)).splits, kind == "gated"
        assert splits == 1 or splits * num_tiles(outputs // 2 if gated else outputs, gated) <= PROCESSORS
        assert splits & (splits - 1) == 0
        assert inputs // splits >= min(512, inputs)


@pytest.mark.parametrize("padded_rows", [16, 32, 64, 128])
def test_two_programs_share_a_processor_where_one_each_would_leave_most_idle_in_the_end(padded_rows):
    def shared_bytes(programs):
        step, stages = _tiling(padded_rows, programs, PROCESSORS)
        return (TILE_OUTPUTS + padded_rows) * step * stages * 2

    gates_and_ups_of_two_ranks = num_tiles(6144, True)
    alone, together = shared_bytes(132), shared_bytes(gates_and_ups_of_two_ranks)
    assert {shared_bytes(programs) for programs in (133, 192, 264)} == {together}
    assert {shared_bytes(programs) for programs in (64, 265, 384)} == {alone}
    # Each program takes 1 KiB more than it asks for.
    assert together < alone <= 227 << 10
    assert 2 * (together + 1024) <= 228 << 10


class InParts(RankGroup):
    """Sums of so many rows at a time, over two ranks that have the same."""

    def __init__(self, count, norms):
        self._count, self._norms = count, norms
        self.places = []

    def rows_at_once(self, shape, dtype):
        return min(self._count, shape[0])

    def partial(self, shape, dtype):
        self.places.append(torch.empty(shape, dtype=dtype))
        return self.places[-1]

    def add_sum(self, rows, partial, norm=None, normed_to=None, parts=None):
        assert partial is self.places[-1], "a product is where the sum finds it"
        rows += 2 * partial
        if norm is None or not self._norms:
            return None
        result = F.rms_norm(rows, rows.shape[1:], *norm)
        return result if normed_to is None else normed_to.copy_(result)


@pytest.mark.parametrize("norms", [True, False], ids=["normed with the sum", "norm is left"])
@pytest.mark.parametrize(("count", "sizes"), [(11, [11]), (4, [4, 4, 3])], ids=["whole", "in parts"])
def test_sums_of_many_rows_are_computed_part_by_part(count, sizes, norms):
    generator = torch.Generator().manual_seed(0)
    inputs, weight, before, norm = (
        torch.randn(*shape, generator=generator) for shape in ((11, 8), (6, 8), (11, 6), (6,))
    )
    group, stream = InParts(count, norms), ResidualStream(before.clone())
    next_norm = RmsNorm(norm, 1e-6)
    CudaProducts(torch.device("cpu")).add_sum_to(stream, inputs, Linear(weight), group, next_norm)
    expected = before + 2 * inputs @ weight.t()
    torch.testing.assert_close(stream.rows, expected)
    torch.testing.assert_close(stream.normed_by(next_norm), F.rms_norm(expected, (6,), norm, 1e-6))
    assert (stream.normed is not None) == norms
    assert [len(place) for place in group.places] == sizes
