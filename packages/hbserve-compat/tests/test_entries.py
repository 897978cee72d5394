"""Whatever a caller of LLM does, it gets an answer or one error of ours, others are not affected, nothing is left."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hbserve
import hbserve.pd_disagg
from hbserve import LLM, SamplingParams
from hbserve_rpc import InvalidRequest

pytestmark = pytest.mark.warm

GREEDY = SamplingParams(0, 3, True)
LONG = SamplingParams(0, 400, True)
BOTH = pytest.mark.parametrize("kind", ["one engine", "apart"])


@pytest.fixture(scope="module")
def llms(small_model) -> Iterator[dict[str, LLM]]:
    with (
        LLM(small_model("qwen3"), num_blocks=200) as one,
        hbserve.pd_disagg.LLM(small_model("qwen3"), num_blocks=200, scheduler={"max_queue_size": 16}) as apart,
    ):
        yield {"one engine": one, "apart": apart}


def is_empty(llm: Any) -> bool:
    backend = llm._backend
    if hasattr(backend, "_engine"):
        stats = backend._engine.stats()
        held = stats.num_waiting + stats.num_running + stats.num_reserved + stats.num_blocks - stats.num_free_blocks
        return not held and not backend._news and llm.is_finished()
    stats = backend._run(backend._llm.refresh_system_stats())
    counts = [stats["cpu_scheduler"]["waiting_requests"], stats["cpu_scheduler"]["running_requests"]]
    counts += [each["active_requests"] + each["active_transfers"] for each in stats["gpu_instances"].values()]
    counts += [each["num_blocks"] - each["free_blocks"] for each in stats["gpu_instances"].values()]
    return not any(counts) and not backend._tasks and llm.is_finished()


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "not within 30 s"
        time.sleep(0.02)


@pytest.fixture
def llm(llms, kind) -> Iterator[LLM]:
    yield llms[kind]
    until(lambda: is_empty(llms[kind]))


# ---- who calls ---------------------------------------------------------------------------------------------------


@BOTH
def test_several_threads_may_call_at_once_and_each_gets_its_own_answers(llm):
    # Known elsewhere: vLLM #1285, #1200.
    prompts = [[f"prompt {thread} {number}" for number in range(3)] for thread in range(6)]
    want = [llm.generate(each, GREEDY, use_tqdm=False) for each in prompts]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert list(pool.map(lambda each: llm.generate(each, GREEDY, use_tqdm=False), prompts)) == want


@BOTH
def test_requests_that_were_added_are_not_taken_by_another_call(llm):
    llm.add_request("mine", GREEDY)
    llm.generate("another's", SamplingParams(0, 9, True), use_tqdm=False)
    finished = []
    while not llm.is_finished():
        finished += llm.step()[0]
    assert [token_ids for _, token_ids in finished] == [llm.generate("mine", GREEDY, False)[0]["token_ids"]]


@BOTH
def test_a_forked_process_is_told_that_the_llm_is_not_its_own_and_ends_nothing(llm):
    if (pid := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                llm.generate("a", GREEDY, use_tqdm=False)
            except RuntimeError as error:
                llm.exit()
                status = 0 if "forked" in str(error) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(llm.generate("a", GREEDY, use_tqdm=False)) == 1


@BOTH
def test_a_tokenizer_that_callers_use_with_truncation_at_the_same_time_shortens_no_prompt(llm, kind):
    # Known elsewhere: transformers #47085, vLLM #40949.
    (want,) = llm.generate("a longer text", GREEDY, use_tqdm=False)
    done = threading.Event()

    def truncate() -> None:
        while not done.is_set():
            llm.tokenizer(["a", "bcd"], truncation=True, max_length=3)

    with ThreadPoolExecutor(4) as pool:
        other = pool.submit(truncate)
        try:
            # Of a tokenizer that is shared, one engine tells within 27; apart, each round takes ten times as long.
            for _ in range(30 if kind == "one engine" else 8):
                outputs = pool.map(lambda text: llm.generate(text, GREEDY, False), ["a longer text"] * 3)
                assert list(outputs) == [[want]] * 3
        finally:
            done.set()
        other.result(30)


# ---- what a call leaves ------------------------------------------------------------------------------------------


@BOTH
def test_a_call_may_have_more_prompts_than_the_queue_holds(llm):
    prompts = [[5, i] for i in range(100)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [outputs[i] for i in (0, 50, 99)] == [llm.generate([prompts[i]], GREEDY, False)[0] for i in (0, 50, 99)]


@BOTH
def test_a_ctrl_c_ends_what_the_call_has_begun_and_the_next_call_is_answered(llm):
    # Known elsewhere: vLLM #17738.
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, i] for i in range(100)], LONG, use_tqdm=False)
    timer.join()
    until(lambda: is_empty(llm))
    assert len(llm.generate("a", GREEDY, use_tqdm=False)) == 1


@BOTH
@pytest.mark.parametrize("bad", [[], [5] * 600, [999], [-1], "half \ud83d", None, {"prompt": "a", "image": 1}])
def test_a_bad_prompt_in_the_middle_is_named_and_nothing_was_begun(llm, bad):
    # Known elsewhere: vLLM #26081, #51795; simonw/llm #768.
    with pytest.raises(InvalidRequest, match=r"^prompts\[1\]: "):
        llm.generate(["good", bad, "good"], LONG, use_tqdm=False)
    assert is_empty(llm)


@pytest.mark.parametrize("kind", ["apart"])
def test_when_one_request_fails_the_others_of_its_call_end_and_those_of_other_calls_go_on(llm, monkeypatch):
    follow, fails = llm._backend._follow, ""

    async def failing(request_id, events, news):
        if request_id == fails:
            await llm._backend._llm.scheduler.abort(request_id)
        await follow(request_id, events, news)

    monkeypatch.setattr(llm._backend, "_follow", failing)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(llm.generate, ["a", "b"], LONG, False)
        until(lambda: len(llm._backend._tasks) == 2)
        fails = str(int(max(llm._backend._tasks, key=int)) + 2)
        with pytest.raises(RuntimeError, match="ended"):
            llm.generate(["c", "d", "e"], LONG, use_tqdm=False)
        assert [len(each["token_ids"]) for each in other.result(60)] == [400, 400]


# ---- what is given -----------------------------------------------------------------------------------------------


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


PROMPTS = {
    "list of arrays": lambda llm: [np.array([5, 6, 7])],
    "2-D array": lambda llm: np.array([[5, 6, 7]]),
    "1-D array of small integers": lambda llm: np.array([5, 6, 7], np.uint8),
    "array of objects": lambda llm: np.array([[5, 6, 7], "x"], dtype=object)[:1],
    "list of lists of np.int64": lambda llm: [list(np.array([5, 6, 7]))],
    "list of tensors": lambda llm: list(torch.tensor([5, 6, 7])),
    "1-D tensor": lambda llm: torch.tensor([5, 6, 7]),
    "2-D tensor": lambda llm: torch.tensor([[5, 6, 7]]),
    "batch of one in a list": lambda llm: [torch.tensor([[5, 6, 7]])],
    "generator of prompts": lambda llm: (each for each in [(5, 6, 7)]),
    "iterator of ids": lambda llm: iter([5, 6, 7]),
    "range": lambda llm: range(5, 8),
    "dict of ids": lambda llm: {"prompt_token_ids": [5, 6, 7], "prompt": None},
    "list of dicts": lambda llm: [{"prompt_token_ids": np.array([5, 6, 7])}],
    "dict of text": lambda llm: {"prompt": llm.tokenizer.decode([5, 6, 7])},
    "text": lambda llm: llm.tokenizer.decode([5, 6, 7]),
    "a kind of text": lambda llm: Text(llm.tokenizer.decode([5, 6, 7])),
    "text of numpy": lambda llm: np.array([llm.tokenizer.decode([5, 6, 7])]),
    "a tokenizer's output": lambda llm: llm.tokenizer(llm.tokenizer.decode([5, 6, 7])),
    "a tokenizer's list": lambda llm: llm.tokenizer([llm.tokenizer.decode([5, 6, 7])]),
    "padding": lambda llm: {"input_ids": torch.tensor([[0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
}


OF_SEVERAL = (
    "list of arrays", "array of objects", "list of lists of np.int64", "batch of one in a list", "generator of prompts",
    "list of dicts", "text of numpy",
)  # fmt: skip
"""Those of PROMPTS that are lists of prompts, here with a single one, where one prompt is expected."""


@pytest.mark.parametrize("kind", ["one engine"])
@pytest.mark.parametrize("form", PROMPTS)
def test_a_prompt_may_have_the_form_in_which_people_have_it(llm, form):
    # Known elsewhere: verl #772.
    want = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    assert llm.generate(PROMPTS[form](llm), GREEDY, use_tqdm=False) == want
    if form in OF_SEVERAL:
        with pytest.raises(InvalidRequest, match="a token id"):
            llm.add_request(PROMPTS[form](llm), GREEDY)
        return
    llm.add_request(PROMPTS[form](llm), GREEDY)
    while not llm.is_finished():
        finished = llm.step()[0]
    assert [token_ids for _, token_ids in finished] == [want[0]["token_ids"]]


@pytest.mark.parametrize("kind", ["one engine"])
def test_a_batch_of_a_tokenizer_is_no_prompt_unless_it_has_one(llm):
    with pytest.raises(InvalidRequest, match="prompt: expected one prompt, got a batch of 2"):
        llm.add_request({"input_ids": [[5], [6]]}, GREEDY)


@BOTH
def test_what_is_changed_after_it_was_given_changes_nothing(llm):
    # Known elsewhere: vLLM #2881.
    ids, params = [5, 6, 7], SamplingParams(0, 5, True, stop=["never to come"])
    (want,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    llm.add_request(ids, params)
    ids.clear()
    params.max_tokens, params.temperature, params.stop[0] = 1, -1, "a"
    finished = []
    while not llm.is_finished():
        finished += llm.step()[0]
    assert [token_ids for _, token_ids in finished] == [want["token_ids"]]


def test_no_prompts_have_no_answers_but_nothing_is_no_prompt(llms):
    for llm in llms.values():
        assert llm.generate([], GREEDY, use_tqdm=False) == llm.generate(iter(()), use_tqdm=False) == []
        with pytest.raises(InvalidRequest, match="prompts=None: expected one prompt or a list"):
            llm.generate(None, GREEDY, use_tqdm=False)


class Answerless:
    """An object that raises for every attribute, and whose repr is not Unicode text."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        return "half \ud83d"


