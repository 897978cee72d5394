"""The trace that a piece of work belongs to, as W3C's header `traceparent` names it, on its way through processes:

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
"""Value of the header: version, trace, the caller's span, and flags; or "" for no trace."""
TRACEPARENT: ContextVar[Traceparent] = ContextVar("TRACEPARENT", default="")
"""The traceparent of the running task. Set it by `in_trace`, because other processes refuse an invalid one."""


def traceparent_of(text: str) -> Traceparent:
    """Return the header's value if it is valid, and "" otherwise: an invalid header counts as a missing one."""
    return text if re.fullmatch(_PATTERN, text) else ""


@contextmanager
def in_trace(text: str) -> Iterator[None]:
    """Context in which all calls and streams belong to this trace."""
    token = TRACEPARENT.set(traceparent_of(text))
    try:
        yield
    finally:
        TRACEPARENT.reset(token)
