"""What a request asks of sampling means the same in one process and over prefill and decode instances."""

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

pytestmark = pytest.mark.warm

SIZES = {"max_model_len": 128, "num_blocks": 60, "block_size": 8, "chunk_size": 16}
PROMPTS = [[5 + (7 * i * i + 3 * i) % 200 for i in range(length)] for length in (1, 20, 40)]
LONG = {"max_tokens": 9, "ignore_eos": True}
ASKED = {
    "nothing": SamplingParams(0, **LONG),
    "penalties": SamplingParams(0, **LONG, repetition_penalty=1.8, presence_penalty=1.0, frequency_penalty=0.7),
    "penalties of a drawn request": SamplingParams(0.8, **LONG, seed=3, repetition_penalty=3, min_p=0.05),
    "a bias and many tokens": SamplingParams(0, 9, logit_bias={2: 100.0, 7: 5.0}, min_tokens=4),
    "one token": SamplingParams(0, 1, logit_bias={9: 100.0}),
}


@pytest.fixture(scope="module")
def in_one_process(small_model):
    """Answers of one engine, by what was asked."""
    llm = LLM(small_model("qwen3"), **SIZES)
    answers = {name: llm.generate(PROMPTS, params, use_tqdm=False) for name, params in ASKED.items()}
    llm.exit()
    return answers


def test_what_is_asked_changes_the_answers(in_one_process):
    answers = {name: [each["token_ids"] for each in several] for name, several in in_one_process.items()}
    assert all(answers["nothing"] != answers[name] for name in ASKED if name != "nothing")
    # The bias forces the end of the sequence, as soon as it may come.
    assert [ids[4:] for ids in answers["a bias and many tokens"]] == [[2]] * 3
    assert answers["one token"] == [[9]] * 3


async def test_answers_over_prefill_and_decode_instances_are_those_of_one_process(small_model, in_one_process):
    async with DisaggregatedLLM(PdDisaggConfig(small_model("qwen3"), **SIZES)) as llm:
        for name, params in ASKED.items():
            answers = await llm.generate(PROMPTS, params)
            assert [each["token_ids"] for each in answers] == [each["token_ids"] for each in in_one_process[name]], name
            if name == "nothing":  # what comes later is in the decode instance's prefix cache
                assert all(each["kv_bytes"] > 0 for each in answers)
