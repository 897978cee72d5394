"""DisaggregatedLLM: documented calls on real processes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from hbserve.pd_disagg import LLM, DisaggregatedLLM, PdDisaggConfig
from hbserve.sampling_params import SamplingParams
from hbserve_kv import BackendUnavailable
from hbserve_rpc import LogitsNotFinite
from hbserve_scheduler import InstanceFailed
from hbserve_testing.narrowing import present

pytestmark = pytest.mark.warm

# One deployment serves most tests, so they share its event loop.
in_its_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llm(small_model, until_empty) -> AsyncIterator[DisaggregatedLLM]:
    config = PdDisaggConfig(model_path=small_model("qwen3"), num_blocks=200, chunk_size=32)
    async with DisaggregatedLLM(config) as llm:
        yield llm
        # Tests that are not of this loop have stopped it: the instances may have given the scheduler up meanwhile.
        await until_empty(llm)


@in_its_loop
async def test_the_pair_is_connected_although_nothing_was_asked_yet(llm):
    """Must be the first test of the file, because the fixture that is shared has sent no request before it."""
    assert llm.get_system_stats()["cpu_scheduler"]["total_requests"] == 0
    prefill, decode = llm.scheduler.fleet.handles.values()
    async with asyncio.timeout(60):
        while prefill.links != {decode.epoch: True}:
            await asyncio.sleep(0.01)
    assert llm.get_system_stats()["gpu_instances"]["prefill-0"]["total_requests"] == 0


@in_its_loop
async def test_results_have_text_tokens_reason_and_timings(llm):
    results = await llm.generate(["介绍一下人工智能", "什么是机器学习？"], SamplingParams(temperature=0, max_tokens=9))
    for result in results:
        assert result["text"] == llm.tokenizer.decode(result["token_ids"], skip_special_tokens=True)
        assert result["finish_reason"] in ("stop", "length")
        assert 0 < result["ttft_s"] <= result["e2e_s"]
        assert 0 < result["handoff_s"] <= result["e2e_s"] - result["ttft_s"]
        assert result["kv_bytes"] > 0
    assert [result["num_prompt_tokens"] for result in results] == [24, 24]


@in_its_loop
async def test_a_stream_is_the_answer_in_pieces(llm):
    (whole,) = await llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    deltas = [
        delta async for delta in llm.stream("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    ]
    assert "".join(delta["text"] for delta in deltas) == whole["text"]
    assert [token for delta in deltas for token in delta["token_ids"]] == whole["token_ids"]
    assert [delta["finish_reason"] for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert deltas[-1]["timings"] is not None


@in_its_loop
async def test_figures_right_after_an_answer_count_it_and_show_nobody_busy_with_it(llm):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    before = llm.get_system_stats()
    (whole,) = await llm.generate("Hello", params)
    await llm.generate(
        "Hello", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=[whole["text"][8:10]])
    )
    for handle in llm.scheduler.fleet.handles.values():  # as they said it while it ran
        handle.last_stats = msgspec.structs.replace(handle.stats, active_requests=2, running_requests=1)
    after = llm.get_system_stats()
    for each in after["gpu_instances"].values():
        assert (each["active_requests"], each["running_requests"], each["status"]) == (0, 0, "ready")
    scheduler = after["cpu_scheduler"]
    assert scheduler["completed_requests"] == before["cpu_scheduler"]["completed_requests"] + 2
    assert scheduler["running_requests"] == 0, "one was ended here, and its instances may not have heard of it"


@in_its_loop
async def test_abort_ends_a_stream_with_its_reason(llm):
    # Known elsewhere: SGLang #18701, #36926, #33507, vLLM #50425.
    reasons: list[str | None] = []
    async for delta in llm.stream(
        "Hello", SamplingParams(temperature=0, max_tokens=400, ignore_eos=True), request_id="r"
    ):
        if delta["finish_reason"] is None and not reasons:
            assert await llm.abort("r")
            reasons.append(None)
        elif delta["finish_reason"]:
            reasons.append(delta["finish_reason"])
    assert reasons == [None, "abort"]
    assert not await llm.abort("r")


@in_its_loop
async def test_leaving_a_stream_aborts_it(llm, until_empty):
    before = llm.get_system_stats()["cpu_scheduler"]
    stream = llm.stream("Hello", SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    await anext(stream)
    await stream.aclose()
    await until_empty(llm)
    after = llm.get_system_stats()["cpu_scheduler"]
    # And it has not just gone on to its last token.
    assert after["aborted_requests"] == before["aborted_requests"] + 1
    assert after["completed_requests"] == before["completed_requests"]


@in_its_loop
async def test_a_stop_string_ends_the_request_as_completed(llm):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (whole,) = await llm.generate("Hello", params)
    stop = whole["text"][8:10]
    before = llm.get_system_stats()["cpu_scheduler"]
    (result,) = await llm.generate("Hello", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=[stop]))
    after = llm.get_system_stats()["cpu_scheduler"]
    assert (result["text"], result["finish_reason"]) == (whole["text"][: whole["text"].index(stop)], "stop")
    assert after["completed_requests"] == before["completed_requests"] + 1
    assert after["success_rate"] == 1


BAD = {
    "empty": (([[]],), "at least one token"),
    "too long": (([5] * 600,), "600 tokens; the instances take at most 511"),
    "outside the vocabulary": (([999],), "token 999 is outside the vocabulary"),
}


@in_its_loop
@pytest.mark.parametrize("case", BAD)
async def test_a_request_that_can_never_run_is_refused_at_once_and_others_go_on(llm, case):
    prompts, message = BAD[case]
    other = asyncio.create_task(llm.generate("fine", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match=message):
        await llm.generate(*prompts)
    assert len((await other)[0]["token_ids"]) == 5


@in_its_loop
async def test_a_wrong_number_of_parameters_is_an_error(llm):
    with pytest.raises(ValueError, match="3 for 2 prompts"):
        await llm.generate(["a", "b"], [SamplingParams()] * 3)


@in_its_loop
async def test_bad_parameters_set_later_are_named(llm):
    params = SamplingParams()
    params.temperature = -1
    with pytest.raises(ValueError, match="temperature=-1"):
        await llm.generate("a", params)


async def test_a_folder_that_lacks_files_fails_the_start_with_its_name_and_leaves_nothing(tmp_path):
    llm = DisaggregatedLLM(PdDisaggConfig(model_path=tmp_path))
    with pytest.raises((InstanceFailed, FileNotFoundError), match=str(tmp_path)):
        await llm.start()


async def test_an_unknown_backend_fails_the_start_and_lists_what_there_is(small_model):
    llm = DisaggregatedLLM(PdDisaggConfig(model_path=small_model("qwen3"), kv_transfer_backend="ncll", num_blocks=10))
    with pytest.raises(BackendUnavailable, match=r"'ncll'.*mooncake"):
        await llm.start()


async def test_a_killed_decode_instance_is_started_again_and_its_request_goes_on_there(small_model, caplog):
    config = PdDisaggConfig(model_path=small_model("qwen3"), num_blocks=100)
    async with DisaggregatedLLM(config) as llm:
        stream = llm.stream("Hello", SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        tokens = (await anext(stream))["token_ids"]
        os.kill(present(llm.scheduler.fleet.handles["decode-0"].info).pid, signal.SIGKILL)
        async for delta in stream:
            tokens += delta["token_ids"]
        assert "decode-0: its process has ended (signal SIGKILL, from" in caplog.text
        assert "decode-0 was started again" in caplog.text
        assert len(tokens) == 400
    assert "did not end" not in caplog.text, "an instance that waits for a dead one is killed after 20 s"


def test_the_synchronous_llm_runs_disaggregated(small_model):
    llm = LLM(
        str(small_model("qwen3")), kv_transfer_backend="nccl", chunked_prefill_enabled=True, num_kvcache_blocks=50,
        enforce_eager=True, max_model_len=4096,
    )  # fmt: skip
    hybrid = LLM(str(small_model("qwen3")), num_kvcache_blocks=50)
    try:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        prompts = ["Hello, pd-disagg HBServe!", [5, 6, 7]]
        assert llm.generate(prompts, params) == hybrid.generate(prompts, params, use_tqdm=False)
    finally:
        llm.exit()
        hybrid.exit()


async def test_a_prompt_without_numbers_is_named_and_not_tried_again_and_the_others_go_on(
    model_with_a_nan, until_empty
):
    # Known elsewhere: SGLang #33187, #28829, vLLM #890, #1623, #2937, #22180.
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    coldest = SamplingParams(temperature=1e-38, max_tokens=6, ignore_eos=True)
    async with DisaggregatedLLM(PdDisaggConfig(model_with_a_nan, num_blocks=50)) as llm:
        broken, sound, cold = await asyncio.gather(
            llm.generate([[5, 6], [5, 100]], greedy), llm.generate([5, 6, 7], greedy),
            llm.generate([5, 6, 7], coldest), return_exceptions=True,
        )  # fmt: skip
        assert isinstance(broken, LogitsNotFinite)
        assert isinstance(sound, list)
        assert isinstance(cold, list)
        assert str(broken).startswith("prompts[1]: prefill-0: the model's logits are not finite at output token 0: ")
        assert len(sound[0]["token_ids"]) == 6
        assert cold[0]["token_ids"] == sound[0]["token_ids"]
        await until_empty(llm)
        stats = (await llm.refresh_system_stats())["cpu_scheduler"]
        assert (stats["retries"], stats["failed_requests"]) == (0, 1)
