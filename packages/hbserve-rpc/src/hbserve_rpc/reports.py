"""The stream in which an instance says unasked what has changed."""

from typing import Annotated

import msgspec

from hbserve_rpc.messages import InstanceInfo, InstanceStats
from hbserve_rpc.methods import StreamMethod


class ReportsRequest(msgspec.Struct, frozen=True, tag=True):
    """Tell of every change, until the stream is closed."""

    interval_s: Annotated[float, msgspec.Meta(ge=0.01, le=3600)] = 1.0
    """Pause between two reports, at least; what `InstanceInfo` says is told at once."""


class InstanceReport(msgspec.Struct, frozen=True, tag=True):
    """What an instance says unasked to one client, when it is another than what it said last. Its number is that of the
    stream's item: none is lost or comes twice."""

    stats: InstanceStats
    other_requests: int = 0
    """Of its active requests, those of other clients: several schedulers may give it requests."""
    other_tokens: int = 0
    """Of those, the prompts and the output that came with them."""


REPORTS: StreamMethod[ReportsRequest, InstanceInfo | InstanceReport] = StreamMethod(
    "instance.reports", ReportsRequest, InstanceInfo | InstanceReport
)
"""First both; then whichever is another than before."""
