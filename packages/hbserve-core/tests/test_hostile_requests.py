"""Whatever a request is made of: it is answered or refused in words, and no other request is changed by it."""

from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbserve_core import Engine, InstanceConfig, ModelRunner
from hbserve_rpc import InvalidRequest, SamplingParams

MODEL_LEN, NUM_TOKENS = 48, 8
SOUND = [[5, 6, 7], [8] * 17]


class Answerless:
    """Neither true nor false, without attributes or a text of its own."""

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class HostileInt(int):
    def __lt__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    __le__ = __gt__ = __ge__ = __lt__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    __hash__ = int.__hash__


class OtherParams(SamplingParams):
    """A subclass, as people make them."""


def broken(**fields: Any) -> SamplingParams:
    """Parameters whose fields were set when they had been checked."""
    params = SamplingParams(0, 3)
    for name, value in fields.items():
        setattr(params, name, value)
    return params


VALUE = (
    st.none() | st.booleans() | st.integers(-3, 330) | st.integers() | st.floats() | st.text(max_size=3)
    | st.binary(max_size=3) | st.builds(Answerless) | st.builds(lambda: 10**5000)
    | st.sampled_from([2**31, 2**63, 1j, "half \ud83d", Decimal(5), HostileInt(5), np.int64(5), np.float16(5)])
    | st.sampled_from([np.array(5), torch.tensor(5), torch.tensor(float("nan")), np.zeros((2, 2)), object, range(600)])
)  # fmt: skip
IDS = st.lists(st.integers(3, 319), min_size=1, max_size=20)
PROMPT = (
    IDS | IDS.map(np.array) | IDS.map(torch.tensor) | IDS.map(iter) | IDS.map(deque) | st.lists(VALUE, max_size=3)
    | VALUE | st.builds(count, st.just(3)) | st.sets(st.integers(3, 9))
    | st.dictionaries(st.integers(), VALUE, max_size=2)
)  # fmt: skip
FIELDS = {
    "temperature": st.sampled_from([0, 5e-324, 1e-30, 1e308, 1.7976931348623157e308]) | VALUE,
    "max_tokens": st.sampled_from([1, 2, 2**31, 2**63 - 1]) | VALUE,
    "ignore_eos": st.booleans() | VALUE,
    "top_k": st.sampled_from([-1, 0, 1, 319, 320, 321, 2**31, 2**63 - 1]) | VALUE,
    "top_p": st.sampled_from([5e-324, 1e-30, 1 - 2**-53, 1]) | VALUE,
    "seed": st.sampled_from([0, 2**31, 2**32, 2**63 - 1]) | VALUE,
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3) | VALUE,
    "stop_token_ids": st.lists(st.integers(0, 2**63 - 1) | st.integers(300, 321), max_size=3) | VALUE,
    "min_tokens": st.sampled_from([0, 1, 3]) | VALUE,
    "min_p": st.sampled_from([0, 5e-324, 1]) | VALUE,
    "presence_penalty": st.floats(-2, 2) | VALUE,
    "frequency_penalty": st.floats(-2, 2) | VALUE,
    "repetition_penalty": st.sampled_from([0.01, 100]) | VALUE,
    "logprobs": st.integers(0, 20) | VALUE,
    "prompt_logprobs": st.integers(0, 20) | VALUE,
    "logit_bias": st.dictionaries(st.integers(300, 321), st.floats(-101, 101), max_size=4) | VALUE,
}
PARAMS = st.fixed_dictionaries({}, optional=FIELDS).map(lambda fields: broken(**fields)) | VALUE
GOOD = (
    st.sampled_from(["a", "b"]), IDS, st.sampled_from([SamplingParams(0, 3), OtherParams(1.0, 3, seed=5)]), st.just(()),
    st.booleans(),
)  # fmt: skip
HOSTILE = (
    st.sampled_from(["x" * 256, "x" * 257, "", "sound-0", "half \ud83d"]) | VALUE, PROMPT, PARAMS, PROMPT, VALUE
)  # fmt: skip
# Most have one hostile part: of several, only the first would be looked at.
REQUEST = st.tuples(*HOSTILE) | st.integers(0, 4).flatmap(
    lambda bad: st.tuples(*(HOSTILE[part] if part == bad else GOOD[part] for part in range(5)))
)


