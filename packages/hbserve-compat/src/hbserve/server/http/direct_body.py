"""Direct writing of a streamed answer's parts, in the same iteration of the loop in which they come. Does what uvicorn
does with a part, without the task and the six functions in between."""

from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "hbserve.direct_body"
"""Key of the extension in the ASGI scope."""


class DirectBody:
    """Writes the body of one answer."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self.num_bytes = 0
        """Number of bytes that were written."""

    def write(self, part: bytes) -> bool:
        """Write a part. The first and the last part need `send` instead.

        Returns:
            Whether the client reads. If not, send the next part by `send`, which waits until it does.
        """
        cycle = self._cycle
        if cycle.disconnected:
            return True
        assert cycle.chunked_encoding, "begun by `send`, without a content-length"
        self.num_bytes += len(part)
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return not cycle.flow.write_paused


def direct_body(scope: Scope) -> DirectBody | None:
    """Return the direct body of a request; None if another server than ours, or HTTP/1.0, is used."""
    extensions: dict[str, Any] = scope.get("extensions") or {}
    return extensions[EXTENSION]["body"] if EXTENSION in extensions else None
