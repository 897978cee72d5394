"""Messages by which rank 0 directs the transfers of another rank, over hbserve_rpc on the loopback address.

A transfer is named by its id. One that is received ends with CANCEL, one that is sent with COMMIT or ABORT, and after
UNKNOWN with DRAINED; then the rank has forgotten it. What is not known any more was ended before: that is no error.
"""

from typing import TypeVar

import msgspec

from hbserve_kv import TransferResult, TransferStats
from hbserve_rpc import Method, Notification
from hbserve_rpc.messages import Empty

Request = TypeVar("Request", bound=msgspec.Struct)
Reply = TypeVar("Reply", bound=msgspec.Struct)


class Posting(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    block_ids: list[int]


class Posted(msgspec.Struct, frozen=True, tag=True):
    grant: bytes


class Opening(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    grants: list[bytes]


class Opened(msgspec.Struct, frozen=True, tag=True):
    num_blocks: int | None
    """None: none of the grants is for heads of this rank."""


class Pushing(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    block_ids: list[int]
    first: int


class Committing(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    payload: bytes


class Ending(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    reason: str = ""


class Ended(msgspec.Struct, frozen=True, tag=True):
    result: TransferResult


class Figures(msgspec.Struct, frozen=True, tag=True):
    stats: TransferStats


POST: Method[Posting, Posted] = Method("rank.post", Posting, Posted)
WAIT: Method[Ending, Ended] = Method("rank.wait", Ending, Ended)
CANCEL: Method[Ending, Ended] = Method("rank.cancel", Ending, Ended)
RECEIVE_DRAINED: Method[Ending, Empty] = Method("rank.receive_drained", Ending, Empty)

OPEN: Method[Opening, Opened] = Method("rank.open", Opening, Opened)
PUSH: Notification[Pushing] = Notification("rank.push", Pushing)
COMMIT: Method[Committing, Ended] = Method("rank.commit", Committing, Ended)
ABORT: Method[Ending, Ended] = Method("rank.abort", Ending, Ended)
SEND_DRAINED: Method[Ending, Empty] = Method("rank.send_drained", Ending, Empty)

STATS: Method[Empty, Figures] = Method("rank.stats", Empty, Figures)
CLOSE: Method[Empty, Empty] = Method("rank.close", Empty, Empty)