@pytest.fixture
def engine(model_folder: Callable[[str], Any]) -> Iterator[Engine]:
    config = InstanceConfig(
        model_path=str(model_folder("llama")), device="cpu", num_blocks=24, block_size=4, chunk_size=8,
        max_model_len=MODEL_LEN, max_num_batched_tokens=24, max_num_seqs=4,
    )  # fmt: skip
    runner = ModelRunner(config)
    yield Engine(config, runner)
    runner.close()


def is_empty(engine: Engine) -> bool:
    engine.check_integrity()
    stats = engine.stats()
    held = (stats.num_waiting, stats.num_running, stats.num_reserved, stats.num_quarantined_blocks)
    return held == (0, 0, 0, 0) and stats.num_free_blocks == stats.num_blocks and not engine._sequences


def answers(engine: Engine) -> dict[str, list[int]]:
    """Step until nothing is left. Those that would be sent away are ended when they have their token."""
    found: dict[str, list[int]] = {}
    for _ in range(500):
        if not engine.has_work():
            return found
        for output in engine.step():
            tokens = found.setdefault(output.request_id, [])
            tokens += [] if output.token_id is None else [output.token_id]
            assert output.error is None
            if output.block_table and output.token_id is not None:
                engine.release(output.request_id)
    raise AssertionError("it does not end")


def add_sound(engine: Engine) -> list[str]:
    for i, prompt in enumerate(SOUND):
        engine.add(f"sound-{i}", prompt, SamplingParams(0, NUM_TOKENS, True))
    return [f"sound-{i}" for i in range(len(SOUND))]


def test_whatever_is_added_is_answered_or_refused_and_others_have_the_same_tokens(engine, greedy_tokens):
    # Known elsewhere: vLLM #51795, #9634.
    want = [greedy_tokens("llama", prompt, NUM_TOKENS) for prompt in SOUND]
    num_answered = num_refused = 0

    @settings(derandomize=True, max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(REQUEST, min_size=1, max_size=3))
    def add(requests: list[Any]) -> None:
        nonlocal num_answered, num_refused
        names, taken = add_sound(engine), set()
        for request_id, prompt, params, output, prefill_only in requests:
            try:
                engine.add(request_id, prompt, params, output, prefill_only=prefill_only)
                taken.add(request_id)
            except InvalidRequest as error:
                num_refused += 1
                assert 0 < len(str(error).encode()) < 800  # noqa: PT017
            engine.check_integrity()
        found = answers(engine)
        assert [found.pop(name) for name in names] == want
        assert found.keys() == taken
        assert all(1 <= len(tokens) < MODEL_LEN for tokens in found.values())
        num_answered += len(found)
        assert is_empty(engine)

    add()
    assert min(num_answered, num_refused) > 2


def test_what_an_iterator_raises_passes_and_nothing_of_the_request_stays(engine):
    def half() -> Iterator[int]:
        yield 5
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.add("a", half(), SamplingParams(0, 3))
    assert is_empty(engine)
    engine.add("a", [5], SamplingParams(0, 3, True))
    assert len(answers(engine)["a"]) == 3


@pytest.mark.parametrize(
    "prefill_only", [Answerless(), np.zeros(2), None, 1, "no"], ids=["object", "array", "None", "1", "no"]
)
def test_a_mode_that_is_neither_true_nor_false_is_refused_when_it_is_given_and_not_in_a_step(engine, prefill_only):
    with pytest.raises(InvalidRequest, match=r"prefill_only=.*: expected True or False"):
        engine.add("a", [5], SamplingParams(0, 3), prefill_only=prefill_only)
    assert is_empty(engine)
