"""Several answers to one prompt: they are the same in one process and over prefill and decode instances, between which
their KV moves only once."""

import contextlib
import os
import signal
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve_testing.narrowing import present
from hbserve_testing.waits import until

pytestmark = pytest.mark.warm

SIZES: dict[str, Any] = {"max_model_len": 128, "num_blocks": 60, "block_size": 8, "chunk_size": 16}
PROMPTS = [[5 + (7 * i * i + 3 * i) % 200 for i in range(length)] for length in (1, 20, 40)]
LONG: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True}
ASKED = {
    "greedy": SamplingParams(0, **LONG, n=3),
    "drawn": SamplingParams(2.0, **LONG, seed=5, n=4),
    "with everything": SamplingParams(
        1.5, **LONG, seed=3, n=2, logprobs=1, prompt_logprobs=0, repetition_penalty=1.5, min_p=0.01
    ),
    "of one token": SamplingParams(3.0, 1, seed=2, n=3),
    "that end at once": SamplingParams(0, 9, logit_bias={2: 100.0}, n=2),
}


@pytest.fixture(scope="module")
def in_one_process(small_model):
    """Answers of one engine, by the parameters' name: those to one request, and those to a request for each choice."""
    llm = LLM(small_model("qwen3"), **SIZES)
    together = {name: llm.generate(PROMPTS, params, use_tqdm=False) for name, params in ASKED.items()}
    alone = {
        name: [llm.generate(PROMPTS, params.of_choice(number), use_tqdm=False) for number in range(params.n)]
        for name, params in ASKED.items()
    }
    llm.exit()
    return together, alone


def ranked(answers):
    """Return the tokens that have log-probabilities, for each place of each answer."""
    return [[list(each) for each in answer.get("logprobs") or ()] for answer in answers]


def ids(answers):
    return [answer["token_ids"] for answer in answers]


def test_all_answers_are_outputs_and_the_first_one_is_the_result_itself(in_one_process):
    together, alone = in_one_process
    for name, params in ASKED.items():
        for place, result in enumerate(together[name]):
            outputs = result["outputs"]
            assert ids(outputs) == [each[place]["token_ids"] for each in alone[name]], name
            assert (result["text"], result["token_ids"]) == (outputs[0]["text"], outputs[0]["token_ids"])
            assert ("logprobs" in outputs[0]) == (params.logprobs is not None)
            assert result.get("prompt_logprobs") == alone[name][0][place].get("prompt_logprobs")
    assert len({tuple(each) for each in ids(together["drawn"][1]["outputs"])}) == 4
    assert all("outputs" not in result for each in alone.values() for results in each for result in results)


def test_step_tells_each_answer_of_a_request_when_all_have_ended(small_model, in_one_process):
    llm = LLM(small_model("qwen3"), **SIZES)
    expected = in_one_process[0]["drawn"][0]["outputs"]
    stop = llm.tokenizer.decode(expected[1]["token_ids"][2:3])
    llm.add_request(PROMPTS[0], SamplingParams(2.0, **LONG, seed=5, n=4, stop=stop))
    llm.add_request(PROMPTS[1], SamplingParams(0, 2, ignore_eos=True))
    finished = []
    while not llm.is_finished():
        finished += llm.step()[0]
    assert sorted(number for number, _ in finished) == [0] * 4 + [1]
    answers = [tokens for number, tokens in finished if number == 0]
    for tokens, whole in zip(answers, ids(expected), strict=True):
        assert tokens == whole[: len(tokens)]
    assert len(answers[1]) <= 3
    assert max(map(len, answers)) > 3, "those without the stop string go on"
    llm.exit()


@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
async def test_over_instances_the_answers_are_the_same_and_their_kv_is_moved_once(small_model, in_one_process, backend):
    # Known elsewhere: vLLM #38900, dynamo #14098.
    if backend == "mooncake":
        pytest.importorskip("mooncake.engine", reason="no Mooncake, or not its libraries", exc_type=ImportError)
    config = PdDisaggConfig(small_model("qwen3"), kv_transfer_backend=backend, prefix_caching=False, **SIZES)
    async with DisaggregatedLLM(config) as llm:
        (one,) = await llm.generate(PROMPTS[2], SamplingParams(0, 2, ignore_eos=True))
        assert "outputs" not in one
        before = await moved(llm)
        for name, params in ASKED.items():
            results = await llm.generate(PROMPTS, params)
            for result, expected in zip(results, in_one_process[0][name], strict=True):
                assert ids(result["outputs"]) == ids(expected["outputs"]), name
                assert result["token_ids"] == expected["token_ids"]
                assert result["text"] == llm.tokenizer.decode(result["token_ids"], skip_special_tokens=True)
                assert ranked(result["outputs"]) == ranked(expected["outputs"])
                assert (result["prompt_logprobs"] is None) == (params.prompt_logprobs is None)
            if name == "drawn":
                assert [each["kv_bytes"] for each in results[2]["outputs"]] == [one["kv_bytes"]] * 4
                # Blocks of 1, 3 and 5, as often as prompts were moved, and not as there were answers.
                block = one["kv_bytes"] // 5
                assert await moved(llm) - before == 2 * (1 + 3 + 5) * block
        # An instance may hear only after the answers that they are over.
        await until(lambda: has_all_blocks(llm))


async def has_all_blocks(llm):
    instances = (await llm.refresh_system_stats())["gpu_instances"].values()
    return all(each["free_blocks"] == each["num_blocks"] for each in instances)


async def moved(llm):
    stats = await llm.refresh_system_stats()
    return sum(instance["kv_bytes_received"] for instance in stats["gpu_instances"].values())


PAIR_AND_A_SPARE = [
    {"instance_id": "p", "instance_type": "prefill", "kv_rank": 0},
    {"instance_id": "d0", "instance_type": "decode", "kv_rank": 1},
    {"instance_id": "d1", "instance_type": "decode", "kv_rank": 2},
]


async def test_one_answer_is_stopped_by_its_text_and_the_others_go_on_after_a_death(small_model):
    params = SamplingParams(2.0, 150, ignore_eos=True, seed=5, n=3)
    sizes = SIZES | {"max_model_len": 200, "num_blocks": 90}
    config = PdDisaggConfig(small_model("qwen3"), gpu_instances=PAIR_AND_A_SPARE, **sizes)
    async with DisaggregatedLLM(config) as llm:
        (whole,) = await llm.generate(PROMPTS[1], params)
        expected, texts = ids(whole["outputs"]), [each["text"] for each in whole["outputs"]]
        beginnings = (texts[1][i : i + 3] for i in range(12))
        params.stop = [next(text for text in beginnings if text not in texts[0] and text not in texts[2])]
        found: dict[int, list[int]] = {0: [], 1: [], 2: []}
        reasons, killed = {}, ""
        async with contextlib.aclosing(llm.stream(PROMPTS[1], params, request_id="r")) as deltas:
            async for delta in deltas:
                found[delta["choice"]] += delta["token_ids"]
                reasons[delta["choice"]] = delta["finish_reason"]
                if len(found[0]) > 20 and not killed:
                    killed = llm.scheduler.running_requests["r"].attempts[-1].decode_instance
                    (process,) = [each for each in present(llm._instances).processes if each.instance_id == killed]
                    os.kill(present(process.pid), signal.SIGKILL)
        assert killed
        assert (found[0], found[2]) == (expected[0], expected[2]), "nothing is told twice, and nothing is lost"
        assert found[1] == expected[1][: len(found[1])]
        assert len(found[1]) < 20
        assert reasons == {0: "length", 1: "stop", 2: "length"}
