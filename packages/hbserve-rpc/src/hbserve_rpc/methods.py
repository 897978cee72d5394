"""A remote procedure is declared once, and both sides use that declaration."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

Request = TypeVar("Request", bound=msgspec.Struct)
Reply = TypeVar("Reply")

asking_client: ContextVar[bytes] = ContextVar("asking_client", default=b"")
"""Within a handler, who asks: the same bytes for all that one RpcClient asks."""


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
