"""Declarations of remote procedures. Each is declared once, and both sides use that declaration."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

Request = TypeVar("Request", bound=msgspec.Struct)
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Method(Generic[Request, Reply]):
    """A remote procedure with one request and one reply."""

    name: str
    request: type[Request]
    reply: Any
    """Type of the reply: a struct, or a union of tagged structs."""


@dataclass(frozen=True)
class Notification(Generic[Request]):
    """A message that nobody answers."""

    name: str
    request: type[Request]


@dataclass(frozen=True)
class StreamMethod(Generic[Request, Reply]):
    """A remote procedure with one request and any number of items, until the server or the client ends the stream."""

    name: str
    request: type[Request]
    item: Any
    """Type of an item: a struct, or a union of tagged structs."""