@pytest.mark.parametrize("kind", ["one engine"])
@pytest.mark.parametrize("mask", [[1, float("nan")], [1, 2], [1, -1], [1, "0"], [1, None], [1], 5])
def test_an_attention_mask_that_says_neither_0_nor_1_is_refused(llm, mask):
    with pytest.raises(InvalidRequest):
        llm.generate({"input_ids": [5, 6], "attention_mask": mask}, GREEDY, use_tqdm=False)
    hidden = {"input_ids": [5, 6], "attention_mask": [0, True]}
    assert llm.generate(hidden, GREEDY, False) == llm.generate([[6]], GREEDY, False)


@BOTH
def test_what_an_iterator_of_prompts_raises_half_way_passes_and_nothing_was_begun(llm):
    def prompts() -> Iterator[list[int]]:
        yield [5]
        raise ZeroDivisionError

    for several in (prompts(), [[5], prompts()]):
        with pytest.raises(ZeroDivisionError):
            llm.generate(several, LONG, use_tqdm=False)
        assert is_empty(llm)


IDS = st.lists(st.integers(0, 319), min_size=1, max_size=4)
SIMPLE = (
    st.none() | st.booleans() | st.integers(-3, 330) | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
    | st.sampled_from([2**63, 10**5000, 1j, "half \ud83d", "\x00", "x" * 600, object(), np.int64(5), np.float32(5)])
    | st.sampled_from([Answerless(), Decimal(5), Fraction(5), deque([5]), {5: 5}.values(), {5: 5}.keys()])
    | st.sampled_from([memoryview(b"a"), torch.empty((), device="meta"), torch.empty(2, device="meta"), [[[5]]]])
    | st.sampled_from([np.array(5), torch.tensor(5), torch.tensor([[5]]), np.zeros((2, 2, 2)), range(600)])
)  # fmt: skip
PROMPT = IDS | SIMPLE | st.lists(SIMPLE, max_size=3) | st.sets(st.integers(0, 9), max_size=2)
KEYS = st.sampled_from(["prompt", "prompt_token_ids", "input_ids", "attention_mask", "role"])
PROMPTS_OF_A_CALL = PROMPT | st.lists(IDS | PROMPT, max_size=3) | st.dictionaries(KEYS, PROMPT, max_size=3)
PARAMS = st.none() | st.just(GREEDY) | SIMPLE | st.lists(st.just(GREEDY) | SIMPLE, max_size=3)
# Half of the calls have prompts, and half of them parameters, that can run: a quarter is answered at least.
CALLS = st.tuples(
    st.booleans().flatmap(lambda good: IDS if good else PROMPTS_OF_A_CALL),
    st.booleans().flatmap(lambda good: st.just(GREEDY) if good else PARAMS),
)


