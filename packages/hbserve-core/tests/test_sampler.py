"""Sampling: supports of the filters, frequencies, and seeds that mean the same everywhere."""

from collections import Counter
from copy import copy
from typing import Any

import pytest
import torch

from hbserve_core.engine.sequence import Sequence
from hbserve_core.torch_runner.sampler import Sampler, seeded_uniform
from hbserve_rpc import SamplingParams

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0, float("-inf")]])
PROBABILITIES = LOGITS[0].softmax(-1)


def request(num_output_tokens=0, **params):
    return Sequence("r", [1] * (4 + num_output_tokens), 4, SamplingParams(**params))


def draw(count, logits=LOGITS, **params):
    """Tokens of `count` requests that differ by their seed only."""
    checked, sequences = SamplingParams(**params), []
    for seed in range(count):
        params_of_seed = copy(checked)  # to check each of them would take longer than to draw
        params_of_seed.seed = seed
        sequences.append(Sequence("r", [1] * 4, 4, params_of_seed))
    return Counter(Sampler().sample(logits.expand(count, -1), sequences).tolist())


def test_temperature_zero_takes_the_most_likely_and_of_equals_the_first():
    logits = torch.tensor([[1.0, 5.0, 5.0], [2.0, 1.0, 0.0]])
    assert Sampler().sample(logits, [request(temperature=0), request(temperature=0)]).tolist() == [1, 0]
    assert Sampler().sample(logits.bfloat16(), [request(temperature=0), request(temperature=0)]).tolist() == [1, 0]


def test_frequencies_follow_the_probabilities():
    counts = draw(20_000)
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert counts[token] / 20_000 == pytest.approx(probability, abs=0.015)


def test_temperature_sharpens_and_flattens():
    assert draw(2000, temperature=0.1)[1] > 1990
    assert draw(2000, temperature=100.0)[4] > 300


def test_a_token_of_no_probability_is_never_drawn():
    assert 5 not in draw(5000, temperature=1000.0)


@pytest.mark.parametrize(
    ("top_k", "support"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (6, {0, 1, 2, 3, 4}), (99, {0, 1, 2, 3, 4})]
)
def test_top_k_draws_among_exactly_the_k_most_likely(top_k, support):
    assert set(draw(3000, temperature=5.0, top_k=top_k)) == support


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_off_draws_among_all(top_k):
    assert set(draw(3000, temperature=5.0, top_k=top_k)) == {0, 1, 2, 3, 4}


def test_top_p_draws_among_exactly_the_fewest_that_reach_it():
    ordered = PROBABILITIES.sort(descending=True)
    for count in range(1, 5):
        for top_p in (float(ordered.values[:count].sum()) - 0.004, float(ordered.values[: count - 1].sum()) + 0.004):
            assert set(draw(4000, top_p=top_p)) == set(ordered.indices[:count].tolist()), f"top_p={top_p}"


def test_a_tiny_top_p_leaves_one_token():
    assert set(draw(500, top_p=1e-9)) == {1}


def test_top_p_over_many_equal_tokens_looks_beyond_the_first_few():
    flat = torch.zeros(1, 5000)
    flat[0, :10] = -100
    assert len(draw(3000, logits=flat, top_p=0.999)) > 1500


def test_top_p_applies_to_what_top_k_left():
    # Of the two most likely, the first has 73 %.
    assert set(draw(2000, top_k=2, top_p=0.7)) == {1}
    assert set(draw(2000, top_k=2, top_p=0.75)) == {1, 3}


def test_the_same_request_draws_the_same_token_in_any_batch_and_any_sampler():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 300, generator=generator)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 20},
        {"top_p": 0.8},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9},
    ]
    sequences = [request(num_output_tokens=i // 3, seed=i, **kinds[i % len(kinds)]) for i in range(40)]
    together = Sampler().sample(logits, sequences).tolist()
    alone = [Sampler().sample(logits[i : i + 1], [sequences[i]]).tolist()[0] for i in range(40)]
    backwards = Sampler().sample(logits.flip(0), sequences[::-1]).tolist()[::-1]
    assert together == alone == backwards


def test_the_draw_depends_on_seed_and_output_index_only():
    assert seeded_uniform(7, 3) == seeded_uniform(7, 3)
    drawn = {seeded_uniform(seed, index) for seed in range(50) for index in range(50)}
    assert len(drawn) == 2500
    assert all(0 <= value < 1 for value in drawn)
    longer_prompt = Sequence("other", [9] * 30, 29, SamplingParams(seed=5))
    assert (
        Sampler().sample(LOGITS, [longer_prompt]).tolist()
        == Sampler().sample(LOGITS, [request(num_output_tokens=1, seed=5)]).tolist()
    )


def test_a_seed_has_the_same_numbers_in_every_release():
    """Those of SplitMix64, twice: of the seed, and of what that gives plus the index."""
    numbers = [seeded_uniform(0, 0), seeded_uniform(0, 1), seeded_uniform(7, 3), seeded_uniform(2**63 - 1, 100)]
    assert numbers == [0.6524484863740322, 0.1663964394676608, 0.9579187413704255, 0.8094664486381236]


def test_uniform_numbers_of_neighbouring_seeds_and_indices_are_spread():
    for numbers in ([seeded_uniform(s, 0) for s in range(2000)], [seeded_uniform(0, i) for i in range(2000)]):
        tenths = Counter(int(10 * value) for value in numbers)
        assert all(140 < tenths[i] < 260 for i in range(10))


def test_requests_without_a_seed_differ():
    sampler = Sampler()
    flat = torch.zeros(1, 50_000)
    drawn = {tuple(sampler.sample(flat.expand(4, -1), [request() for _ in range(4)]).tolist()) for _ in range(3)}
    assert len(drawn) == 3
    assert all(len(set(tokens)) == 4 for tokens in drawn)


def test_no_rows_no_tokens():
    assert Sampler().sample(torch.empty(0, 300), []).tolist() == []
