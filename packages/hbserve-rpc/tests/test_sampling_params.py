"""SamplingParams: nano-vllm's order, and every wrong value refused by its name."""

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.plain_values import shown


def test_the_first_three_sampling_parameters_are_nano_vllms_in_its_order():
    params = SamplingParams(0.6, 256, True)
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.6, 256, True)
    assert SamplingParams() == SamplingParams(temperature=1.0, max_tokens=64, ignore_eos=False)


class HostileObject:
    """Says nothing of itself, and not even that in UTF-8."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        return "half \ud83d"


class HostileInt(int):
    def __le__(self, other):
        raise RuntimeError("not to be compared")

    __ge__ = __lt__ = __gt__ = __le__


class HostileFloat(float):
    def __float__(self):
        raise RuntimeError("no float")


class HostileText(str):
    __slots__ = ()

    def __len__(self):
        raise RuntimeError("no length")


class EndlessMapping(Mapping):
    """A mapping that says that it is empty, and does not end."""

    def __getitem__(self, key):
        return 1.0

    def __iter__(self):
        return count()

    def __len__(self):
        return 0


OBJECTS = [HostileObject(), HostileInt(5), HostileFloat(0.5), HostileText("x"), Decimal("0.5"), Decimal("sNaN"), int]

WRONG: dict[str, Any] = {
    "temperature": [
        HostileObject(),
        HostileFloat(0.5),
        Decimal("0.5"),
        "0.5",
        -0.1,
        float("nan"),
        float("inf"),
        2**63,
        10**400,
        10**5000,
        1j,
        None,
        "hot",
        True,
    ],
    "max_tokens": [HostileObject(), HostileInt(0), Decimal(8), 0, -1, 1.5, None, "8", 10**5000, 2**63],
    "ignore_eos": [1, "yes", None],
    "include_stop_str_in_output": [0, "no", None],
    "top_k": [-2, 1.5, None],
    "top_p": [0, -1, 1.1, float("nan"), None],
    "seed": [-1, 2**63, 0.5, True, "1"],
    "stop": [HostileText(""), HostileObject(), "", [""], [3], ["x"] * 17, {"x"}, {"x": 1}, b"x", ["half \ud83d"], 3],
    "stop_token_ids": [
        HostileObject(),
        [HostileObject()],
        [-1],
        ["a"],
        [2**63],
        [True],
        [1.0],
        range(1025),
        count(),
        {1},
        3,
        "ab",
    ],
    "min_tokens": [HostileObject(), -1, 1.5, None, True, "3", 2**63, 65],
    "min_p": [HostileObject(), HostileFloat(0.5), -0.1, 1.1, float("nan"), float("inf"), 10**5000, "0.1", None],
    "presence_penalty": [HostileObject(), -2.1, 2.1, float("nan"), float("inf"), 10**400, "1", True, None],
    "frequency_penalty": [HostileObject(), -2.1, 2.1, float("nan"), float("-inf"), 10**5000, "1", True, None],
    "repetition_penalty": [HostileObject(), 0, -1, 0.009, 100.1, float("nan"), float("inf"), "1", True, None],
    "logprobs": [HostileObject(), HostileInt(21), -1, 21, 2**63, 1.0, True, "3", float("nan")],
    "prompt_logprobs": [HostileObject(), HostileInt(21), -1, 21, 2**63, 1.0, False, "3", float("nan")],
    "priority": [HostileObject(), 2**31, -(2**31), 1.0, True, "2", None, float("nan")],
    "timeout_s": [HostileObject(), HostileFloat(1), 0, -1.0, True, "1", float("nan"), float("inf"), 1e9],
    "n": [HostileObject(), HostileInt(0), 0, -1, 1025, 2**63, 1.0, True, "2", None, float("nan")],
    "logit_bias": [
        HostileObject(),
        [(3, 1.0)],
        "3",
        {-1: 1.0},
        {2**31: 1.0},
        {10**5000: 1.0},
        {"3": 1.0},
        {True: 1.0},
        {1.0: 1.0},
        {3: float("nan")},
        {3: float("-inf")},
        {3: 100.1},
        {3: 1e308},
        {3: "1"},
        {3: None},
        {3: HostileObject()},
        dict.fromkeys(range(10**6), 1.0),
        EndlessMapping(),
    ],
    # More of them in test_structured_outputs.py.
    "structured_outputs": [
        HostileObject(),
        "json",
        {},
        [("regex", "a")],
        EndlessMapping(),
        {"json": EndlessMapping()},
        {"json": {HostileObject(): 1}},
        {"choice": HostileObject()},
        {"regex": HostileText("half \ud83d")},
    ],
}


SIMPLE = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.sampled_from([2**63, -(2**63) - 1, 10**400, 10**5000, 5e-324, -0.0, "half \ud83d", "\x00", 1j, object()])
    | st.sampled_from(OBJECTS)
)  # fmt: skip
HOSTILE = (
    SIMPLE
    | st.lists(SIMPLE, max_size=20)
    | st.tuples(SIMPLE)
    | st.dictionaries(st.text() | st.integers(), SIMPLE, max_size=2)
)
"""What a caller may give for anything."""

ALL_WRONG = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), ALL_WRONG, ids=lambda value: shown(value)[:30])
def test_a_value_out_of_its_range_is_named(name, value):
    with pytest.raises(InvalidRequest, match=rf"^{name}(=|\[|:|\.)") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)


def test_one_stop_string_may_be_given_as_it_is():
    assert SamplingParams(stop="END").stop == ["END"]  # type: ignore[arg-type]  # taken, and made a list


class Scalar:
    """As numpy's and torch's are, which this package does not have."""

    ndim = 0

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value


def test_values_of_array_libraries_and_none_become_plain_python():
    # Known elsewhere: verl #772.
    given: dict[str, Any] = {
        "temperature": Scalar(0.5), "max_tokens": Scalar(4), "ignore_eos": Scalar(True), "top_p": Fraction(1, 2),
        "seed": Scalar(7), "stop": None, "stop_token_ids": (each for each in (Scalar(3), 4)), "min_tokens": Scalar(2),
        "min_p": Scalar(0.25), "logit_bias": OrderedDict[Any, Any]({Scalar(3): Scalar(1.5)}),
    }  # fmt: skip
    params = SamplingParams(**given)
    assert params == SamplingParams(
        0.5, 4, True, top_p=0.5, seed=7, stop_token_ids=[3, 4], min_tokens=2, min_p=0.25, logit_bias={3: 1.5}
    )
    assert type(params.logit_bias) is dict
    assert {type(value) for value in msgspec.structs.asdict(params).values()} == {
        float,
        int,
        bool,
        list,
        dict,
        type(None),
    }
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_a_copy_shares_nothing_and_what_the_caller_gave_may_change():
    # Known elsewhere: vLLM #2881.
    stop, ids, bias = ["a"], [5], {7: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    copied = params.copied()
    stop.append("b")
    ids.append(6)
    bias[8] = 2.0
    params.stop.append("c")
    assert params.logit_bias is not None
    params.logit_bias[9] = 3.0
    params.max_tokens = 1
    assert copied == SamplingParams(stop=["a"], stop_token_ids=[5], logit_bias={7: 1.0})


@settings(derandomize=True, max_examples=200, deadline=None)
@given(field=st.sampled_from(sorted(WRONG)), value=HOSTILE)
def test_whatever_a_field_is_given_is_plain_and_crosses_the_wire_or_is_refused_in_a_short_message(field, value):
    params = None
    with contextlib.suppress(InvalidRequest):
        params = SamplingParams(**{field: value})
    if params is not None:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
        return
    with pytest.raises(InvalidRequest, match=f"^{field}") as caught:
        SamplingParams(**{field: value})
    assert len(str(caught.value).encode()) < 800


@pytest.mark.parametrize("field", ["temperature", "top_p", "max_tokens", "top_k", "seed"])
def test_an_integer_with_comparisons_of_its_own_is_the_number_that_it_is(field):
    given: dict[str, Any] = {field: HostileInt(1)}
    assert getattr(SamplingParams(**given), field) == 1


def test_values_set_later_are_checked_by_validate():
    params = SamplingParams()
    params.max_tokens = 0
    with pytest.raises(InvalidRequest, match="max_tokens=0"):
        params.validate()


def test_two_sampling_params_share_no_list():
    first, second = SamplingParams(), SamplingParams()
    first.stop.append("x")
    assert second.stop == []


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_value_is_refused_after_it_was_set_too(name):
    params = SamplingParams()
    setattr(params, name, WRONG[name][-1])
    with pytest.raises(InvalidRequest, match=rf"^{name}(=|\[|:|\.)"):
        params.validate()


def test_each_choice_has_the_next_seed_and_the_first_one_the_request_s_own():
    params = SamplingParams(0.7, 9, stop=["a"], seed=2**63 - 2, n=4)
    choices = [params.of_choice(number) for number in range(4)]
    assert [each.seed for each in choices] == [2**63 - 2, 2**63 - 1, 0, 1]
    assert choices[0] == SamplingParams(0.7, 9, stop=["a"], seed=2**63 - 2)
    assert (params.n, params.seed) == (4, 2**63 - 2)
    assert SamplingParams(n=2).of_choice(1) == SamplingParams()


def test_every_field_has_its_wrong_values_here():
    assert set(WRONG) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(top_k=0),
        SamplingParams(top_k=-1, top_p=1),
        SamplingParams(seed=2**63 - 1, max_tokens=2**63 - 1),
        SamplingParams(stop=["x"] * 16, stop_token_ids=[0]),
        SamplingParams(max_tokens=9, min_tokens=9, min_p=1),
        SamplingParams(min_p=5e-324, logit_bias={0: -100, 2**31 - 1: 100}),
        SamplingParams(logit_bias=dict.fromkeys(range(1024), 0.5)),
        SamplingParams(logit_bias={}, logprobs=0),
        SamplingParams(logprobs=20, prompt_logprobs=20, n=1024),
        SamplingParams(prompt_logprobs=0),
        SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=0.01),
        SamplingParams(presence_penalty=2, frequency_penalty=-2, repetition_penalty=100),
    ],
    ids=repr,
)
def test_the_edges_of_each_range_are_allowed_and_cross_the_wire(params):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_a_stop_token_that_cannot_be_is_named_by_its_place():
    with pytest.raises(InvalidRequest, match=r"^stop_token_ids\[1\]=-1: expected"):
        SamplingParams(stop_token_ids=[3, -1])


def test_a_token_that_a_model_does_not_have_is_named():
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1.0}).require_vocabulary(10)
    for params, name in [
        (SamplingParams(stop_token_ids=[3, 10]), r"stop_token_ids\[1\]"),
        (SamplingParams(logit_bias={3: 1.0, 10: 1.0}), r"logit_bias\[10\]"),
    ]:
        with pytest.raises(InvalidRequest, match=rf"^{name}: token 10 is outside the vocabulary \[0, 10\)"):
            params.require_vocabulary(10)


def test_the_wire_refuses_what_the_constructor_refuses():
    wrong = msgspec.msgpack.encode({"temperature": 1.0, "top_p": 3.0})
    with pytest.raises(msgspec.ValidationError, match=r"top_p=3\.0: expected a number in \(0, 1\]"):
        msgspec.msgpack.decode(wrong, type=SamplingParams)


def test_it_is_a_dataclass_to_those_who_have_written_for_nano_vllm():
    params = SamplingParams(0.5, 3, True, stop=["."])
    assert all(dataclasses.is_dataclass(each) for each in (params, SamplingParams))
    assert [each.name for each in dataclasses.fields(params)] == list(SamplingParams.__struct_fields__)
    other = dataclasses.replace(params, max_tokens=4)
    assert other == SamplingParams(0.5, 4, True, stop=["."])
    assert other != params
    assert repr(other).startswith("SamplingParams(temperature=0.5, max_tokens=4, ignore_eos=True, ")
    assert SamplingParams(**dataclasses.asdict(params)) == params
    assert dataclasses.astuple(params)[:3] == (0.5, 3, True)
    with pytest.raises(InvalidRequest, match="max_tokens=0"):
        dataclasses.replace(params, max_tokens=0)
    with pytest.raises(TypeError, match="beam"):
        dataclasses.replace(params, beam=2)  # type: ignore[call-arg]
    replaced = dataclasses.replace(params)
    replaced.stop.append("!")
    assert params.stop == ["."], "it shares nothing"