@BOTH
def test_whatever_is_given_is_answered_or_refused_and_another_call_is_unaffected(llm):
    # Known elsewhere: vLLM #51795, #9634.
    (want,) = llm.generate([[5, 6, 7]], SamplingParams(0, 30, True), use_tqdm=False)
    num_answered = num_refused = 0

    @settings(derandomize=True, max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(CALLS)
    def call(given: tuple[Any, Any]) -> None:
        nonlocal num_answered, num_refused
        prompts, params = given
        short = params if params is not None else GREEDY
        try:
            outputs = llm.generate(prompts, short, use_tqdm=False)
        except InvalidRequest as error:
            num_refused += 1
            assert len(str(error).encode()) < 800  # noqa: PT017
        else:
            num_answered += len(outputs)
            assert all(len(output["token_ids"]) == 3 for output in outputs)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: [llm.generate([[5, 6, 7]], SamplingParams(0, 30, True), False) for _ in range(10)])
        call()
        assert other.result(120) == [[want]] * 10
    assert min(num_answered, num_refused) > 2


# ---- endings -----------------------------------------------------------------------------------------------------


def children() -> set[int]:
    """Return the pids of the children of every thread of this process."""
    found = set[int]()
    for each in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # its thread has ended meanwhile
            found.update(map(int, each.read_text().split()))
    return found


