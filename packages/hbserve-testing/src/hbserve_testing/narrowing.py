"""The type that a test knows a value to have: said to mypy, and checked."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """A value that is there."""
    assert value is not None
    return value


def of_type(kind: type[T], value: object) -> T:
    """A value of this type."""
    assert isinstance(value, kind), f"{value!r} is no {kind.__name__}"
    return value
