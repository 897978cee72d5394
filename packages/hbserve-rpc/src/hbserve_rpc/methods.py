"""A remote procedure is declared once, and both sides use that declaration."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

Request = TypeVar("Request", bound=msgspec.Struct)
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Method(Generic[Request, Reply]):
    """One request, one reply."""

    name: str
    request: type[Request]
    reply: Any
    """A struct type, or a union of tagged struct types."""


@dataclass(frozen=True)
class Notification(Generic[Request]):
    """One message that nobody answers."""

    name: str
    request: type[Request]


@dataclass(frozen=True)
class StreamMethod(Generic[Request, Reply]):
    """One request, then any number of items until the server ends the stream or the client closes it."""

    name: str
    request: type[Request]
    item: Any
    """A struct type, or a union of tagged struct types."""