def num_threads() -> int:
    return sum(thread.name.startswith("hbserve") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (LLM, "del"),
        (LLM, "with"),
        (LLM, "exit twice"),
        (hbserve.pd_disagg.LLM, "del"),
        (hbserve.pd_disagg.LLM, "exit twice"),
    ],
)
def test_an_llm_that_nobody_has_any_more_is_collected_and_has_ended_all_that_it_had_started(small_model, kind, how):
    # Known elsewhere: vLLM #1908, #3281, #21073.
    before, threads = children(), num_threads()
    llm = kind(small_model("qwen3"), num_blocks=20)
    seen = weakref.ref(llm)
    assert len(llm.generate("a", GREEDY, use_tqdm=False)) == 1
    if how == "with":
        with llm:
            pass
    elif how == "exit twice":
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(kind.exit, [llm, llm]))
    if how != "del":
        assert (children(), num_threads()) == (before, threads)
        with pytest.raises(RuntimeError, match="exit"):
            llm.generate("a", use_tqdm=False)
    del llm
    gc.collect()
    assert seen() is None
    assert (children(), num_threads()) == (before, threads)


@pytest.mark.parametrize("kind", [LLM, hbserve.pd_disagg.LLM])
def test_who_waits_for_an_answer_when_the_llm_ends_hears_of_it(small_model, kind):
    llm = kind(small_model("qwen3"), num_blocks=200)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(llm.generate, [[5, i] for i in range(20)], LONG, False)
        until(lambda: not is_empty(llm))
        llm.exit()
        with pytest.raises(RuntimeError):
            answer.result(60)


@pytest.mark.parametrize("kind", [LLM, hbserve.pd_disagg.LLM])
def test_an_llm_that_could_not_be_made_leaves_nothing(small_model, kind):
    before, threads = children(), num_threads()
    with pytest.raises(Exception, match="block"):
        kind(small_model("qwen3"), num_blocks=0)
    with pytest.raises(Exception, match="tensor_parallel_size"):
        kind(small_model("qwen3"), tensor_parallel_size=3, num_blocks=20)
    gc.collect()
    assert (children(), num_threads()) == (before, threads)


@pytest.mark.parametrize(("end", "status"), [("1 / 0", 1), ("os.fork() or sys.exit(); os.wait()", 0)])
def test_a_program_that_ends_without_exit_leaves_no_process(small_model, end, status):
    code = f"""
import os, sys
from hbserve.pd_disagg import LLM
llm = LLM({str(small_model("qwen3"))!r}, num_blocks=20)
print(*(process.pid for process in llm._backend._llm._instances.processes), flush=True)
{end}
assert len(llm.generate("a", use_tqdm=False)) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


# ---- names -------------------------------------------------------------------------------------------------------


def test_the_llm_of_pd_disagg_disaggregates_and_the_other_is_one_engine_and_says_what_it_does_not_use(
    llms, small_model
):
    assert "_llm" in vars(llms["apart"]._backend)
    assert "_engine" in vars(llms["one engine"]._backend)
    with pytest.warns(UserWarning, match="kv_port"):
        LLM(small_model("qwen3"), num_blocks=20, kv_port=0, kv_transfer_backend=None).exit()
