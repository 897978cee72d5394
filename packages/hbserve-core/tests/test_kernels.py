"""Each Triton kernel beside plain torch: on the GPU if there is one, else in Triton's interpreter."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hbserve_core_interpreted import KERNELS

from hbserve_core.cuda_runner.step_packer import TILE, SplitKV
from hbserve_core.engine.sequence import NOT_FINITE
from hbserve_core.model.rope import angle_table
from hbserve_core.model.rope_config import RopeConfig
from hbserve_core.torch_runner.attention import narrowed
from hbserve_testing.narrowing import present

pytest.importorskip("triton", reason="torch has Triton on Linux only")
pytestmark = KERNELS
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 8
LAYER, NUM_LAYERS = 1, 2
EPS = 1e-6
# query heads, key heads, head size: sizes of Qwen3, Qwen2 and Llama models, powers of two and others.
HEADS = [(4, 2, 64), (2, 1, 80), (9, 3, 96), (7, 1, 128), (2, 2, 256)]
# What hopper_attention.py is for. There is no interpreter for it.
OF_HOPPER = [(16, 8, 128), (8, 1, 128), (2, 2, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32]
# Float32 is not what this one is for: on a GPU its tiles would not fit.
SKINNY_DTYPES = DTYPES[1:] or DTYPES
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Paged:
    """Sequences with contexts in a pool full of NaN, and what attention over them must give."""

    def __init__(self, heads, dtype, contexts, num_new, with_norm=True, scores=None, narrow=False):
        """num_new: how many of each context's tokens this step brings; of decodes 1. scores: kernels' Scores. narrow:
        whether the pool is of 8-bit floats."""
        self.scores, self.narrow = scores, narrow
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.contexts, self.num_new = contexts, num_new
        generator = torch.Generator().manual_seed(sum(contexts))
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.raw = [torch.randn(context, width, generator=generator).to(dtype) for context in contexts]
        self.norm_weight = torch.rand(self.num_heads + self.num_kv_heads, self.head_dim, generator=generator).to(dtype)
        self.norm = (self.norm_weight.to(DEVICE), EPS) if with_norm else None
        angles = angle_table(RopeConfig("default", 10000.0), self.head_dim, max(contexts))
        self.angles = angles.to(DEVICE)
        self.expected = torch.cat(
            [self._expected(raw, angles)[-new:] for raw, new in zip(self.raw, num_new, strict=True)]
        )
        self._fill_pool(dtype, angles)
        self.qkv = torch.cat([raw[-new:] for raw, new in zip(self.raw, num_new, strict=True)]).to(DEVICE)

    def _rotated(self, raw, angles):
        """Float32 (T, N + K, D), normed and rotated as the decoder in plain torch does it."""
        count = self.num_heads + self.num_kv_heads
        heads = raw.float().view(len(raw), -1, self.head_dim)[:, :count]
        if self.norm is not None:
            heads = F.rms_norm(heads, (self.head_dim,), None, EPS) * self.norm_weight.float()
        half = self.head_dim // 2
        cos, sin = angles[: len(raw), None, :half], angles[: len(raw), None, half:]
        low, high = heads[..., :half], heads[..., half:]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def _stored(self, numbers, scale):
        """What a pool of 8-bit floats holds of keys or values, at last multiplied by their scale."""
        return narrowed(numbers, scale).float() * scale if self.narrow else numbers

    def _keys(self, raw, angles):
        return self._stored(self._rotated(raw, angles)[:, self.num_heads :], self.scores and self.scores.key_scale)

    def _values(self, raw):
        values = self._raw_values(raw)
        return self._stored(values, self.scores and self.scores.value_scale)

    def _raw_values(self, raw):
        return raw.float().view(len(raw), -1, self.head_dim)[:, self.num_heads + self.num_kv_heads :]

    def _expected(self, raw, angles):
        rotated = self._rotated(raw, angles).transpose(0, 1)
        values = self._values(raw).transpose(0, 1)
        if self.scores is not None:
            return self._expected_by(self.scores, rotated, values)
        out = F.scaled_dot_product_attention(
            rotated[: self.num_heads], rotated[self.num_heads :], values, is_causal=True, enable_gqa=True
        )
        return out.transpose(0, 1).flatten(1)

    def _expected_by(self, scores, rotated, values):
        group = self.num_heads // self.num_kv_heads
        keys = self._stored(rotated[self.num_heads :], scores.key_scale).repeat_interleave(group, 0)
        values = values.repeat_interleave(group, 0)
        found = rotated[: self.num_heads] @ keys.transpose(1, 2) * scores.scale
        found = scores.cap * (found / scores.cap).tanh() if scores.cap else found
        distance = torch.arange(found.shape[1])[:, None] - torch.arange(found.shape[2])
        hidden = (distance < 0) | (distance >= (scores.window or 1 << 30))
        return (found.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1).flatten(1)

    def _fill_pool(self, dtype, angles):
        blocks = [-(-context // BLOCK) for context in self.contexts]
        order = np.random.default_rng(0).permutation(sum(blocks))
        self.block_tables = np.split(order, np.cumsum(blocks)[:-1])
        shape = (sum(blocks), NUM_LAYERS, 2, BLOCK, self.num_kv_heads, self.head_dim)
        in_pool = torch.float8_e4m3fn if self.narrow else dtype
        pool = torch.full(shape, float("nan"), dtype=in_pool)
        for raw, new, table in zip(self.raw, self.num_new, self.block_tables, strict=True):
            keys, values = self._keys(raw, angles), self._values(raw)
            if self.narrow:
                keys, values = keys / self.scores.key_scale, values / self.scores.value_scale
            for position in range(len(raw) - new):
                block, place = table[position // BLOCK], position % BLOCK
                pool[block, LAYER, 0, place] = keys[position].to(in_pool)
                pool[block, LAYER, 1, place] = values[position].to(in_pool)
        self.pool = pool.to(DEVICE)
        width = max(blocks)
        self.width = torch.tensor([width], dtype=torch.int32, device=DEVICE)
        self.tables = _int32([[*table, *[0] * (width - len(table))] for table in self.block_tables]).flatten()

    def check(self, out, dtype):
        assert torch.isfinite(out).all()
        error = (out.float().cpu() - self.expected).norm() / self.expected.norm()
        assert error < TOLERANCE[dtype]
        self._check_new_tokens(dtype)

    def _check_new_tokens(self, dtype):
        """The step's keys and values are in the pool, and nothing else has become a number."""
        angles = self.angles.cpu()
        for raw, table in zip(self.raw, self.block_tables, strict=True):
            blocks = [self.pool[block, LAYER].float().cpu() for block in table]
            stored = torch.stack(blocks).transpose(0, 1).flatten(1, 2)[:, : len(raw)]
            if self.narrow:
                stored *= torch.tensor([self.scores.key_scale, self.scores.value_scale])[:, None, None, None]
            wanted = torch.stack((self._keys(raw, angles), self._values(raw)))
            # Of 8-bit floats, one that is close to the middle between two may become either.
            some = (0.005 if dtype == torch.float32 else 0.1) if self.narrow else 0.0
            off = (stored - wanted).abs() > TOLERANCE[dtype] * (1 + wanted.abs())
            assert off.float().mean() <= some
            torch.testing.assert_close(stored[off], wanted[off], rtol=0.15, atol=0.01)
        written = sum(self.contexts) * 2 * self.num_kv_heads * self.head_dim
        assert int(torch.isfinite(self.pool.float()).sum()) == written


