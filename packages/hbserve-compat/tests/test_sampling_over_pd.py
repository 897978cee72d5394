"""Sampling parameters mean the same in one process and over prefill and decode instances."""

from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.sampling_params import StructuredOutputsParams
from hbserve_testing.narrowing import present

pytestmark = pytest.mark.warm

SIZES: dict[str, Any] = {"max_model_len": 128, "num_blocks": 60, "block_size": 8, "chunk_size": 16}
PROMPTS = [[5 + (7 * i * i + 3 * i) % 200 for i in range(length)] for length in (1, 20, 40)]
LONG: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True}
ASKED = {
    "nothing": SamplingParams(0, **LONG),
    "penalties": SamplingParams(0, **LONG, repetition_penalty=1.8, presence_penalty=1.0, frequency_penalty=0.7),
    "penalties of a drawn request": SamplingParams(0.8, **LONG, seed=3, repetition_penalty=3, min_p=0.05),
    "a bias and many tokens": SamplingParams(0, 9, logit_bias={2: 100.0, 7: 5.0}, min_tokens=4),
    "one token": SamplingParams(0, 1, logit_bias={9: 100.0}, logprobs=1),
    "logprobs": SamplingParams(0, **LONG, logprobs=3),
    "the prompt's logprobs": SamplingParams(0, **LONG, prompt_logprobs=2, logprobs=1),
    "the prompt's logprobs and one token": SamplingParams(0, 1, prompt_logprobs=0),
    "the prompt's logprobs and its end": SamplingParams(0, 9, logit_bias={2: 100.0}, prompt_logprobs=1),
    "a grammar": SamplingParams(
        0.9, 20, seed=2, structured_outputs=StructuredOutputsParams(regex="[a-h]{3}(-[0-9]{2}){3}")
    ),
    "a grammar of one token": SamplingParams(0, 1, structured_outputs=StructuredOutputsParams(choice=["a"])),
    "a grammar of nothing": SamplingParams(0, 4, structured_outputs=StructuredOutputsParams(choice=[""])),
    "logprobs of the tokens alone": SamplingParams(0.9, **LONG, seed=1, logprobs=0),
}


@pytest.fixture(scope="module")
def in_one_process(small_model):
    """Answers of one engine, by the parameters' name."""
    llm = LLM(small_model("qwen3"), **SIZES)
    answers = {name: llm.generate(PROMPTS, params, use_tqdm=False) for name, params in ASKED.items()}
    llm.exit()
    return answers


def check_same(logprobs, expected):
    """Check that log-probabilities are of the same tokens in the same order, and equal except for the last digits, in
    which sums of another order differ."""
    assert [list(each) for each in logprobs or ()] == [list(each) for each in expected or ()]
    for found, other in zip(logprobs or (), expected or (), strict=True):
        assert list(found.values()) == pytest.approx(list(other.values()), abs=1e-4)


def test_logprobs_come_with_every_token_and_only_where_they_are_asked_for(in_one_process):
    for name, params in ASKED.items():
        for answer in in_one_process[name]:
            asked = {key for key in ("logprobs", "prompt_logprobs") if getattr(params, key) is not None}
            assert set(answer) == {"text", "token_ids"} | asked
            if params.logprobs is None:
                continue
            assert len(answer["logprobs"]) == len(answer["token_ids"])
            for token, each in zip(answer["token_ids"], answer["logprobs"], strict=True):
                assert len(each) in (params.logprobs, params.logprobs + 1)
                assert token in each
                assert list(each.values())[: params.logprobs] == sorted(each.values(), reverse=True)[: params.logprobs]


def test_each_prompt_token_but_the_first_has_logprobs(in_one_process):
    for name, params in ASKED.items():
        if params.prompt_logprobs is None:
            continue
        for prompt, answer in zip(PROMPTS, in_one_process[name], strict=True):
            first, *others = answer["prompt_logprobs"]
            assert first is None
            assert all(token in each for token, each in zip(prompt[1:], others, strict=True))


def test_what_is_asked_changes_the_answers(in_one_process):
    answers = {name: [each["token_ids"] for each in several] for name, several in in_one_process.items()}
    same = {"nothing", "logprobs", "the prompt's logprobs"}
    assert all((answers["nothing"] == answers[name]) is (name in same) for name in ASKED)
    # The bias forces the end of the sequence, as soon as it may come.
    assert [ids[4:] for ids in answers["a bias and many tokens"]] == [[2]] * 3
    assert answers["one token"] == [[9]] * 3


async def test_answers_over_prefill_and_decode_instances_are_those_of_one_process(small_model, in_one_process):
    async with DisaggregatedLLM(PdDisaggConfig(small_model("qwen3"), **SIZES)) as llm:
        for name, params in ASKED.items():
            answers = await llm.generate(PROMPTS, params)
            for answer, expected in zip(answers, in_one_process[name], strict=True):
                assert answer["token_ids"] == expected["token_ids"], name
                check_same(answer["logprobs"], expected.get("logprobs"))
                of_prompt = answer["prompt_logprobs"], expected.get("prompt_logprobs")
                assert [each and each[0] for each in of_prompt] == [None, None]
                check_same(*(each and each[1:] for each in of_prompt))
            if name == "nothing":  # what comes later is in the decode instance's prefix cache
                assert all(each["kv_bytes"] > 0 for each in answers)


async def test_streamed_logprobs_are_those_of_the_tokens_that_come_with_them(small_model):
    """A stop string cuts both the tokens and their log-probabilities."""
    async with DisaggregatedLLM(PdDisaggConfig(small_model("qwen3"), **SIZES)) as llm:
        (whole,) = await llm.generate(PROMPTS[0], ASKED["logprobs"])
        stop = llm.tokenizer.decode(whole["token_ids"][4:5])
        params = SamplingParams(0, **LONG, logprobs=3, stop=stop)
        deltas = [delta async for delta in llm.stream(PROMPTS[0], params)]
        tokens = [token for delta in deltas for token in delta["token_ids"]]
        logprobs = [each for delta in deltas for each in present(delta["logprobs"])]
        assert len(tokens) <= 5
        assert whole["logprobs"] is not None
        assert tokens == whole["token_ids"][: len(tokens)]
        check_same(logprobs, whole["logprobs"][: len(tokens)])
        assert (await llm.generate(PROMPTS[0], params))[0]["logprobs"] == logprobs
        deltas = [delta async for delta in llm.stream(PROMPTS[0], ASKED["nothing"])]
        assert all(delta["logprobs"] is None for delta in deltas)
