"""The structs that cross processes, and SamplingParams above all."""

import inspect

import msgspec
import pytest

import hbserve_rpc
from hbserve_rpc import InvalidRequest, SamplingParams, messages
from hbserve_rpc.messages import GenerateRequest

STRUCTS = [
    each for each in vars(messages).values()
    if inspect.isclass(each) and issubclass(each, msgspec.Struct) and each.__module__ == messages.__name__
]  # fmt: skip


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda each: each.__name__)
def test_a_message_is_frozen_and_tagged_by_its_name(struct):
    assert struct.__struct_config__.frozen
    assert struct.__struct_config__.tag == struct.__name__


def test_a_request_survives_the_wire():
    request = GenerateRequest("r", [1, 2], SamplingParams(0.5, 7, True, stop=["x"], seed=3), [9])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest) == request


def test_the_first_three_sampling_parameters_are_nano_vllms_in_its_order():
    params = SamplingParams(0.6, 256, True)
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.6, 256, True)
    assert SamplingParams() == SamplingParams(temperature=1.0, max_tokens=64, ignore_eos=False)


WRONG = {
    "temperature": [-0.1, float("nan"), float("inf"), "hot", True],
    "max_tokens": [0, -1, 1.5, None],
    "ignore_eos": [1, "yes"],
    "top_k": [-2, 1.5],
    "top_p": [0, -1, 1.1],
    "seed": [-1, 2**63, 0.5],
    "stop": [[""], [3], ["x"] * 17],
    "stop_token_ids": [[-1], ["a"]],
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


def test_every_exported_name_is_there():
    assert all(hasattr(hbserve_rpc, name) for name in hbserve_rpc.__all__)
