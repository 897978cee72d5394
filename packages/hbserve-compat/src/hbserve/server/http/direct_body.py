"""Parts of a streamed answer, written in the turn of the loop that brings them: does what uvicorn does with a part,
without the task and the six functions in between."""

from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "hbserve.direct_body"
"""Key in the ASGI scope."""


class DirectBody:
    """The body of one answer."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self.num_bytes = 0
        """Bytes that were written."""

    def write(self, part: bytes) -> bool:
        """Write a part, neither the first nor the last one, which need `send`.

        Returns:
            Whether the client reads. If not, the next part waits in a `send` until it does.
        """
        cycle = self._cycle
        if cycle.disconnected:
            return True
        assert cycle.chunked_encoding, "begun by `send`, without a content-length"
        self.num_bytes += len(part)
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return not cycle.flow.write_paused


def direct_body(scope: Scope) -> DirectBody | None:
    """The direct body of a request; None if the server is not ours."""
    extensions: dict[str, Any] = scope.get("extensions") or {}
    return extensions[EXTENSION]["body"] if EXTENSION in extensions else None
