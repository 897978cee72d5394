"""Log-probabilities are those of transformers, whatever else a request asks for and whatever is computed beside."""

import pytest
import torch
from hbserve_core_interpreted import make_runner

from hbserve_core import Engine
from hbserve_core.logits.logprobs import Logprobs
from hbserve_rpc import SamplingParams

# The interpreter's numbers warn where they wrap, which is what hashing wants, and where they are none.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{which} encountered:RuntimeWarning") for which in ("overflow", "invalid value")
]
MODEL = "qwen3"


@pytest.fixture(params=["torch", "cuda kernels"])
def runner(request, model_folder):
    return make_runner(model_folder(MODEL), request.param)


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
    found = [[] for _ in requests]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)].append(output)
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return found


ASKED = {
    "the token alone": {"temperature": 0, "logprobs": 0},
    "the most likely": {"temperature": 0, "logprobs": 3},
    "twenty, of a drawn token": {"temperature": 3.0, "seed": 1, "logprobs": 20, "top_k": 200},
    "before penalties and biases": {
        "temperature": 0.9, "seed": 2, "logprobs": 2, "repetition_penalty": 5, "min_p": 0.2, "logit_bias": {7: 9.0},
    },
    "nothing": {"temperature": 0},
}  # fmt: skip


def test_logprobs_equal_those_of_transformers(runner, reference, prompt):
    """Twice: the second time the long prompts are in the prefix cache."""
    prompts = [prompt(length, salt=length) for length in (1, 20, 37, 8, 17)]
    params = [SamplingParams(**each, max_tokens=4, ignore_eos=True) for each in ASKED.values()]
    engine = Engine(runner.config, runner)
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


def test_asking_for_logprobs_changes_no_token(runner, prompt):
    requests = [(prompt(9), SamplingParams(0.9, 4, seed=5, ignore_eos=True, logprobs=n)) for n in (None, 0, 5)]
    engine = Engine(runner.config, runner)
    tokens = [[output.token_id for output in several if output.token_ids] for several in run(engine, requests)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_more_are_asked_for_than_there_are_tokens():
    logits = torch.randn(2, 5)
    found = Logprobs(logits, [20, None]).send(logits, torch.tensor([3, 1])).read()
    assert found[1] is None
    check(found[0], 3, 5, logits[0].log_softmax(-1))


def test_of_a_row_without_numbers_no_logit_is_looked_for(broken_model, prompt):
    model = broken_model(1)
    runner = make_runner(model.folder, "cuda kernels")
    (outputs,) = run(Engine(runner.config, runner), [(model.prompt, SamplingParams(0, 4, ignore_eos=True, logprobs=2))])
    assert [len(output.all_logprobs) for output in outputs if output.token_ids or output.error] == [1, 0]
    assert "not finite at output token 1" in outputs[-1].error
