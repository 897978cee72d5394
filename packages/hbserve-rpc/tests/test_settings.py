"""Bounds of settings: what is in them, and which fields of a struct are not."""

import math
from typing import Annotated

import msgspec
import pytest

from hbserve_rpc.settings import (
    ENGINE_KEYS,
    NOT_NEGATIVE,
    PORT,
    POSITIVE,
    Bounds,
    EngineSettings,
    chunk_size_of,
    out_of_bounds,
)


class Sizes(msgspec.Struct, kw_only=True):
    count: Annotated[int, POSITIVE] = 1
    limit: Annotated[int | None, POSITIVE] = None
    share: Annotated[float, Bounds(0.5, 1)] = 1
    name: str = ""


@pytest.mark.parametrize(
    ("bounds", "allowed", "refused"),
    [
        (POSITIVE, [1, 2**62], [0, -1, 1.0, 2**62 + 1, "1", None]),
        (NOT_NEGATIVE, [0], [-1]),
        (PORT, [0, 65535], [-1, 65536]),
        (Bounds(0.1), [0.1, 1, 1e9], [0, 0.0999, math.nan, math.inf, "1"]),
        (Bounds(0.5, 1), [0.5, 1, 0.75], [0.4, 1.1, math.nan]),
    ],
)
def test_both_ends_are_allowed_and_what_is_no_such_number_is_not(bounds, allowed, refused):
    assert [value for value in [*allowed, *refused] if bounds.allow(value)] == allowed


def test_bounds_say_what_is_allowed():
    said = [bounds.instead_of(0) for bounds in (POSITIVE, PORT, Bounds(0.1))]
    assert said == ["at least 1", "0 to 65535", "at least 0.1"]
    assert POSITIVE.instead_of(float("inf")) == "1 to 4611686018427387904"


def test_fields_out_of_their_bounds_are_named_and_none_is_allowed_only_where_the_type_has_it():
    assert list(out_of_bounds(Sizes())) == []
    wrong = Sizes(count=None, limit=0, share=2)  # type: ignore[arg-type]
    assert list(out_of_bounds(wrong)) == [
        ("count", None, POSITIVE),
        ("limit", 0, POSITIVE),
        ("share", 2, Bounds(0.5, 1)),
    ]


def test_every_setting_has_a_place_of_its_own_in_the_file():
    assert list(ENGINE_KEYS) == list(EngineSettings.__struct_fields__)
    assert len(set(ENGINE_KEYS.values())) == len(ENGINE_KEYS)
    assert ENGINE_KEYS["chunked_prefill_enabled"] == ("chunked_prefill", "enabled")
    assert ENGINE_KEYS["chunk_size"] == ("chunked_prefill", "chunk_size")
    assert list(out_of_bounds(EngineSettings())) == []


@pytest.mark.parametrize("role", ["prefill", "decode", "hybrid"])
def test_a_chunk_size_that_somebody_has_chosen_is_every_roles(role):
    for target_ms in (None, 15.0):
        assert [chunk_size_of(chosen, role, target_ms) for chosen in (1, 512, "auto")] == [1, 512, "auto"]
    assert chunk_size_of(None, role, None) == ("auto" if role == "prefill" else 512)
    assert chunk_size_of(None, role, 15.0) == "auto"
