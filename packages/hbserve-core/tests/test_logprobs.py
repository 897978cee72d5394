"""Log-probabilities are those of transformers, whatever else a request asks for and whatever is computed beside."""

from typing import Any

import pytest
import torch
from hbserve_core_interpreted import WHOLE_STEPS, WITHOUT_KERNELS, make_runner

from hbserve_core import Engine
from hbserve_core.logits.logprobs import Logprobs
from hbserve_rpc import SamplingParams

pytestmark = WHOLE_STEPS
MODEL = "qwen3"


@pytest.fixture(scope="module")
def reference(reference_model):
    """(T, V): of each place of a text, the log-probabilities of the token that comes next."""

    def logprobs(ids):
        with torch.inference_mode():
            return reference_model(MODEL)(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    return logprobs


def check(found, token, count, expected):
    """One place's log-probabilities: the most likely tokens in order, then the token itself if it is none of them."""
    most = expected.topk(count)
    ids, values = list(found), torch.tensor(list(found.values()))
    assert token in found
    assert len(ids) == count + (token not in ids[:count])
    torch.testing.assert_close(values[:count], most.values, atol=1e-4, rtol=0)
    torch.testing.assert_close(values, expected[ids], atol=1e-4, rtol=0)


def run(engine, requests):
    """Outputs of requests (prompt, parameters) that are computed together, by place."""
    for name, (prompt, params) in enumerate(requests):
        engine.add(str(name), prompt, params)
    found: list[list[Any]] = [[] for _ in requests]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)].append(output)
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return found


ASKED: dict[str, dict[str, Any]] = {
    "the token alone": {"temperature": 0, "logprobs": 0},
    "the most likely": {"temperature": 0, "logprobs": 3},
    "twenty, of a drawn token": {"temperature": 3.0, "seed": 1, "logprobs": 20, "top_k": 200},
    "before penalties and biases": {
        "temperature": 0.9, "seed": 2, "logprobs": 2, "repetition_penalty": 5, "min_p": 0.2, "logit_bias": {7: 9.0},
    },
    "nothing": {"temperature": 0},
}  # fmt: skip


def test_logprobs_equal_those_of_transformers(either_runner, reference, prompt):
    """Twice: the second time the long prompts are in the prefix cache."""
    prompts = [prompt(length, salt=length) for length in (1, 20, 37, 8, 17)]
    params = [SamplingParams(**each, max_tokens=4, ignore_eos=True) for each in ASKED.values()]
    engine = Engine(either_runner.config, either_runner)
    for _ in range(2):
        outputs = run(engine, list(zip(prompts, params, strict=True)))
        for given, asked, several in zip(prompts, params, outputs, strict=True):
            tokens = [token for output in several for token in output.token_ids]
            assert len(tokens) == 4
            expected = reference([*given, *tokens])[len(given) - 1 :]
            found = [each for output in several for each in output.all_logprobs]
            if asked.logprobs is None:
                assert found == []
                continue
            for each, token, row in zip(found, tokens, expected[:-1], strict=True):
                check(each, token, asked.logprobs, row)
    assert engine.stats().num_cached_tokens > 0


