"""Messages between rank 0 and the process of another rank, over the stdin and stdout of the latter.

The first line on stdin is a RankSettings in JSON. The steps follow, each as its length (4 bytes, big-endian) and a
message (see step_message.py). The end of stdin means that rank 0 has no more steps, or is gone: the rank ends, whatever
it is doing. On stdout the rank writes a RankReport, one line of JSON, whenever its state changes and also every
REPORT_INTERVAL_S, so that its silence is noticed. What a library prints goes to stderr.
"""

from typing import Literal

import msgspec

from hbserve_core.config import InstanceConfig

REPORT_INTERVAL_S = 0.5
END_TIMEOUT_S = 2.0
"""Time that the step under way may still take once stdin has ended, because it may wait for a rank that is gone."""

RankState = Literal["joining", "loading", "ready", "failed"]


class RankSettings(msgspec.Struct, frozen=True):
    config: InstanceConfig
    rank: int
    store_port: int
    """Port, on the loopback address, of the store through which the ranks find each other."""
    seed: int
    """Seed from which all ranks draw the same random numbers."""


class RankReport(msgspec.Struct, frozen=True, omit_defaults=True):
    state: RankState
    error: str = ""
    is_consequence: bool = False
    """Whether the rank failed because it has lost another one."""
    transfer_address: str = ""
    """Address at which it serves the transfers of its pool (see transfers/rank_protocol.py), if its role has any; sent
    with "ready"."""
