"""Messages of an earlier program are still read: each as it was when the protocol got its present version."""

from typing import Any

import msgspec
import pytest
from hbserve_wire_samples import FILE, UNTYPED, read, types

from hbserve_rpc import wire

(VERSION, SAMPLES), TYPES = read(), types()
HOW = (
    "a change that the version before does not understand needs another version of the protocol; then, and for a new "
    f"message: python tests/hbserve_wire_samples.py, and commit {FILE.name}"
)


def test_every_message_has_a_sample_of_the_version_of_its_protocol():
    assert VERSION == wire.PROTOCOL_VERSION, HOW
    assert SAMPLES.keys() == TYPES.keys(), HOW
    assert len(SAMPLES) > 40


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_message_of_before_is_read_and_nothing_of_it_is_lost(name):
    sent = UNTYPED(SAMPLES[name])
    read_now = UNTYPED(msgspec.msgpack.encode(msgspec.msgpack.decode(SAMPLES[name], type=TYPES[name])))
    assert has_all(read_now, sent), f"{name}: {sent} is read as {read_now}; {HOW}"


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_fields_that_only_the_sender_knows_are_passed_over(name):
    sent = UNTYPED(SAMPLES[name])
    if isinstance(sent, dict):
        sent |= {"a_field_of_tomorrow": [1]}
    else:
        sent.append("a field of tomorrow")
    msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=TYPES[name])


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_message_need_not_have_what_is_not_required(name):
    """So a new field must have a default, because other programs do not send it."""
    stored, fields = UNTYPED(SAMPLES[name]), msgspec.structs.fields(TYPES[name])
    known = {each.encode_name for each in fields}
    added = known - set(stored) if isinstance(stored, dict) else set()
    assert not added & {each.encode_name for each in fields if each.required}, HOW
    if isinstance(stored, dict):
        optional = {each.encode_name for each in fields if not each.required}
        least = {key: value for key, value in stored.items() if key not in optional}
        msgspec.msgpack.decode(msgspec.msgpack.encode(least), type=TYPES[name])


def has_all(found: Any, sent: Any) -> bool:
    if isinstance(sent, dict):
        return isinstance(found, dict) and all(key in found and has_all(found[key], sent[key]) for key in sent)
    if isinstance(sent, list):
        return isinstance(found, list) and len(found) >= len(sent) and all(map(has_all, found, sent))
    return bool(found == sent)
