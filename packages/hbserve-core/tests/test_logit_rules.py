"""Rules that requests set for their logits give the tokens of transformers' processors, on both runners.

The runner of CUDA's steps runs its kernels in Triton's interpreter, pads its steps as graphs do, and launches each
before the tokens of the one before it are read.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hbserve_core_interpreted import SIZES, WHOLE_STEPS, WITHOUT_KERNELS, InterpretedRunner, make_runner
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
)

from hbserve_core import Engine, ModelRunner
from hbserve_core.engine.sequence import NOT_FINITE, UNREAD, Sequence
from hbserve_core.logits.rows import LogitsRow
from hbserve_core.logits.rules import LogitRules
from hbserve_core.logits.special_rows import SpecialRows
from hbserve_core.torch_runner.sampler import Sampler
from hbserve_rpc import InvalidRequest, SamplingParams

pytestmark = WHOLE_STEPS
CPU = torch.device("cpu")
MODEL, EOS = "qwen3", 2
NO_IDS: Any = None
"""For processors of transformers that do not look at them."""


class PresenceAndFrequency:
    """The formula that OpenAI's and vLLM's documents give, for tokens after a prompt of `num_prompt`."""

    def __init__(self, num_prompt, presence, frequency):
        self.given = num_prompt, presence, frequency

    def __call__(self, ids, scores):
        num_prompt, presence, frequency = self.given
        scores = scores.clone()
        for row, known in zip(scores, ids.tolist(), strict=True):
            for token, times in Counter(known[num_prompt:]).items():
                row[token] -= presence + frequency * times
        return scores


PENALTIES: dict[str, Any] = {"repetition_penalty": 1.7, "presence_penalty": 1.1, "frequency_penalty": 0.6}


def penalties(num_prompt):
    """vLLM's order."""
    return [RepetitionPenaltyLogitsProcessor(1.7), PresenceAndFrequency(num_prompt, 1.1, 0.6)]


def sequence_biases(biases):
    """Of single tokens."""
    return SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()])


@pytest.fixture(scope="module")
def oracle(reference_model):
    """Greedy tokens of transformers' model after its processors, up to an end of sequence."""

    def generate(prompt, count, processors, ends=(EOS,)):
        ids = list(prompt)
        with torch.inference_mode():
            while len(ids) < len(prompt) + count:
                known: Any = torch.tensor([ids])
                logits = reference_model(MODEL)(known).logits[:, -1]
                ids.append(int(LogitsProcessorList(processors)(known, logits).argmax()))
                if ids[-1] in ends:
                    break
        return ids[len(prompt) :]

    return generate


def run(runner, requests):
    """Tokens of requests (prompt, parameters) that are computed together."""
    engine = Engine(runner.config, runner)
    for name, (prompt, params) in enumerate(requests):
        engine.add(str(name), prompt, params)
    found: list[list[int]] = [[] for _ in requests]
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            found[int(output.request_id)] += output.token_ids
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return found


def greedy(max_tokens, **others):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def apply(logits, *params, output=()):
    """Logits (N, V) after the rules of N requests."""
    scores = torch.as_tensor(logits, dtype=torch.float32).clone()
    rows = [LogitsRow(i, Sequence(str(i), [4, 5, *output], 2, each)) for i, each in enumerate(params)]
    LogitRules([EOS], CPU).apply(scores, rows)
    return scores


