"""The structs that cross processes: what every one of them must be."""

import inspect
import typing

import msgspec
import pytest

from hbserve_rpc import Method, SamplingParams, StreamMethod, messages, wire
from hbserve_rpc.messages import GenerateRequest
from hbserve_rpc.trace_context import Traceparent


def structs_of(module):
    found = [each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, msgspec.Struct)]
    return [each for each in found if each.__module__ == module.__name__]


STRUCTS = structs_of(messages) + structs_of(wire)
METHODS = [each for each in vars(messages).values() if isinstance(each, (Method, StreamMethod))]
EXAMPLES = {
    str: "text", int: 3, float: 0.25, bool: True, bytes: b"\x00\xff", SamplingParams: SamplingParams(0.5, 7),
    msgspec.Raw: msgspec.Raw(msgspec.msgpack.encode({"any": [1]})),
    Traceparent: f"00-{'a' * 32}-{'b' * 16}-01",
}  # fmt: skip


def example_of(kind):
    """A value of a field's type that is not its default."""
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[-1]
    if typing.get_origin(kind) is list:
        return [example_of(typing.get_args(kind)[0])]
    if typing.get_origin(kind) is tuple:
        return tuple(example_of(each) for each in typing.get_args(kind) if each is not ...)
    if typing.get_origin(kind) is dict:
        return {example_of(key): example_of(value) for key, value in [typing.get_args(kind)]}
    if inspect.isclass(kind) and issubclass(kind, msgspec.Struct):
        return filled(kind)
    return example_of(typing.get_args(kind)[0])  # an optional field


def filled(struct):
    kinds = typing.get_type_hints(struct, include_extras=True)
    return struct(**{name: example_of(kinds[name]) for name in struct.__struct_fields__})


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda each: each.__name__)
def test_a_message_is_frozen_and_tagged_by_its_name(struct):
    assert struct.__struct_config__.frozen
    assert struct.__struct_config__.tag == struct.__name__


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda each: each.__name__)
def test_every_field_of_a_message_survives_the_wire(struct):
    message = filled(struct)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=struct) == message


def test_tags_are_unique_so_that_a_union_can_be_told_apart():
    assert len({struct.__name__ for struct in STRUCTS}) == len(STRUCTS)


def test_a_field_that_a_newer_peer_added_is_ignored():
    newer = msgspec.msgpack.encode({"type": "Aborted", "found": True, "added_in_2030": 1})
    assert msgspec.msgpack.decode(newer, type=messages.Aborted) == messages.Aborted(True)


def test_method_names_are_unique_and_say_who_serves_them():
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names) == 11
    assert all(name.startswith(("instance.", "scheduler.")) for name in names)


def test_a_request_keeps_its_sampling_parameters():
    request = GenerateRequest("r", (1, 2), SamplingParams(0.5, 7, True, stop=["x"], seed=3), [9])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest) == request
