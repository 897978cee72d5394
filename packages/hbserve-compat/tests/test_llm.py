"""LLM as a replacement of nano-vllm's: the same calls, and results of the same shape in the same order."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hbserve import LLM, SamplingParams
from hbserve.backends.keywords import translated
from hbserve_rpc import InvalidRequest, LogitsNotFinite


@pytest.fixture(scope="module")
def llm(small_model) -> Iterator[LLM]:
    llm = LLM(str(small_model("qwen3")), enforce_eager=True, tensor_parallel_size=1, num_kvcache_blocks=200)
    yield llm
    llm.exit()


def test_generate_returns_text_and_token_ids_in_input_order(llm):
    outputs = llm.generate(["Hello", [5, 6, 7], "介绍"], SamplingParams(0.6, 16, True), use_tqdm=False)
    assert [set(output) for output in outputs] == [{"text", "token_ids"}] * 3
    assert [len(output["token_ids"]) for output in outputs] == [16] * 3
    alone = [llm.generate([p], SamplingParams(0, 5, True), use_tqdm=False)[0] for p in ["Hello", "介绍"]]
    assert llm.generate(["Hello", "介绍"], SamplingParams(0, 5, True), use_tqdm=False) == alone


def test_text_is_the_decoding_of_the_token_ids_with_special_tokens(llm):
    (output,) = llm.generate("Hello", SamplingParams(0, 20), use_tqdm=False)
    assert output["text"] == llm.tokenizer.decode(output["token_ids"])


def test_one_sampling_params_per_prompt_and_a_wrong_number_is_an_error(llm):
    outputs = llm.generate(["a", "b"], [SamplingParams(0, 3, True), SamplingParams(0, 7, True)], use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [3, 7]
    with pytest.raises(ValueError, match="1 for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)
    assert llm.is_finished()


@pytest.mark.parametrize("params", [{"priority": 1}, {"timeout_s": 5.0}])
def test_what_needs_a_queue_is_refused_by_one_engine_and_not_dropped(llm, params):
    (name,) = params
    with pytest.raises(InvalidRequest, match=rf"{name}=.*: is for a deployment"):
        llm.generate(["x"], SamplingParams(max_tokens=1, **params))


def test_add_request_and_step_as_in_nano_vllm(llm):
    llm.add_request([5] * 40, SamplingParams(0, 3, True))
    assert not llm.is_finished()
    finished, count = llm.step()
    assert (finished, count) == ([], 40), "a step with prompt tokens counts them"
    assert llm.step() == ([], -1), "a decode step counts sequences, negative"
    ((number, token_ids),), count = llm.step()
    assert (isinstance(number, int), len(token_ids), count) == (True, 3, -1)
    assert llm.is_finished()


def test_a_stop_string_ends_the_text_before_it(llm):
    (whole,) = llm.generate("Hello", SamplingParams(0, 30, True), use_tqdm=False)
    stop = whole["text"][10:13]
    (stopped,) = llm.generate("Hello", SamplingParams(0, 30, True, stop=[stop]), use_tqdm=False)
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    assert len(stopped["token_ids"]) < 30
    assert llm.is_finished()


def test_the_same_seed_gives_the_same_tokens_whatever_is_beside_it(llm):
    params = SamplingParams(1.0, 12, True, seed=7)
    (alone,) = llm.generate(["Hello"], params, use_tqdm=False)
    beside = llm.generate(
        ["x", "Hello", "y"], [SamplingParams(1.0, 12, True), params, SamplingParams(0, 9, True)], False
    )
    assert beside[1] == alone


@pytest.mark.parametrize(("prompt", "message"), [([], "at least one token"), ([5] * 600, "max_model_len is 512")])
def test_a_bad_prompt_among_good_ones_is_named_and_nothing_runs(llm, prompt, message):
    with pytest.raises(ValueError, match=rf"prompts\[1\]: .*{message}"):
        llm.generate(["good", prompt], SamplingParams(), use_tqdm=False)
    assert llm.is_finished()
    assert len(llm.generate(["good"], SamplingParams(0, 2, True), use_tqdm=False)) == 1


@pytest.mark.parametrize("prompt", [3.5, None, {"text": "a"}, b"ab", {5, 6}, object(), torch.tensor(5)])
def test_what_is_neither_text_nor_token_ids_is_named(llm, prompt):
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt=.*expected a string or a list of token ids"):
        llm.generate(["good", prompt], SamplingParams(), use_tqdm=False)
    assert llm.is_finished()


@pytest.mark.parametrize("params", [{"temperature": 1}, [{"temperature": 1}, SamplingParams()]])
def test_what_is_not_sampling_params_is_named(llm, params):
    with pytest.raises(ValueError, match=r"sampling_params: expected SamplingParams, .* got \{'temperature': 1\}"):
        llm.generate(["a", "b"], params, use_tqdm=False)
    assert llm.is_finished()


def test_an_unknown_keyword_warns_by_name(small_model):
    with pytest.warns(UserWarning, match="quantisation"):
        LLM(str(small_model("qwen3")), quantisation="fp4", num_kvcache_blocks=10).exit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM(str(small_model("qwen3")), max_model_len=4096, gpu_memory_utilization=0.5, num_kvcache_blocks=10).exit()


def test_a_keyword_that_is_misspelt_is_warned_of_with_the_one_that_is_meant():
    with pytest.warns(UserWarning, match=r"\(kv_transfer_backnd=.* unknown .* mean 'kv_transfer_backend'"):
        assert translated({"kv_transfer_backnd": "nccl"}, None) == {}


def test_a_folder_that_is_not_there_or_lacks_files_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        LLM(tmp_path)


def test_after_exit_it_says_so(small_model):
    llm = LLM(str(small_model("qwen3")), num_kvcache_blocks=10)
    llm.exit()
    llm.exit()
    with pytest.raises(RuntimeError, match="exit"):
        llm.generate(["a"])


# ---- a model that gives no numbers for one of the prompts --------------------------------------------------------

SOUND = [[5, 6, 7], [8] * 40]
GREEDY = SamplingParams(0, 6, True)


@pytest.fixture(scope="module")
def broken_llm(model_with_a_nan) -> Iterator[LLM]:
    llm = LLM(str(model_with_a_nan), num_kvcache_blocks=200)
    yield llm
    assert llm.is_finished()
    llm.exit()


@pytest.fixture(scope="module")
def expected(small_model) -> list[list[int]]:
    llm = LLM(str(small_model("llama")), num_kvcache_blocks=200)
    tokens = [output["token_ids"] for output in llm.generate(SOUND, GREEDY, use_tqdm=False)]
    llm.exit()
    assert not any(100 in each for each in tokens)
    return tokens


def run(llm: LLM) -> tuple[list[list[int]], list[str]]:
    """Step until all requests have finished. Returns their tokens, in order, and the messages of errors."""
    tokens, errors = dict[int, list[int]](), []
    while not llm.is_finished():
        try:
            tokens |= dict(llm.step()[0])
        except FloatingPointError as error:
            errors.append(str(error))
    return [tokens[number] for number in sorted(tokens)], errors


def test_generate_names_the_prompt_that_has_no_numbers_and_goes_on_with_others_later(broken_llm, expected):
    with pytest.raises(LogitsNotFinite, match=r"^prompts\[1\]: the model's logits are not finite at output token 0: "):
        broken_llm.generate([SOUND[0], [5, 100], SOUND[1]], GREEDY, use_tqdm=False)
    assert broken_llm.is_finished()
    with pytest.raises(LogitsNotFinite, match=r"^the model's logits"):
        broken_llm.generate([[5, 100]], GREEDY, use_tqdm=False)
    outputs = broken_llm.generate(SOUND, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_step_raises_once_for_each_request_without_numbers_and_loses_nothing_of_others(
    broken_llm, expected, max_tokens
):
    """Each request has one token, so that all end in the same step."""
    for prompt in [[5, 100], SOUND[0], [100], SOUND[1]]:
        broken_llm.add_request(prompt, SamplingParams(0, max_tokens, True))
    tokens, errors = run(broken_llm)
    assert tokens == [each[:max_tokens] for each in expected]
    assert [error[:44] for error in errors] == ["the model's logits are not finite at output "] * 2


def test_generate_in_other_threads_is_not_ended_by_a_prompt_without_numbers(broken_llm, expected):
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(broken_llm.generate, SOUND * 5, GREEDY, False) for _ in range(2)]
        for _ in range(5):
            named = pool.submit(broken_llm.generate, [SOUND[0], SOUND[1], [5, 100]], GREEDY, False)
            with pytest.raises(LogitsNotFinite, match=r"^prompts\[2\]: the model's logits"):
                named.result(60)
        for other in others:
            assert [output["token_ids"] for output in other.result(60)] == expected * 5
    backend = broken_llm._backend
    assert (backend._news, backend._engine.has_work()) == ({}, False)


def test_generate_is_not_ended_by_a_request_that_was_added_before(broken_llm, expected):
    broken_llm.add_request([5, 100], GREEDY)
    broken_llm.add_request(SOUND[0], SamplingParams(0, 2, True))
    outputs = broken_llm.generate(SOUND, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected
    tokens, errors = run(broken_llm)
    assert (tokens, len(errors)) == ([expected[0][:2]], 1)
