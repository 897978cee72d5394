"""Any temperature and any logits, on the CPU and by our kernels: a token that may be drawn, or NOT_FINITE, row by row.

The kernels run on the GPU if there is one, else in Triton's interpreter.
"""

from array import array
from collections import Counter

import numpy as np
import pytest
import torch
from hbserve_core_interpreted import KERNELS
from hypothesis import given
from hypothesis import strategies as st

from hbserve_core import InstanceConfig
from hbserve_core.cuda_runner.step_packer import SplitKV, StepPacker, StepView
from hbserve_core.engine.sequence import NOT_FINITE, ScheduledChunk, Sequence
from hbserve_core.torch_runner.sampler import Sampler
from hbserve_rpc import SamplingParams

pytestmark = KERNELS
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 50
NAN, INF = float("nan"), float("inf")
IDS = torch.arange(VOCABULARY)
# Changes of a row of logits, in place: those after which there is a token to sample, and those after which not.
FINITE = [
    lambda row: row,
    lambda row: row.masked_fill_(IDS % 3 > 0, -INF),
    lambda row: row.masked_fill_(IDS != 33, -INF),
    lambda row: row.fill_(2.5),
    lambda row: row.zero_(),
    lambda row: row.sign_().mul_(3.4e38),
    lambda row: row.sub_(1e38),
    lambda row: row[44:45].fill_(3.4e38),
    lambda row: row.mul_(1e-34),
]
BROKEN = [
    lambda row: row[:1].fill_(NAN),
    lambda row: row[-1:].fill_(NAN),
    lambda row: row.fill_(NAN),
    lambda row: row.fill_(-INF)[7:8].fill_(NAN),
    lambda row: row[20:21].fill_(INF),
    lambda row: row.fill_(INF),
    lambda row: row.fill_(-INF)[20:21].fill_(INF),
    lambda row: row.fill_(INF)[::2].fill_(NAN),
    lambda row: row.fill_(-INF),
]
TEMPERATURES = [0, 5e-324, 1e-45, 1e-38, 1e-30, 1e-5, 1.0, 100, 1e10, 1e30, 3.4e38, 1e39, 1.7e308, 2**63 - 1]
FILTERS = [
    (-1, 1.0), (1, 1.0), (3, 1.0), (VOCABULARY - 1, 0.9), (VOCABULARY, 0.5), (2**63 - 1, 1e-9), (0, 5e-324), (5, 1e-45),
    (-1, 1 - 1e-12),
]  # fmt: skip
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 1.5, -INF, 0.0])


def on_cpu(logits, params):
    return Sampler().sample(logits, [Sequence("r", [1] * 4, 4, each) for each in params])


def by_kernels(logits, params):
    """With what a packed step says of such requests."""
    pytest.importorskip("triton", reason="torch has Triton on Linux only")
    from hbserve_core.cuda_runner.kernels.sampling import sample

    count = len(params)
    packer = StepPacker(InstanceConfig(model_path="", cuda_graph_enabled=False), 4, SplitKV(1, 1), seed=0)
    sequences = [Sequence("r", [1] * 4, 4, each, block_table=array("i", [0])) for each in params]
    memory = np.zeros(32 * count + 64, dtype=np.int32)
    view = StepView(memory, packer.pack([ScheduledChunk(each, 4) for each in sequences], memory).shape)
    sampled = torch.full((count,), 12345, dtype=torch.int32, device=DEVICE)
    sample(logits.contiguous().to(DEVICE), torch.from_numpy(view.samples[1:].copy()).to(DEVICE), sampled)
    return sampled.cpu()


SAMPLERS = pytest.mark.parametrize("sample", [on_cpu, by_kernels])


@pytest.fixture
def hostile_rows(monkeypatch):
    """Logits (R, V), the parameters of as many requests, and (R,) whether there is a token to sample: every kind of row
    at every temperature, with top-k and top-p in turn, in random order."""

    def make(sample, first=0):
        """Where Triton's interpreter needs 0.1 s for a row, an eighth of them, from `first` on."""
        generator = torch.Generator().manual_seed(0)
        rows, params = [], list[SamplingParams]()
        for i, temperature in enumerate(TEMPERATURES):
            for j, change in enumerate([*FINITE, *BROKEN]):
                row = 4 * torch.randn(VOCABULARY, generator=generator)
                change(row)
                rows.append(row)
                top_k, top_p = FILTERS[(i + j) % len(FILTERS)]
                params.append(SamplingParams(temperature, top_k=top_k, top_p=top_p, seed=len(params)))
        is_finite = torch.arange(len(rows)) % (len(FINITE) + len(BROKEN)) < len(FINITE)
        order = torch.randperm(len(rows), generator=generator)
        if sample is by_kernels:
            pytest.importorskip("triton", reason="torch has Triton on Linux only")
            # Two parts, the last one not full.
            monkeypatch.setattr("hbserve_core.cuda_runner.kernels.sampling._PART", 32)
            order = order[first::8] if DEVICE.type == "cpu" else order
        return torch.stack(rows)[order], [params[i] for i in order], is_finite[order]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@SAMPLERS
