"""The stream in which an instance reports, unasked, what has changed."""

from typing import Annotated

import msgspec

from hbserve_rpc.messages import InstanceInfo, InstanceStats
from hbserve_rpc.methods import StreamMethod


class ReportsRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to report every change until the stream is closed."""

    interval_s: Annotated[float, msgspec.Meta(ge=0.01, le=3600)] = 1.0
    """Shortest pause between two reports. A change of `InstanceInfo` is reported at once."""


class InstanceReport(msgspec.Struct, frozen=True, tag=True):
    """Report that an instance sends unasked to one client when it differs from its last report. Reports are numbered as
    items of their stream, so none is lost or comes twice."""

    stats: InstanceStats
    other_requests: int = 0
    """Number of active requests of other clients: several schedulers may give an instance requests."""
    other_tokens: int = 0
    """Number of tokens in the prompts of these requests, and in the output that came with them."""


REPORTS: StreamMethod[ReportsRequest, InstanceInfo | InstanceReport] = StreamMethod(
    "instance.reports", ReportsRequest, InstanceInfo | InstanceReport
)
"""Stream that begins with one item of each type. Later items come when the info or the stats have changed."""
