"""The trace that a piece of work belongs to, as W3C's header `traceparent` names it, on its way through processes.

TRACEPARENT of a task ──▶ Open of its streams ──▶ TRACEPARENT of the handler there ──▶ its own streams …
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated

import msgspec

_PATTERN = r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"
Traceparent = Annotated[str, msgspec.Meta(pattern=rf"^({_PATTERN})?\Z")]
"""Version, trace, span of whoever asks, flags; or nothing."""
TRACEPARENT: ContextVar[Traceparent] = ContextVar("TRACEPARENT", default="")
"""Of the task that runs. Set it by `in_trace`: what is none would be refused by others."""


def traceparent_of(text: str) -> Traceparent:
    """The header's value; "" if it is none, which then counts as none at all."""
    return text if re.fullmatch(_PATTERN, text) else ""


@contextmanager
def in_trace(text: str) -> Iterator[None]:
    """What is asked within it belongs to this trace."""
    token = TRACEPARENT.set(traceparent_of(text))
    try:
        yield
    finally:
        TRACEPARENT.reset(token)
