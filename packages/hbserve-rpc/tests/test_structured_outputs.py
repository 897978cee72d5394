"""StructuredOutputsParams: what an answer must be, made plain, bounded, and refused by name."""

import json
import math
from typing import Any

import msgspec
import pytest

from hbserve_rpc import InvalidRequest, SamplingParams, StructuredOutputsParams
from hbserve_rpc.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES
from hbserve_testing.narrowing import of_type, present

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "ü"}}}


def test_a_schema_is_kept_as_json_in_its_own_order_however_it_is_given():
    kept = {
        of_type(str, StructuredOutputsParams(json=each).json)
        for each in (SCHEMA, json.dumps(SCHEMA, ensure_ascii=False))
    }
    assert {tuple(json.loads(each)["properties"]) for each in kept} == {("b", "a")}
    assert all(json.loads(each) == SCHEMA for each in kept)


def test_what_is_kept_is_a_copy_that_nothing_changes():
    schema, choices = {"type": "object"}, ["a", "b"]
    params = SamplingParams(structured_outputs={"json": schema})  # type: ignore[arg-type]  # taken, and made what it is
    chosen = StructuredOutputsParams(choice=choices)
    schema["type"] = "array"
    choices.append("c")
    assert params.structured_outputs == StructuredOutputsParams(json='{"type":"object"}')
    assert chosen.choice == ("a", "b")
    with pytest.raises(AttributeError):
        chosen.choice = ("c",)  # type: ignore[misc]
    assert params.copied() == params


@pytest.mark.parametrize(
    "given", [{"json": SCHEMA}, {"regex": "a+"}, {"choice": ["a"]}, {"grammar": 'start: "a"'}, {"json_object": True}]
)
def test_it_crosses_the_wire_as_it_is(given):
    params = SamplingParams(structured_outputs=given | {"json_object": given.get("json_object", False)})
    assert present(params.structured_outputs).kind == next(iter(given))
    assert params.needs_logits
    sent = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params


def nested(depth):
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


ENDLESS: dict = {}
ENDLESS["items"] = ENDLESS


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "has none; expected exactly one of"),
        ({"json_object": False}, "has none"),
        ({"regex": "a", "json": SCHEMA}, "has json, regex"),
        ({"rex": "a"}, "'rex' is not served; expected json, regex"),
        ({"json": "{"}, "json: is not a JSON schema"),
        ({"json": "[]"}, r"json='\[\]': expected a JSON schema"),
        ({"json": 3}, "json=3"),
        ({"json": {"minimum": math.inf}}, "json: is not a JSON schema"),
        ({"json": {"const": object()}}, "json: is not a JSON schema"),
        ({"json": nested(100_000)}, "json: is not a JSON schema"),
        ({"json": ENDLESS}, "json: is not a JSON schema"),
        ({"json": '{"items":' * 30_000 + "{}" + "}" * 30_000}, "json: is longer than"),
        ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, "json: is not a JSON schema"),
        ({"json": '{"items":' * 260 + "{}" + "}" * 260}, "json: is not a JSON schema: nested more than 256 deep"),
        ({"json": {"const": "x" * MAX_GRAMMAR_BYTES}}, f"json: is longer than {MAX_GRAMMAR_BYTES} bytes"),
        ({"json": {"const": "\ud800"}}, "json: character 10"),
        ({"regex": "é" * (MAX_GRAMMAR_BYTES // 2 + 1)}, "regex: is longer than"),
        ({"regex": b"a"}, "regex=b'a'"),
        ({"grammar": ["start"]}, "grammar="),
        ({"choice": "yes"}, "choice='yes'"),
        ({"choice": []}, "choice="),
        ({"choice": ["a", 1]}, r"choice\[1\]=1"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "choice="),
        ({"choice": ["x" * 60_000] * 2}, "choice: is longer than"),
        ({"json_object": 1}, "json_object=1"),
        ("json", "='json'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_name(given, named):
    with pytest.raises(InvalidRequest, match=f"^structured_outputs(?:: |\\.)?{named}"):
        SamplingParams(structured_outputs=given)


@pytest.mark.parametrize("other", [{"stop": ["x"]}, {"stop_token_ids": [7]}])
def test_nothing_else_may_end_the_answer(other):
    (name,) = other
    with pytest.raises(InvalidRequest, match=f"^{name}=.*: not with structured_outputs"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"), **other)