def test_biases_are_transformers_sequence_biases():
    logits = torch.randn(2, 40)
    biases = [{3: 2.5, 7: -100.0}, {39: 100.0}]
    expected = [
        sequence_biases(each)(torch.zeros(1, 1), row[None])[0] for each, row in zip(biases, logits, strict=True)
    ]
    found = apply(logits, *(SamplingParams(logit_bias=each) for each in biases))
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("num_output", [0, 1, 2, 3])
def test_what_ends_a_request_is_ruled_out_while_transformers_rules_it_out(num_output):
    logits, output = torch.randn(2, 40), [9] * num_output
    known = torch.tensor([[4, 5, *output]])
    ends = [[EOS, 7], [7]]  # the second goes on after the end of the sequence
    expected = [
        MinNewTokensLengthLogitsProcessor(2, 2, each)(known, row[None])[0]
        for each, row in zip(ends, logits, strict=True)
    ]
    params = [SamplingParams(min_tokens=2, stop_token_ids=[7], ignore_eos=each) for each in (False, True)]
    assert torch.equal(apply(logits, *params, output=output), torch.stack(expected))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("min_p", [1e-9, 0.02, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps_after_the_temperature(temperature, min_p):
    logits = 3 * torch.randn(4, 300)
    warm = TemperatureLogitsWarper(temperature)(NO_IDS, logits)
    expected = MinPLogitsWarper(min_p)(NO_IDS, warm).isfinite()
    found = apply(logits, *[SamplingParams(temperature, min_p=min_p)] * 3, SamplingParams(temperature))
    assert torch.equal(found[:3].isfinite(), expected[:3])
    assert torch.equal(found[3], logits[3])


def test_min_p_means_the_biased_logits_and_a_greedy_request_none():
    logits = torch.tensor([[0.0, 5.0, 1.0, 0.0]])
    assert apply(logits, SamplingParams(min_p=0.5, logit_bias={2: 4.0})).isfinite().tolist() == [
        [False, True, True, False]
    ]
    assert torch.equal(apply(logits, SamplingParams(temperature=0, min_p=0.5)), logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 3},
        {"min_p": 0.9},
        PENALTIES,
        {"logit_bias": {EOS: -100.0}},
        {"min_tokens": 3, "min_p": 0.9, "logit_bias": {EOS: 100.0}, "temperature": 0},
    ],
)
def test_logits_that_are_not_finite_stay_so_under_every_rule(bad, params):
    logits = torch.zeros(1, 40)
    logits[0, EOS] = bad
    given = SamplingParams(**params)
    assert Sampler().sample(apply(logits, given), [Sequence("r", [4, 5], 2, given)]).tolist() == [NOT_FINITE]


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100},
        {"presence_penalty": -2},
        {"frequency_penalty": 2},
        PENALTIES,
        {"repetition_penalty": 1.3, "frequency_penalty": -0.7},
    ],
    ids=str,
)
def test_penalties_are_those_of_transformers_and_the_documented_formula(params):
    """Rows of several lengths, with and without output, beside one without penalties; token after token, and the last
    one is sometimes known to the device only."""
    rows, vocab_size = 6, 50
    generator = torch.Generator().manual_seed(1)
    rules, given = LogitRules([EOS], CPU), SamplingParams(**params)
    sequences = [
        Sequence(str(i), torch.randint(vocab_size, (1 + 9 * i,), generator=generator).tolist(), 1 + 5 * i, given)
        for i in range(rows)
    ]
    sequences.append(Sequence("none", [3, 4], 2, SamplingParams(logit_bias={3: 0.0})))
    for step in range(8):
        sampled = torch.randint(12, (rows + 1,), generator=generator, dtype=torch.int32)
        logits = 4 * torch.randn(rows + 1, vocab_size, generator=generator)
        unread = step % 3 == 1
        places = [LogitsRow(i, each, source=rows - i) for i, each in enumerate(sequences)]
        for i, each in enumerate(sequences):
            if step:
                each.token_ids.append(UNREAD if unread else int(sampled[rows - i]))
        rules.prepare(places, sampled)
        found = logits.clone()
        rules.apply(found, places)
        if unread:
            for i, each in enumerate(sequences):
                each.token_ids[-1] = int(sampled[rows - i])
        for row, each in enumerate(sequences[:-1]):
            expected, known = logits[row : row + 1], torch.tensor([each.token_ids])
            processors: list[Callable[..., torch.Tensor]] = [
                RepetitionPenaltyLogitsProcessor(float(given.repetition_penalty)),
                PresenceAndFrequency(each.num_prompt_tokens, given.presence_penalty, given.frequency_penalty),
            ]
            for processor in processors:
                expected = processor(known, expected)
            torch.testing.assert_close(found[row], expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[-1], logits[-1])
        if step == 4:  # others take their places, and they come back
            rules.prepare([LogitsRow(0, Sequence("other", [7] * 400, 3, given))], sampled)
            sequences.reverse()
            sequences.append(sequences.pop(0))


def test_what_was_sampled_where_logits_are_not_finite_is_looked_for_nowhere():
    """The device goes on with it until the host has read it: its number is that of no token."""
    rules, sequence = LogitRules([EOS], CPU), Sequence("r", [5, UNREAD], 1, SamplingParams(**PENALTIES))
    row = LogitsRow(0, sequence, source=0)
    rules.prepare([row], torch.tensor([NOT_FINITE], dtype=torch.int32))
    scores = torch.full((1, 40), float("nan"))
    rules.apply(scores, [row])
    assert scores.isnan().all()