def test_asking_for_logprobs_changes_no_token(either_runner, prompt):
    requests = [(prompt(9), SamplingParams(0.9, 4, seed=5, ignore_eos=True, logprobs=n)) for n in (None, 0, 5)]
    engine = Engine(either_runner.config, either_runner)
    tokens = [[output.token_id for output in several if output.token_ids] for several in run(engine, requests)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_more_are_asked_for_than_there_are_tokens():
    logits = torch.randn(2, 5)
    (token, found), other = Logprobs(logits, [20, None]).send(logits, torch.tensor([3, 1])).read()
    assert (token, other) == (3, (1, None))
    check(found, 3, 5, logits[0].log_softmax(-1))


def test_of_a_row_without_numbers_no_logit_is_looked_for(broken_model, prompt):
    model = broken_model(1)
    runner = make_runner(model.folder, "cuda kernels")
    (outputs,) = run(Engine(runner.config, runner), [(model.prompt, SamplingParams(0, 4, ignore_eos=True, logprobs=2))])
    assert [len(output.all_logprobs) for output in outputs if output.token_ids or output.error] == [1, 0]
    assert "not finite at output token 1" in str(outputs[-1].error)


def check_prompt(outputs, given, count, expected):
    """Log-probabilities of a prompt, with its first token and no other."""
    first, *others = [output for output in outputs if output.token_ids]
    assert first.index == 0
    assert not any(output.prompt_logprobs for output in others)
    assert len(first.prompt_logprobs) == len(given) - 1
    for found, token, row in zip(first.prompt_logprobs, given[1:], expected, strict=False):
        check(found, token, count, row)


@WITHOUT_KERNELS
@pytest.mark.parametrize("beside", [False, True])
def test_prompt_logprobs_equal_those_of_transformers_over_chunks_and_without_the_prefix_cache(
    either_runner, reference, prompt, beside
):
    """Twice, and no prefix is read from the cache; the request beside them that asks for nothing reads it."""
    lengths = {1: 0, 2: 3, 16: 0, 17: 1, 33: 2, 50: 20}
    requests = [
        (prompt(length, salt=length), SamplingParams(0, 3, ignore_eos=True, prompt_logprobs=count))
        for length, count in lengths.items()
    ]
    if beside:
        requests.insert(2, (prompt(40), SamplingParams(0, 5, ignore_eos=True, logprobs=1)))
    engine = Engine(either_runner.config, either_runner)
    for turn in range(2):
        for (given, params), outputs in zip(requests, run(engine, requests), strict=True):
            if params.prompt_logprobs is not None:
                check_prompt(outputs, given, params.prompt_logprobs, reference(given))
                assert all(output.num_cached_tokens == 0 for output in outputs)
            else:
                assert not any(output.prompt_logprobs for output in outputs)
                assert all((output.num_cached_tokens > 0) is (turn > 0) for output in outputs)


def test_asking_for_prompt_logprobs_changes_no_token_and_they_come_with_those_of_the_output(
    either_runner, reference, prompt, greedy_tokens
):
    given = prompt(21)
    params = SamplingParams(0, 4, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    (outputs,) = run(Engine(either_runner.config, either_runner), [(given, params)])
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == greedy_tokens(MODEL, given, 4)
    expected = reference([*given, *tokens])
    check_prompt(outputs, given, 1, expected)
    for found, token, row in zip(
        [each for output in outputs for each in output.all_logprobs], tokens, expected[20:], strict=False
    ):
        check(found, token, 1, row)


def test_a_preempted_prompt_is_scored_once(model_folder, reference, prompt):
    """It gives its blocks up in the midst of its prompt: the others grow, and a chunk of it is computed beside."""
    runner = make_runner(model_folder(MODEL), "torch", num_blocks=13)
    engine = Engine(runner.config, runner)
    growing = SamplingParams(0, 6, ignore_eos=True)
    scored = (prompt(60, salt=2), SamplingParams(0, 2, ignore_eos=True, prompt_logprobs=2))
    outputs = run(engine, [(prompt(14), growing), (prompt(14, salt=1), growing), scored])
    assert engine.stats().num_preemptions > 0
    computed = [output.num_computed_tokens for output in outputs[2]]
    assert computed != sorted(computed), "it was not preempted while its prompt was computed"
    check_prompt(outputs[2], scored[0], 2, reference(scored[0]))


@WITHOUT_KERNELS
def test_a_request_with_output_or_whose_prompt_another_instance_computes_has_no_prompt_logprobs(either_runner, prompt):
    engine = Engine(either_runner.config, either_runner)
    params = SamplingParams(0, 4, ignore_eos=True, prompt_logprobs=2)
    engine.reserve("handed over", prompt(20, salt=1), params)
    assert engine.poll_reservations()
    engine.activate("handed over", 9)  # with whatever is in its blocks
    engine.add("again", prompt(20), params, [9])
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"again", "handed over"}
    assert not any(output.prompt_logprobs for output in outputs)


@pytest.mark.usefixtures("one_kernel_at_a_time")
@pytest.mark.parametrize("kind", ["torch", "cuda kernels"])
def test_ranks_score_prompts_together(model_folder, ranks_in_threads, kind, reference, prompt):
    """Their logits are gathered: each must make those of the same rows."""
    folder = model_folder(MODEL)
    ranks = ranks_in_threads(lambda group: make_runner(folder, kind, group=group, tensor_parallel_size=2), 2)
    requests = [
        (prompt(30, salt=1), SamplingParams(0.7, 3, seed=1, ignore_eos=True, prompt_logprobs=2, logprobs=1)),
        (prompt(9, salt=2), SamplingParams(0, 3, ignore_eos=True)),
    ]
    outputs = run(Engine(ranks.own.config, ranks.runner), requests)
    check_prompt(outputs[0], requests[0][0], 2, reference(requests[0][0]))
    assert [len(output.all_logprobs) for output in outputs[0] if output.token_ids] == [1, 1, 1]
