"""Messages between rank 0 and the process of another rank, over the stdin and stdout of the latter.

The first line on stdin is a RankSettings in JSON. From then on stdin brings the steps, each as its length (4 bytes,
big-endian) and a message (see step_message.py). Its end means that rank 0 has no more of them, or is gone: the rank
ends, whatever it is doing. On stdout the rank says a RankReport, one line of JSON, whenever its state changes and every
REPORT_INTERVAL_S besides, so that its silence is noticed. What a library prints goes to stderr.
"""

from typing import Literal

import msgspec

from hbserve_core.config import InstanceConfig

REPORT_INTERVAL_S = 0.5
END_TIMEOUT_S = 2.0
"""How long the step that is under way may take once stdin has ended. It may wait for a rank that is gone."""

RankState = Literal["joining", "loading", "ready", "failed"]


class RankSettings(msgspec.Struct, frozen=True):
    config: InstanceConfig
    rank: int
    store_port: int
    """Of the store, on the loopback address, through which the ranks find each other."""
    seed: int
    """From which all ranks draw the same numbers."""


class RankReport(msgspec.Struct, frozen=True, omit_defaults=True):
    state: RankState
    error: str = ""
    is_consequence: bool = False
    """The rank failed because it has lost another one."""
    transfer_address: str = ""
    """With "ready": where it serves the transfers of its pool (see transfers/rank_protocol.py), if its role
    has any."""
