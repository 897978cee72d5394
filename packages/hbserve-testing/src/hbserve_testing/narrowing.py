"""Functions that tell mypy the type that a test knows a value to have, and check it."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return a value that must not be None."""
    assert value is not None
    return value


def of_type(kind: type[T], value: object) -> T:
    """Return a value that must have this type."""
    assert isinstance(value, kind), f"{value!r} is no {kind.__name__}"
    return value
