"""Messages between rank 0 and the transfers of another rank, over hbserve_rpc on the loopback address.

rank 0                                              rank 1, 2, …
  RECEIVE(transfer id, blocks)     ────stream───▶   posts a receive
  SEND(transfer id, grant)         ────stream───▶   opens a send
                                   ◀─────────────   Begun, then Ended(result); the stream ends when the blocks are
                                                    drained, which after UNKNOWN is later
  PUSH(blocks), COMMIT(payload)    ────notify───▶   of a send
  CANCEL(reason)                   ────notify───▶   of either; Ended says what came of it

  OPEN_LINK(endpoint)              ────call────▶    ahead of sends; ENDPOINT asks for the rank's own

Closing a stream early cancels its transfer. Messages about a transfer that is not known (any more) are ignored.
"""

from typing import Any

import msgspec

from hbserve_kv import TransferResult, TransferStats
from hbserve_rpc import Method, Notification, StreamMethod
from hbserve_rpc.messages import Empty


class Receive(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    block_ids: list[int]
    sender: str = ""
    """Sender that `KVTransferManager.post_receive` is to expect."""


class Send(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    grant: bytes


class Begun(msgspec.Struct, frozen=True, tag=True):
    grant: bytes = b""
    """Grant of a receive."""
    num_blocks: int = 0
    """Number of blocks of a send."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    result: TransferResult


class Push(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    block_ids: list[int]
    first: int
    step: int = 0
    """Number of the step that computes the blocks; the rank may not have launched it yet. 0 means that they are
    computed."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    payload: bytes


class Cancel(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    reason: str


class Endpoint(msgspec.Struct, frozen=True, tag=True):
    """Endpoint of a rank: see `KVTransferManager.endpoint`."""

    endpoint: bytes


class Figures(msgspec.Struct, frozen=True, tag=True):
    stats: TransferStats


RECEIVE: StreamMethod[Receive, Any] = StreamMethod("rank.receive", Receive, Begun | Ended)
SEND: StreamMethod[Send, Any] = StreamMethod("rank.send", Send, Begun | Ended)
PUSH: Notification[Push] = Notification("rank.push", Push)
COMMIT: Notification[Commit] = Notification("rank.commit", Commit)
CANCEL: Notification[Cancel] = Notification("rank.cancel", Cancel)
ENDPOINT: Method[Empty, Endpoint] = Method("rank.endpoint", Empty, Endpoint)
OPEN_LINK: Method[Endpoint, Empty] = Method("rank.open_link", Endpoint, Empty)
STATS: Method[Empty, Figures] = Method("rank.stats", Empty, Figures)
CLOSE: Method[Empty, Empty] = Method("rank.close", Empty, Empty)
"""Method that ends every transfer and tells the peers."""