def test_rules_that_were_put_on_the_device_are_not_those_of_the_next_rows():
    """A rule that ends, another request in the row, and the same requests in another order."""
    rules = LogitRules([EOS], CPU)
    first = Sequence("a", [4, 5], 2, SamplingParams(min_tokens=1, logit_bias={7: 3.0}))
    other = Sequence("b", [4, 5], 2, SamplingParams(logit_bias={8: 4.0}))

    def changed(*sequences):
        scores = torch.zeros(len(sequences), 40)
        rules.apply(scores, [LogitsRow(i, each) for i, each in enumerate(sequences)])
        return [{t: v for t, v in enumerate(row) if v} for row in scores.tolist()]

    never = float("-inf")
    assert changed(first, other) == [{EOS: never, 7: 3.0}, {8: 4.0}]
    assert changed(first, other) == [{EOS: never, 7: 3.0}, {8: 4.0}]
    first.token_ids.append(9)
    assert changed(first, other) == [{7: 3.0}, {8: 4.0}]
    assert changed(other, first) == [{8: 4.0}, {7: 3.0}]
    assert changed(other) == [{8: 4.0}]


def test_tokens_equal_those_of_transformers_beside_requests_without_rules(either_runner, oracle, greedy_tokens, prompt):
    """Long prompts are computed in chunks; and the second engine finds them in the prefix cache."""
    plain, biased, ruled = prompt(37, salt=1), prompt(20, salt=2), prompt(3, salt=3)
    usual = greedy_tokens(MODEL, ruled, 4)
    bias = dict.fromkeys(greedy_tokens(MODEL, biased, 4), -100.0)
    # Without min_tokens it would end with its second token.
    ends = [usual[1], EOS]
    expected = [
        greedy_tokens(MODEL, plain, 4),
        oracle(biased, 4, [sequence_biases(bias)]),
        oracle(ruled, 4, [MinNewTokensLengthLogitsProcessor(len(ruled), 3, ends)], ends),
    ]
    assert not set(expected[1]) & set(bias)
    assert len(expected[2]) >= 3
    requests = [
        (plain, greedy(4, ignore_eos=True)),
        (biased, greedy(4, logit_bias=bias)),
        (ruled, greedy(4, min_tokens=3, stop_token_ids=ends[:1])),
    ]
    assert run(either_runner, requests) == expected
    ended = [(ruled, greedy(4, stop_token_ids=ends[:1]))]
    assert run(either_runner, ended) == [usual[:2]]


@WITHOUT_KERNELS
def test_penalized_tokens_equal_those_of_the_processors_in_chunks_from_the_cache_and_beside_others(
    either_runner, oracle, greedy_tokens, prompt
):
    long, short, plain = prompt(37, salt=1), [*prompt(3, salt=2)] * 2, prompt(9, salt=3)
    requests = [(each, greedy(6, ignore_eos=True, **PENALTIES)) for each in (long, short)]
    requests.append((plain, greedy(6, ignore_eos=True)))
    expected = [oracle(each, 6, penalties(len(each)), ()) for each in (long, short)]
    assert expected != [greedy_tokens(MODEL, each, 6) for each in (long, short)], "the penalties change nothing"
    expected.append(greedy_tokens(MODEL, plain, 6))
    assert run(either_runner, requests) == expected
    assert run(either_runner, requests[::-1]) == expected[::-1]


@WITHOUT_KERNELS
def test_tokens_of_an_earlier_attempt_are_penalized_as_if_they_had_been_computed_here(either_runner, oracle, prompt):
    given = prompt(5, salt=7)
    expected = oracle(given, 6, penalties(5), ())
    for count in (1, 4):
        engine = Engine(either_runner.config, either_runner)
        engine.add("r", given, greedy(6, ignore_eos=True, **PENALTIES), expected[:count])
        found = expected[:count]
        while engine.has_work():
            found = found + [token for output in engine.step() for token in output.token_ids]
        assert found == expected


def test_penalties_go_on_after_a_preemption(model_folder, oracle, prompt):
    runner = make_runner(model_folder(MODEL), "torch", num_blocks=6)
    prompts = [prompt(length, salt=length) for length in (14, 10)]
    engine = Engine(runner.config, runner)
    for name, given in enumerate(prompts):
        engine.add(str(name), given, greedy(14, ignore_eos=True, **PENALTIES))
    found: list[list[int]] = [[], []]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)] += output.token_ids
    assert engine.stats().num_preemptions > 0
    assert found == [oracle(given, 14, penalties(len(given)), ()) for given in prompts]


@pytest.mark.usefixtures("one_kernel_at_a_time")
def test_ranks_that_overlap_penalize_the_same_tokens(model_folder, ranks_in_threads, oracle, prompt):
    """Each samples by itself: a rank that knew other tokens would draw others, and compute another context."""
    folder = model_folder(MODEL)
    ranks = ranks_in_threads(
        lambda group: InterpretedRunner(folder, True, False, group=group, tensor_parallel_size=2, **SIZES), 2
    )
    prompts = [prompt(length, salt=length) for length in (20, 4)]
    params = greedy(4, ignore_eos=True, **PENALTIES)
    engine = Engine(ranks.own.config, ranks.runner)
    found: list[list[int]] = [[], []]
    for name, given in enumerate(prompts):
        engine.add(str(name), given, params)
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)] += output.token_ids
    assert found == [oracle(given, 4, penalties(len(given)), ()) for given in prompts]


