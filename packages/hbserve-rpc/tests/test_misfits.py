from typing import Any, Literal

import msgspec
import pytest

from hbserve_rpc.misfits import what_and_where


class Config(msgspec.Struct, forbid_unknown_fields=True):
    word: Literal["x", "y"] = "x"
    counts: dict[str, int] = {}


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        ([], "Expected `object`, got `array`", ""),
        ({"counts": {"k": "v"}}, "Expected `int`, got `str`", "`$.counts[...]`"),
        ({"counts": {1: 2}}, "Expected `str`, got `int`", "`key` in `$.counts`"),
        ({"z - at `$.b`": 1}, "Object contains unknown field `z - at `$.b``", ""),
        ({"word": "z - at `$.b`"}, "Invalid enum value 'z - at `$.b`'", "`$.word`"),
        ({"word": "z" * 5000}, f"Invalid enum value '{'z' * 119}…'", "`$.word`"),
        ({"word": "'" * 5000}, 'Invalid enum value "' + "'" * 119 + '…"', "`$.word`"),
    ],
)
def test_a_finding_and_its_place_are_told_apart_whatever_was_written(content: Any, what: str, where: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.convert(content, Config)
    assert what_and_where(raised.value) == (what, where)
