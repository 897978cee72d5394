"""The control messages between two KVTransferManagers, over hbserve_rpc. The sender of the data is the client.

sender                                            receiver
  HANDSHAKE(fingerprint, epoch, description) ───▶ once per pair
  TRANSFER(transfer id)                      ───▶ a stream: Accepted, and Cancelled if the receiver gives up
  PART(index)                                ───▶ two-sided transports only; answered when the part has landed
  COMMIT(parts, payload)                     ───▶ answered when the receiver has taken it
  ABANDON(reason, drained)                   ───▶ instead of COMMIT
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
    block_ids: list[int]


class Handshake(msgspec.Struct, frozen=True, tag=True):
    protocol_version: int
    rank: int
    epoch: str
    address: str
    backend: str
    fingerprint: dict[str, str | int]
    description: bytes
    link: str


class HandshakeReply(msgspec.Struct, frozen=True, tag=True):
    rank: int
    epoch: str
    description: bytes


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Opens a transfer. `num_bytes` is set for one that the receiver did not grant: it goes to the lookup buffer."""

    transfer_id: str
    link: str
    sender_epoch: str
    receiver_epoch: str
    num_bytes: int | None = None


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Now the sender may write."""

    region: Region
    block_ids: list[int]


class Cancelled(msgspec.Struct, frozen=True, tag=True):
    reason: str


class PartAnnounced(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    sender_epoch: str
    index: int
    first: int
    """Blocks [first, first + num_blocks) of those that were granted."""
    num_blocks: int

    @property
    def end(self) -> int:
        return self.first + self.num_blocks


class Commit(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    sender_epoch: str
    num_parts: int
    num_bytes: int
    time_s: float
    payload: bytes


class Abandon(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str
    sender_epoch: str
    reason: str
    drained: bool
    """The sender writes no more to this transfer's blocks."""


class Done(msgspec.Struct, frozen=True, tag=True):
    pass


HANDSHAKE: Method[Handshake, HandshakeReply] = Method("kv.handshake", Handshake, HandshakeReply)
PART: Method[PartAnnounced, Done] = Method("kv.part", PartAnnounced, Done)
COMMIT: Method[Commit, Done] = Method("kv.commit", Commit, Done)
ABANDON: Method[Abandon, Done] = Method("kv.abandon", Abandon, Done)
TRANSFER: StreamMethod[Begin, Any] = StreamMethod("kv.transfer", Begin, Accepted | Cancelled)
