"""The control messages between two KVTransferManagers, over hbserve_rpc. The sender of the data is the client.

sender                                            receiver
  LINK(fingerprint, epoch, description)      ───▶ once per pair, a stream: Linked or Mismatch; its end ends the link
  TRANSFER(transfer id)                      ───▶ a stream: Accepted or Refused; Cancelled if the receiver gives up
  PART(index, range)                         ───▶ two-sided transports only; answered when the part has landed
  COMMIT(parts, bytes, payload)              ───▶ answered when the receiver has taken it
  ABANDON(reason)                            ───▶ instead of COMMIT: nothing more will be written
  UNLINK(reason)                             ───▶ the link is broken; no promise about what was on it

A link's key is made for one pair of lives, so a message that carries it carries both epochs.
"""

from typing import Any

import msgspec

from hbserve_kv.memory import Region
from hbserve_rpc import Method, StreamMethod

PROTOCOL_VERSION = 1


class Grant(msgspec.Struct, frozen=True, tag=True):
    """Made by the receiver, read by the sender; opaque to whoever carries it."""

    transfer_id: str
    address: str
    """`host:port` of the receiver's control server."""
    epoch: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    link: str
    protocol_version: int
    rank: int
    epoch: str
    address: str
    backend: str
    fingerprint: dict[str, str | int]
    description: bytes


class Linked(msgspec.Struct, frozen=True, tag=True):
    rank: int
    epoch: str
    description: bytes


class Mismatch(msgspec.Struct, frozen=True, tag=True):
    """The two must not exchange KV: they differ in `field`."""

    field: str
    senders: str
    receivers: str


class Unlink(msgspec.Struct, frozen=True, tag=True):
    link: str
    reason: str


class Tensor(msgspec.Struct, frozen=True):
    """What a transfer to the lookup buffer carries."""

    request_id: str
    num_bytes: int
    dtype: str
    shape: list[int]


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Opens a transfer. With `tensor` it is one that nobody granted: it goes to the lookup buffer."""

    transfer_id: str
    link: str
    receiver_epoch: str
    """The receiver's life that the sender means: that of the grant."""
    tensor: Tensor | None = None


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Now the sender may write."""

    region: Region
    block_ids: list[int]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The link is not known, or another life was meant."""

    epoch: str
    """The receiver's present life."""


class Cancelled(msgspec.Struct, frozen=True, tag=True):
    reason: str


class PartAnnounced(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    link: str
    index: int
    first: int
    """Blocks [first, first + num_blocks) of those that were granted."""
    num_blocks: int


class Commit(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    link: str
    num_parts: int
    num_bytes: int
    time_s: float
    payload: bytes


class Abandon(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    link: str
    reason: str


class Done(msgspec.Struct, frozen=True, tag=True):
    pass


LINK: StreamMethod[Hello, Any] = StreamMethod("kv.link", Hello, Linked | Mismatch)
UNLINK: Method[Unlink, Done] = Method("kv.unlink", Unlink, Done)
TRANSFER: StreamMethod[Begin, Any] = StreamMethod("kv.transfer", Begin, Accepted | Refused | Cancelled)
PART: Method[PartAnnounced, Done] = Method("kv.part", PartAnnounced, Done)
COMMIT: Method[Commit, Done] = Method("kv.commit", Commit, Done)
ABANDON: Method[Abandon, Done] = Method("kv.abandon", Abandon, Done)