@WITHOUT_KERNELS
def test_min_p_draws_among_what_transformers_keeps(either_runner, reference_model, prompt):
    given, temperature, min_p = prompt(5), 5.0, 0.5
    with torch.inference_mode():
        logits = reference_model(MODEL)(torch.tensor([given])).logits[:, -1]
    warm = TemperatureLogitsWarper(temperature)(NO_IDS, logits)
    kept = set(MinPLogitsWarper(min_p)(NO_IDS, warm)[0].isfinite().nonzero()[:, 0].tolist())
    assert len(kept) == 18, "of 320: few enough to be drawn all, and many enough to be missed"
    params = [SamplingParams(temperature, 1, seed=seed, min_p=min_p) for seed in range(100)]
    drawn = Counter(tokens[0] for tokens in run(either_runner, [(given, each) for each in params]))
    assert set(drawn) <= kept
    assert len(drawn) > 12


@WITHOUT_KERNELS
def test_a_seeded_request_draws_the_same_beside_special_ones(either_runner, prompt):
    request = (prompt(9), SamplingParams(0.9, 3, seed=5, ignore_eos=True))
    special = (prompt(9), SamplingParams(0.9, 3, seed=5, ignore_eos=True, logit_bias={300: 0.0}))
    alone = run(either_runner, [request])
    # A bias of nothing makes a row special, and changes nothing.
    assert run(either_runner, [special, request, special]) == alone * 3


def test_many_special_rows_are_sampled_a_part_at_a_time(either_runner, oracle, prompt):
    requests, expected = [], []
    for salt in range(5):
        bias = dict.fromkeys((salt + 60, salt + 61), 50.0)
        requests.append((prompt(4, salt), greedy(2, logit_bias=bias, ignore_eos=True)))
        expected.append(oracle(prompt(4, salt), 2, [sequence_biases(bias)], ()))
    special = either_runner._special_rows if isinstance(either_runner, ModelRunner) else either_runner.special_rows
    special.most_rows = 2
    assert run(either_runner, requests) == expected


def test_a_step_without_special_rows_runs_nothing_more(model_folder, prompt, monkeypatch):
    """Kernels of a prompt and of a decode are counted, and parameters that say nothing count as none."""
    from triton.runtime.interpreter import GridExecutor

    runner = make_runner(model_folder(MODEL), "cuda kernels")
    launches: Counter[str] = Counter()
    call, sample = GridExecutor.__call__, SpecialRows.sample

    def counted(self, *arguments, **keywords):
        launches[self.fn.__name__] += 1
        return call(self, *arguments, **keywords)

    def special(self, *arguments):
        launches["special"] += 1
        return sample(self, *arguments)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    monkeypatch.setattr(SpecialRows, "sample", special)

    def launched(**params):
        launches.clear()
        run(runner, [(prompt(5), greedy(2, ignore_eos=True, **params))])
        return Counter(launches)

    usual = launched()
    assert usual["_embed"] == 2
    assert usual["_best_of_row"] == 2
    assert "special" not in usual
    nothing = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {}}
    assert (
        launched(logprobs=None, prompt_logprobs=None, min_tokens=0, min_p=0.0, stop_token_ids=[300], **nothing) == usual
    )
    more = launched(logit_bias={7: 1.0})
    assert more.pop("special") == 2
    # The same, and behind it the head and sampling once more: here the head is no kernel of ours, but its norm is.
    again = {"_rms_norm", "_small_linear", "_find_threshold", "_best_of_part", "_best_of_row"}
    assert {name for name in more if more[name] != usual[name]} <= again
    assert all(more[name] == 2 * usual[name] for name in ("_find_threshold", "_best_of_part", "_best_of_row"))


@WITHOUT_KERNELS
@pytest.mark.parametrize(
    ("params", "place"),
    [
        ({"stop_token_ids": [5, 320]}, r"stop_token_ids\[1\]"),
        ({"logit_bias": {5: 1.0, 320: 1.0}}, r"logit_bias\[320\]"),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused_by_its_place(either_runner, prompt, params, place):
    engine = Engine(either_runner.config, either_runner)
    with pytest.raises(InvalidRequest, match=rf"^{place}: token 320 is outside the vocabulary \[0, 320\)"):
        engine.add("r", prompt(5), SamplingParams(**params))
    assert not engine.has_work()