def test_there_is_a_token_of_the_vocabulary_or_it_is_said_that_there_is_none(hostile_rows, sample, dtype):
    # Known elsewhere: vLLM #890, #1623, #2937, #22180.
    logits, params, is_finite = hostile_rows(sample, first=dtype.itemsize)
    logits = logits.to(dtype)
    # Float16 has no place for some of these numbers.
    is_finite &= logits.amax(-1).isfinite()
    tokens = sample(logits, params)
    assert tokens[~is_finite].eq(NOT_FINITE).all()
    assert tokens[is_finite].ge(0).all()
    assert tokens[is_finite].lt(VOCABULARY).all()
    for row, token, asked in zip(logits.float(), tokens.tolist(), params, strict=True):
        if token != NOT_FINITE:
            assert row[token] > -INF, "a token that must not be drawn"
            if asked.temperature < 1e-20 or asked.top_k == 1:
                assert row.max() - row[token] < 1e-18, f"not greedy: {asked}"
            if asked.top_k > 0:
                assert (row > row[token]).sum() < asked.top_k, f"not among the most likely: {asked}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@SAMPLERS
def test_a_row_without_numbers_changes_no_other(hostile_rows, sample, temperature):
    # Known elsewhere: SGLang #33187, #28829.
    logits, params, is_finite = hostile_rows(sample)
    for each in params:
        each.temperature = temperature
    sound = [each for each, finite in zip(params, is_finite.tolist(), strict=True) if finite]
    assert sample(logits, params)[is_finite].tolist() == sample(logits[is_finite], sound).tolist()


@given(
    row=st.lists(st.floats(width=32), min_size=1, max_size=20),
    temperature=st.floats(0, allow_infinity=False) | st.integers(0, 2**63 - 1),
    top_k=st.integers(-1, 25),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
)
def test_whatever_a_row_and_its_parameters_are_it_is_sampled_as_if_it_were_alone(row, temperature, top_k, top_p, seed):
    logits = torch.tensor([row, [0.0] * len(row)])
    params = [SamplingParams(temperature, top_k=top_k, top_p=top_p, seed=seed), SamplingParams(seed=seed)]
    token, other = on_cpu(logits, params).tolist()
    assert (token == NOT_FINITE) == (not logits[0].max().isfinite())
    assert token == NOT_FINITE or row[token] > -INF
    assert [token] == on_cpu(logits[:1], params[:1]).tolist()
    assert [other] == on_cpu(logits[1:], params[1:]).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1.0, 1e38])
@pytest.mark.parametrize("broken", [NAN, INF])
@SAMPLERS
def test_a_vocabulary_of_several_parts_is_looked_at_to_its_last_token(sample, broken, temperature):
    """Three parts for the kernels, whose last one reads four; the third is not full."""
    vocab_size = 2 * 4096 + 5
    logits = torch.zeros((6, vocab_size))
    logits[0, 4096] = logits[1, -1] = 30.0
    logits[2, 0] = logits[3, 4100] = logits[4, -1] = broken
    logits[5] = -INF if broken == INF else broken
    tokens = sample(logits, [SamplingParams(temperature, seed=i) for i in range(6)]).tolist()
    assert tokens[2:] == [NOT_FINITE] * 4
    if temperature <= 1:
        assert tokens[:2] == [4096, vocab_size - 1]
    else:
        assert all(0 <= token < vocab_size for token in tokens[:2])


@SAMPLERS
def test_a_huge_temperature_is_flat_and_a_tiny_one_greedy(sample):
    count = 300
    drawn = sample(LOGITS.expand(count, -1), [SamplingParams(1.7e308, seed=i) for i in range(count)])
    counts = Counter(drawn.tolist())
    assert counts[5] == 0
    # Each of six tokens gets 50; six standard deviations are 39.
    assert all(11 < counts[token] < 89 for token in (0, 1, 2, 3, 4, 6))
    for temperature in (1e-38, 1e-45, 5e-324):
        tokens = sample(LOGITS.expand(9, -1), [SamplingParams(temperature, seed=i) for i in range(9)])
        assert tokens.tolist() == [0] * 9


@SAMPLERS
def test_top_k_of_more_tokens_than_may_be_drawn_draws_among_those(sample):
    logits = torch.tensor([1.0, *[-INF] * 6, 2.0]).expand(40, -1)
    assert set(sample(logits, [SamplingParams(2.0, top_k=5, seed=i) for i in range(40)]).tolist()) == {0, 7}