def _int32(rows):
    return torch.tensor(np.array(rows), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_attention_over_contexts_of_one_and_of_several_pieces(heads, dtype):
    from hbserve_core.cuda_runner.kernels.decode_attention import DecodeWorkspace, decode_attention

    contexts = [1, TILE + 5, 3 * TILE + 1, BLOCK, 2 * TILE]
    paged = Paged(heads, dtype, contexts, [1] * len(contexts))
    cut = SplitKV(paged.num_kv_heads, 2 * paged.num_kv_heads).cut(np.array(contexts, dtype=np.int32))
    assert cut.shape[1] > len(contexts)
    # Of pieces that are none only the row counts. A place just below 2^31 would wrap to a negative one.
    none = np.full((6, 2), 2**31 - 3)
    none[0] = -1
    pieces = _int32(np.concatenate((cut, none), axis=1))
    workspace = DecodeWorkspace(len(contexts), pieces.shape[1], heads, DEVICE)
    out = torch.full((len(contexts), heads[0] * heads[2]), float("nan"), dtype=dtype, device=DEVICE)
    decode_attention(
        paged.qkv, out, paged.pool, LAYER, paged.angles, paged.norm, paged.tables, paged.width,
        pieces, workspace,
    )  # fmt: skip
    paged.check(out, dtype)
    assert not workspace.arrived.any()


# A window that ends within a tile, one shorter than a row's number of parts, and scores that a cap changes.
# The last ones have scales of 8-bit keys and values.
SCORES = [(0.2, 70, 0.0), (0.2, 3, 2.0), (0.3, 0, 2.0), (0.3, 70, 0.0, 0.7, 0.02)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_decode_attention_sees_its_window_by_capped_scores(scores, dtype):
    from hbserve_core.cuda_runner.kernels.attention_parts import Scores

    contexts = [1, 6 * TILE + 1, 2 * TILE]
    paged = Paged((4, 2, 16), dtype, contexts, [1] * len(contexts), scores=Scores(*scores), narrow=len(scores) > 3)
    paged.check(decode(paged, dtype), dtype)


def test_queries_beyond_float16_see_8_bit_keys_as_others_do():
    from hbserve_core.cuda_runner.kernels.attention_parts import Scores

    scores, many, dtype = Scores(0.2, key_scale=0.7, value_scale=0.02), 2.0**20, torch.bfloat16
    paged = Paged((4, 2, 16), dtype, [6 * TILE + 1, 2 * TILE], [1, 1], with_norm=False, scores=scores, narrow=True)
    expected = decode(paged, dtype)
    paged.qkv[:, : 4 * 16] *= many
    paged.scores = scores._replace(scale=scores.scale / many)
    assert torch.equal(decode(paged, dtype), expected)


def decode(paged, dtype):
    """(R, N * D): what the last token of each context gets, by pieces of which there are more than contexts."""
    from hbserve_core.cuda_runner.kernels.decode_attention import DecodeWorkspace, decode_attention

    contexts, heads = paged.contexts, (paged.num_heads, paged.num_kv_heads, paged.head_dim)
    pieces = _int32(SplitKV(heads[1], 8 * heads[1]).cut(np.array(contexts, dtype=np.int32)))
    assert pieces.shape[1] > len(contexts) + 3
    workspace = DecodeWorkspace(len(contexts), pieces.shape[1], heads, DEVICE)
    out = torch.full((len(contexts), heads[0] * heads[2]), float("nan"), dtype=dtype, device=DEVICE)
    decode_attention(
        paged.qkv, out, paged.pool, LAYER, paged.angles, paged.norm, paged.tables, paged.width,
        pieces, workspace, scores=paged.scores,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_prefill_attention_sees_its_window_by_capped_scores(scores, dtype):
    from hbserve_core.cuda_runner.kernels.attention_parts import Scores

    given = {"scores": Scores(*scores), "narrow": len(scores) > 3}
    paged = Paged((4, 2, 16), dtype, [150, 100, 2], [150, 9, 2], **given)
    paged.check(prefill(paged, dtype)[:-3], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill_attention_over_new_tokens_and_over_paged_context(heads, dtype):
    contexts, num_new = [70, 45, 2], [70, 5, 2]
    paged = Paged(heads, dtype, contexts, num_new, with_norm=heads[2] != 64)
    paged.check(prefill(paged, dtype)[:-3], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "block"), [*zip(OF_HOPPER, [16, 8, 256], strict=True)], ids=str)
def test_prefill_attention_of_hopper_over_several_tiles_for_each_processor(heads, dtype, block, monkeypatch):
    from hbserve_core.cuda_runner.kernels.hopper import IS_HOPPER
    from hbserve_core.cuda_runner.kernels.hopper_attention import suits_hopper

    if not IS_HOPPER:
        pytest.skip("no Hopper GPU")
    monkeypatch.setitem(globals(), "BLOCK", block)
    contexts, num_new = [1500, 45, 2, 700, 128, 129], [1500, 5, 2, 130, 128, 129]
    paged = Paged(heads, dtype, contexts, num_new, with_norm=heads[1] > 1)
    assert suits_hopper(paged.qkv, paged.pool, None)
    paged.check(prefill(paged, dtype)[:-3], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(2500, 1024, 3072), (129, 200, 72)], ids=str)
def test_gates_are_applied_in_the_product_on_hopper(shape, gelu, dtype):
    from hbserve_core.cuda_runner.kernels.hopper import IS_HOPPER
    from hbserve_core.cuda_runner.kernels.hopper_gated import hopper_gated

    if not IS_HOPPER:
        pytest.skip("no Hopper GPU")
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = (torch.randn(2 * outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    expected = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    found = hopper_gated(x.to(DEVICE), weight.to(DEVICE), gelu).float().cpu()
    assert (found - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads", [*HEADS, *(pytest.param(heads, marks=pytest.mark.gpu) for heads in OF_HOPPER)], ids=str
)
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_sequence_whose_numbers_are_none_changes_no_other_of_its_step(heads, dtype, broken):
    """Its rows lie next to theirs, and tiles reach into them."""
    # Known elsewhere: SGLang #33187, #28829.
    # Those of Hopper's kernel are longer: short steps are not for it.
    contexts, num_new = ([540, 35, 9], [540, 5, 9]) if heads in OF_HOPPER else ([40, 35, 9], [40, 5, 9])
    paged = Paged(heads, dtype, contexts, num_new)
    rows = torch.arange(sum(num_new), device=DEVICE)
    first = sum(num_new[:broken])
    is_broken = (rows >= first) & (rows < first + num_new[broken])
    paged.qkv[is_broken] = torch.tensor([float("nan"), float("inf")], dtype=dtype, device=DEVICE)[
        rows[is_broken] % 2, None
    ]
    out = prefill(paged, dtype)[:-3]
    sound = ~is_broken
    assert torch.isfinite(out[sound]).all()
    error = (out[sound].float().cpu() - paged.expected[sound.cpu()]).norm() / paged.expected[sound.cpu()].norm()
    assert error < TOLERANCE[dtype]


def test_programs_that_share_a_tile_of_new_tokens_give_what_one_gives(monkeypatch):
    from hbserve_core.cuda_runner.kernels import prefill_attention

    dtype = DTYPES[-1]
    paged = Paged((4, 2, 32), dtype, [70, 45, 2], [70, 5, 2])
    shared = prefill(paged, dtype)[:-3]
    paged.check(shared, dtype)
    for parts in ({}, {128: 2}):
        monkeypatch.setattr(prefill_attention, "_PARTS", parts)
        torch.testing.assert_close(shared, prefill(paged, dtype)[:-3], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("num_rows", "rows", "group", "expected"),
    [
        (128, 128, 2, (16, 8)),
        (128, 64, 2, (16, 4)),
        (129, 128, 4, (64, 2)),
        (512, 128, 4, (128, 1)),
        (64, 128, 3, (128, 1)),
        (64, 128, 128, (128, 1)),
    ],
)  # 42 tokens are not eight times 5, and tensor cores take 16 rows
def test_as_many_programs_share_a_tile_as_its_new_tokens_allow(num_rows, rows, group, expected):
    from hbserve_core.cuda_runner.kernels.prefill_attention import _parts_of_tile

    assert _parts_of_tile(num_rows, rows, group) == expected


def prefill(paged, dtype):
    """What our kernels give for its new tokens, and for three rows of padding after them."""
    from hbserve_core.cuda_runner.kernels.prefill_attention import new_tokens_per_tile, prefill_attention, store_kv

    contexts, num_new, heads = paged.contexts, paged.num_new, (paged.num_heads, paged.num_kv_heads, paged.head_dim)
    firsts = [sum(num_new[:i]) for i in range(len(num_new))]
    tile = new_tokens_per_tile(dtype, heads)
    tiles = [(i, begin) for i, new in enumerate(num_new) for begin in range(0, new, tile)] + [(-1, 0)]
    slots = [
        table[position // BLOCK] * BLOCK + position % BLOCK
        for table, context, new in zip(paged.block_tables, contexts, num_new, strict=True)
        for position in range(context - new, context)
    ]
    positions = [p for context, new in zip(contexts, num_new, strict=True) for p in range(context - new, context)]
    # Three rows of padding, whose numbers are none.
    padding = torch.full((3, paged.qkv.shape[1]), float("nan"), dtype=dtype, device=DEVICE)
    qkv = torch.cat((paged.qkv, padding))
    out = torch.full((len(qkv), heads[0] * heads[2]), float("nan"), dtype=dtype, device=DEVICE)
    store_kv(
        qkv, _int32([*positions, 0, 0, 0]), _int32([*slots, -1, -1, -1]), paged.angles, paged.norm, paged.pool, LAYER,
        scores=paged.scores,
    )  # fmt: skip
    prefill_attention(
        qkv, out, paged.pool, LAYER, paged.angles, paged.norm, paged.tables, paged.width, _int32(tiles).T.contiguous(),
        _int32([firsts, num_new, contexts]), scores=paged.scores,
    )  # fmt: skip
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [192, 256])
def test_keys_that_two_warps_share_are_rotated_from_what_was_there(head_dim):
    """In place, where each warp reads what the other one writes: so often that they differ in speed now and then."""
    from hbserve_core.cuda_runner.kernels.prefill_attention import store_kv

    rows, num_heads, num_kv_heads = 1 << 14, 1, 8
    generator = torch.Generator(DEVICE).manual_seed(1)
    given = torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator, device=DEVICE)
    angles = angle_table(RopeConfig("default", 10000.0), head_dim, 64).to(DEVICE)
    positions = torch.arange(rows, dtype=torch.int32, device=DEVICE) % 64
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    pool = torch.zeros(rows // BLOCK, 1, 2, BLOCK, num_kv_heads, head_dim, device=DEVICE)
    cos, sin = angles[positions.long()][:, None, :].chunk(2, dim=-1)
    keys = slice(num_heads * head_dim, (num_heads + num_kv_heads) * head_dim)
    first, second = given[:, keys].view(rows, num_kv_heads, head_dim).chunk(2, dim=-1)
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(1)
    for _ in range(100):
        qkv = given.clone()
        store_kv(qkv, positions, slots, angles, None, pool, 0)
        assert (qkv[:, keys] - expected).abs().max() < 1e-5


def test_pieces_are_of_similar_length_and_cover_each_context_once():
    random = np.random.default_rng(1)
    for num_kv_heads, processors in ((8, 132), (1, 132), (3, 1)):
        pieces = SplitKV(num_kv_heads, processors)
        for rows in (1, 3, 16, 17, 64, 66, 67, 256):
            contexts = random.integers(1, 5000, rows).astype(np.int32)
            row, part, parts, first, last, position = pieces.cut(contexts)
            assert len(row) <= pieces.most(rows) <= pieces.most(rows + 1)
            assert (np.bincount(row) == parts[part == 0]).all()
            assert (part < parts).all()
            assert (position == contexts[row] - 1).all()
            assert (first % TILE == 0).all()
            # Parts follow each other, from the first token to the one before the new one.
            assert (first[part == 0] == 0).all()
            assert (first[part > 0] == last[:-1][part[1:] > 0]).all()
            assert (last[part == parts - 1] == contexts - 1).all()
            for each in range(rows):
                lengths = (last - first)[row == each][:-1]
                assert (lengths == lengths.max(initial=0)).all()


@pytest.mark.parametrize("rows", [1, 8, 16, 17, 40, 66, 67, 128, 256])
def test_no_piece_takes_much_longer_than_all_of_them_would_on_a_full_device(rows):
    """Three programs fit on a multiprocessor at once if they are few, otherwise four."""
    contexts = np.exp(np.random.default_rng(rows).normal(np.log(2000), 1, rows)).astype(np.int32) + 1
    row, _, _, first, last, _ = SplitKV(8, 132).cut(contexts)
    at_once = (3 if rows <= 16 else 4) * 132 / 8
    share = max(TILE, contexts.max() / 64, contexts.sum() / at_once)
    assert (last - first).max() <= 1.55 * share + TILE
    # Unless there are more rows than fit, few pieces have to wait for others to end.
    assert len(row) <= max(rows, at_once) * 1.5


@pytest.mark.parametrize("length", [200, 540, 5000])
def test_contexts_of_similar_length_are_cut_only_if_all_pieces_fit_at_once(length):
    pieces = SplitKV(8, 132)
    for rows in range(1, 200):
        contexts = np.linspace(length, length * 1.2, rows).astype(np.int32)
        assert pieces.cut(contexts).shape[1] <= max(rows, 4 * 132 // 8)
    assert pieces.cut(np.full(33, length, dtype=np.int32)).shape[1] == 66


def test_one_long_context_among_short_ones_is_cut_and_they_are_not():
    contexts = np.array([30000, *[200] * 100], dtype=np.int32)
    row, _, parts, *_ = SplitKV(8, 132).cut(contexts)
    assert parts[row == 0][0] > 10
    assert (parts[row != 0] == 1).all()


def _check_products(rows, inputs, outputs, dtype, multiply):
    """multiply(x, weight, bias, norm, **how): with norm and gate, with bias alone, and added to what is there."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, device=DEVICE) for shape in ((rows, inputs), (2 * outputs, inputs), (2 * outputs,))
    )
    before, norm = torch.randn(rows, 2 * outputs, device=DEVICE), torch.rand(inputs, device=DEVICE)
    x, weight, bias, before, norm = (each.to(dtype) for each in (x, weight, bias, before, norm))

    def check(found, expected):
        assert torch.isfinite(found).all()
        assert (found.float() - expected).norm() < TOLERANCE[dtype] * expected.norm()

    exact = [each.float() for each in (x, weight, bias, norm)]
    gate, up = F.linear(F.rms_norm(exact[0], (inputs,), exact[3], EPS), *exact[1:3]).chunk(2, dim=-1)
    check(multiply(x, weight, bias, norm=norm, gated=True), F.silu(gate) * up)
    check(multiply(x, weight, bias), F.linear(*exact[:3]))
    added = before.clone()
    assert multiply(x, weight, None, add_to=added) is added
    check(added, before.float() + F.linear(*exact[:2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 144, 40), (4, 72, 33), (1, 4200, 5), (2, 4200, 9)], ids=str)
def test_small_linear_with_norm_gate_bias_and_addition(shape, dtype):
    from hbserve_core.cuda_runner.kernels.few_rows_linear import small_linear

    def multiply(x, weight, bias, norm=None, **how):
        return small_linear(x, weight, bias, norm=None if norm is None else (norm, EPS), **how)

    _check_products(*shape, dtype, multiply)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", SKINNY_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "splits"),
    [((3, 576, 96), 1), ((16, 640, 33), 2), ((17, 512, 70), 4), ((64, 1048, 32), 2), ((100, 300, 70), 1)],
    ids=str,
)
def test_skinny_linear_with_gate_bias_and_addition_whatever_the_splits(shape, splits, dtype):
    from hbserve_core.cuda_runner.kernels.few_rows_linear import (
        TILE_OUTPUTS,
        SkinnyWorkspace,
        add_skinny_linear,
        skinny_linear,
    )
    from hbserve_core.cuda_runner.kernels.pointwise import rms_norm

    rows, _, outputs = shape
    workspace = SkinnyWorkspace(splits * -(-2 * outputs // TILE_OUTPUTS) * 2, 64, DEVICE)
    padded = max(16, 1 << (rows - 1).bit_length())

    tiling = {"padded_rows": padded, "splits": splits, "workspace": workspace}

    def multiply(x, weight, bias, norm=None, add_to=None, **how):
        if add_to is not None:
            assert add_skinny_linear(add_to, x, weight, bias, **tiling) is None
            return add_to
        return skinny_linear(x if norm is None else rms_norm(x, norm, EPS), weight, bias, **tiling, **how)

    _check_products(*shape, dtype, multiply)  # type: ignore[call-arg]
    assert not workspace.arrived.any()


@pytest.mark.parametrize("dtype", SKINNY_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 96, 136), (20, 300, 576)], ids=str)
def test_a_norm_between_two_skinny_products_is_half_of_each(shape, dtype):
    from hbserve_core.cuda_runner.kernels.few_rows_linear import SkinnyWorkspace, add_skinny_linear, skinny_linear

    rows, inputs, size = shape
    torch.manual_seed(0)
    tiling = {"padded_rows": max(16, 1 << (rows - 1).bit_length()), "splits": 2, "workspace": None}
    tiling["workspace"] = SkinnyWorkspace(64, tiling["padded_rows"], DEVICE)
    x, first, stream = torch.randn(rows, inputs), torch.randn(size, inputs), 5 * torch.randn(rows, size)
    second, norm = torch.randn(72, size), torch.rand(size)
    x, first, stream, second, norm = (each.to(dtype).to(DEVICE) for each in (x, first, stream, second, norm))
    expected = F.linear(x.float(), first.float()) + stream.float()
    scaled = present(add_skinny_linear(stream, x, first, next_norm=norm, **tiling))
    assert (stream.float() - expected).norm() < TOLERANCE[dtype] * expected.norm()
    found = skinny_linear(scaled, second, eps=EPS, **tiling)
    expected = F.linear(F.rms_norm(stream.float(), (size,), norm.float(), EPS), second.float())
    assert (found.float() - expected).norm() < TOLERANCE[dtype] * expected.norm()


def test_gate_mul_and_rms_norm():
    from hbserve_core.cuda_runner.kernels.pointwise import gate_mul, rms_norm

    torch.manual_seed(0)
    x, weight = torch.randn((5, 72), device=DEVICE), torch.randn(72, device=DEVICE)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(gate_mul(x), F.silu(gate) * up)
    torch.testing.assert_close(gate_mul(x, gelu=True), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (72,), weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "experts", "first"), [(1, 8, 0), (5, 8, 0), (40, 3, 0), (70, 5, 3)], ids=lambda each: str(each)
)
def test_each_row_goes_to_its_experts_and_those_of_other_ranks_and_padding_to_none(num_rows, experts, first, dtype):
    """Of 8 experts; more rows than one tile of an expert takes, and fewer than there are experts."""
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts

    torch.manual_seed(0)
    size, inner, k = 48, 24, 3
    rows, logits, gate_up, down = (
        torch.randn(*shape, device=DEVICE).to(dtype)
        for shape in ((num_rows, size), (num_rows, 8), (experts, 2 * inner, size), (experts, size, inner))
    )
    slots = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    slots[num_rows // 2 + 1 :: 3] = -1
    shares, chosen = logits.float().softmax(-1).topk(k, dim=-1)
    for renormalises in (True, False):
        before = torch.randn(num_rows, size, device=DEVICE).to(dtype)
        expected = before.float().clone()
        weights = shares / shares.sum(-1, keepdim=True) if renormalises else shares
        for row in (slots != -1).nonzero().flatten().tolist():
            for share, expert in zip(weights[row], (chosen[row] - first).tolist(), strict=True):
                if 0 <= expert < experts:
                    gate, up = (gate_up[expert].float() @ rows[row].float()).chunk(2)
                    expected[row] += share * (down[expert].float() @ (F.silu(gate) * up))
        routing = Routing(8, k, renormalises, first)
        added = combined(expert_parts(rows, logits, slots, gate_up, down, routing), before)
        assert added is before
        assert (added.float() - expected).norm() < TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "experts", "first", "size", "inner", "at_once"),
    [(1, 12, 0, 96, 40, 8192), (2, 5, 3, 96, 40, 64)],
    ids=["whole", "in steps, on a rank"],
)
def test_experts_of_few_rows_are_those_of_many(
    num_rows, experts, first, size, inner, at_once, renormalises, dtype, monkeypatch
):
    """Of 12 experts, of which this rank has some; of rows that are normed, and of such whose norm has begun. Of two,
    one is padding."""
    from hbserve_core.cuda_runner.kernels import few_experts
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts
    from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows

    for name in ("_GATE_BYTES", "_OUTPUT_BYTES"):
        monkeypatch.setattr(few_experts, name, at_once * dtype.itemsize)
    torch.manual_seed(num_rows)
    rows, logits, gate_up, down, before, norm = (
        torch.randn(shape, device=DEVICE).to(dtype)
        for shape in (
            (num_rows, size),
            (num_rows, 12),
            (experts, 2 * inner, size),
            (experts, size, inner),
            (num_rows, size),
            (size,),
        )
    )
    slots = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    slots[1:2] = -1
    routing = Routing(12, 3, renormalises, first)
    normed = F.rms_norm(rows.float(), (size,), norm.float(), EPS)
    expected = combined(expert_parts(normed, logits.float(), slots, gate_up.float(), down.float(), routing))
    squares = F.pad(rows.float().square().view(num_rows, 3, 32).sum(-1).t(), (0, 16 - num_rows)).contiguous()
    weights = logits, slots, gate_up, down, routing
    begun = ScaledRows(rows * norm, squares)
    added = few_experts.few_expert_mlps(begun, *weights, eps=EPS, add_to=before.clone())
    alone = few_experts.few_expert_mlps(normed.to(dtype), *weights, eps=0.0)
    for found, wanted in ((alone, expected), (added, expected + before.float())):
        assert (found.float() - wanted).norm() < TOLERANCE[dtype] * wanted.norm()


@pytest.mark.parametrize("at_once", [4096, 1], ids=["by experts", "by many programs"])
@pytest.mark.parametrize(
    ("num_rows", "experts", "first"), [(1, 8, 0), (90, 3, 0), (90, 1, 2), (300, 5, 3)], ids=lambda each: str(each)
)
def test_pairs_are_in_tiles_of_their_experts(num_rows, experts, first, at_once, monkeypatch):
    """Of 8 experts, of which this rank has some: each pair once, and none of other ranks' or of padding."""
    from hbserve_core.cuda_runner.kernels import experts as kernels

    monkeypatch.setattr(kernels, "_MOST_AT_ONCE", at_once)
    chosen = torch.stack(
        [torch.randperm(8, generator=torch.Generator().manual_seed(row))[:3] for row in range(num_rows)]
    )
    chosen[3::7] = -1
    tiles = kernels._assigned(chosen.int().to(DEVICE), torch.empty(num_rows, 3, device=DEVICE), first, experts)
    ends = [0, *tiles.ends[:experts].tolist()]
    assert ends[-1] <= tiles.count
    for place, (begin, end) in enumerate(pairwise(ends)):
        found = tiles.pairs[begin * tiles.rows : end * tiles.rows].tolist()
        expected = (chosen.flatten() == first + place).nonzero().flatten().tolist()
        assert end - begin == -(-len(expected) // tiles.rows)
        assert sorted(found[: len(expected)]) == expected
        assert set(found[len(expected) :]) <= {-1}


class Choices:
    """Rows of what sampling is told: temperature, seed halves, index, top_k, top_p."""

    def __init__(self, count):
        self.numbers = np.zeros((6, count), dtype=np.int32)
        self.numbers[1] = np.arange(count)
        self.floats = self.numbers.view(np.float32)
        self.floats[0], self.floats[5] = 1.0, 1.0

    def sample(self, logits):
        from hbserve_core.cuda_runner.kernels.sampling import sample

        rows = self.numbers.shape[1]
        sampled = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
        sample(logits.expand(rows, -1).contiguous().to(DEVICE), torch.from_numpy(self.numbers).to(DEVICE), sampled)
        return sampled.cpu()


LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 1.5, float("-inf"), 0.0, 2.0])


def test_greedy_takes_the_first_of_the_most_likely_tokens():
    choices = Choices(3)
    choices.floats[0] = 0.0
    assert choices.sample(LOGITS).tolist() == [0, 0, 0]


def test_drawn_tokens_come_as_often_as_the_softmax_says():
    choices = Choices(400)
    choices.floats[0] = 0.7
    counts = torch.bincount(choices.sample(LOGITS), minlength=8).float()
    expected = 400 * (LOGITS / 0.7).softmax(-1)
    assert counts[5] == 0
    likely = expected > 5
    # Chi-square with at most 7 degrees of freedom: above 24.3 once in a thousand; seeds are fixed.
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 24.3


@pytest.mark.parametrize(
    ("top_k", "top_p", "allowed"),
    [(1, 1.0, {0, 7}), (3, 1.0, {0, 7, 4}), (0, 0.6, {0, 7, 4}), (0, 1e-6, {0, 7}), (2, 0.99, {0, 7}), (8, 1.0, None)],
)
def test_top_k_and_top_p_keep_the_most_likely_tokens_and_those_as_likely_as_the_last(top_k, top_p, allowed):
    choices = Choices(25)
    choices.numbers[4], choices.floats[5] = top_k, top_p
    found = set(choices.sample(LOGITS).tolist())
    assert found == (allowed or found - {5})


def test_the_same_seed_and_index_give_the_same_token_in_any_row():
    choices = Choices(40)
    choices.numbers[1], choices.numbers[3] = 7, np.arange(40) % 4
    tokens = choices.sample(LOGITS).view(10, 4)
    assert (tokens == tokens[0]).all()
    assert len(set(tokens[0].tolist())) > 1


def test_embedding_takes_tokens_that_only_the_device_knows():
    from hbserve_core.cuda_runner.kernels.pointwise import embed

    table = torch.arange(20.0, device=DEVICE).view(10, 2)
    rows = embed(_int32([3, -1, 5]), _int32([-1, 1, -1]), _int32([8, 9]), table)
    assert rows.tolist() == [table[3].tolist(), table[9].tolist(), table[5].tolist()]


@pytest.mark.parametrize("count", [0, 1, 1024, 2500])
def test_host_copy_brings_numbers_to_the_device_and_back(count):
    from hbserve_core.cuda_runner.kernels.pointwise import host_copy

    pinned = DEVICE.type == "cuda"
    given = torch.arange(3000, dtype=torch.int32, pin_memory=pinned)
    there = torch.full((3000,), -1, dtype=torch.int32, device=DEVICE)
    back = torch.full((3000,), -1, dtype=torch.int32, pin_memory=pinned)
    host_copy(there[:count], given)
    host_copy(back[:count], there)
    if pinned:
        torch.cuda.synchronize()
    assert back[:count].tolist() == list(range(count))
    assert (back[count:] == -1).all()


@pytest.mark.parametrize("first_token", [0, 1, 2, 10, 151936])
def test_what_was_sampled_from_a_row_without_numbers_is_a_token_of_no_rank(first_token):
    from hbserve_core.cuda_runner.kernels.pointwise import embed

    table = torch.ones((10, 2), device=DEVICE)
    rows = embed(_int32([first_token, -1]), _int32([-1, 1]), _int32([8, NOT_FINITE]), table, first_token)
    assert rows.tolist() == [[1.0, 1.0], [0.0, 0.0]]
