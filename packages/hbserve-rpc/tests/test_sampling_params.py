"""SamplingParams: nano-vllm's order, and every wrong value refused by its name."""

import msgspec
import pytest

from hbserve_rpc import InvalidRequest, SamplingParams


def test_the_first_three_sampling_parameters_are_nano_vllms_in_its_order():
    params = SamplingParams(0.6, 256, True)
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.6, 256, True)
    assert SamplingParams() == SamplingParams(temperature=1.0, max_tokens=64, ignore_eos=False)


WRONG = {
    "temperature": [-0.1, float("nan"), float("inf"), 2**63, 10**400, "hot", True],
    "max_tokens": [0, -1, 1.5, None, "8", 2**63],
    "ignore_eos": [1, "yes", None],
    "top_k": [-2, 1.5, None],
    "top_p": [0, -1, 1.1, float("nan"), None],
    "seed": [-1, 2**63, 0.5, True, "1"],
    "stop": ["", [""], [3], ["x"] * 17, 3, None],
    "stop_token_ids": [[-1], ["a"], [2**63], [True], 3, None, "ab"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_out_of_its_range_is_named(name, value):
    with pytest.raises(InvalidRequest, match=rf"^{name}=") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)


def test_one_stop_string_may_be_given_as_it_is():
    assert SamplingParams(stop="END").stop == ["END"]


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
    with pytest.raises(InvalidRequest, match=rf"^{name}="):
        params.validate()


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
    ],
    ids=repr,
)
def test_the_edges_of_each_range_are_allowed_and_cross_the_wire(params):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_the_wire_refuses_what_the_constructor_refuses():
    wrong = msgspec.msgpack.encode({"temperature": 1.0, "top_p": 3.0})
    with pytest.raises(msgspec.ValidationError, match=r"top_p=3\.0: expected a number in \(0, 1\]"):
        msgspec.msgpack.decode(wrong, type=SamplingParams)
