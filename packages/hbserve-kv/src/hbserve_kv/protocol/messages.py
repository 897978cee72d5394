"""The control messages between two KVTransferManagers, over hbserve_rpc. The sender of the data is the client.

sender                                              receiver
  LINK(fingerprint, epoch, offers)  ───stream───▶   once per pair; open as long as both live
                                    ◀────────────   LinkReply(transport, description), then Cancelled(transfer id) …
  TELL, ASK(name)                   ────call────▶   while both connect: what each needs of the other
  BEGIN(transfer id)                ────call────▶   answered by Accepted(blocks); or by UnknownLink, if the link has
                                                    ended before the sender has heard: it connects, and asks again
  PARTS(what comes next)            ───notify───▶   two-sided transports only: the receiver takes them in this order
  COMMIT(payload)                   ────call────▶   answered when all parts have landed and the receiver has taken it;
                                                    two-sided: asked when all are announced, not when they have moved
  ABANDON(reason, drained)          ────call────▶   instead of COMMIT; or of BEGIN, if another rank has refused

If the blocks are there before the receiver has room for them, it fetches them (`hbserve_kv.sending.offers`):

                                    ◀───stream───   KEEP(transfer id): once it wants them; answered by Offered(heads)
                                                    when they are, and open until the transfer has ended on both sides
                                    ◀────call────   FETCH(transfer id, grant, first): once it has room; LINK … COMMIT
                                                    follow as above, when all receivers of this rank have asked

`link` names one life of both sides. The sender draws it at random; the receiver learns it with the sender's epoch, and
forgets it when the stream ends. So a message of an earlier life, of either side, names a link that nobody knows.

All messages about a link must come over the connection over which LINK came. Whoever else names the link is told
nothing, and changes nothing.

What was announced is sent, and what is sent over a two-sided transport must be taken. So a part that the receiver
cannot take ends the link. The receiver says why by Cancelled, and ends the stream, so that the sender ends its send.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from hbserve_kv.errors import TransferFailed
from hbserve_kv.memory.layout import HeadRange, Layout, Side
from hbserve_kv.memory.memory import Region
from hbserve_rpc import Method, Notification, StreamMethod
from hbserve_rpc.plain_values import LINE, plain_id
from hbserve_rpc.wire import UNREADABLE

PROTOCOL_VERSION = 10

NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""Time in seconds. NaN and infinity are refused."""
MOST_CHARACTERS = 1 << 10
Name = Annotated[str, msgspec.Meta(max_length=MOST_CHARACTERS, pattern=LINE)]
"""Name or id that logs and messages may show as it is."""
MOST_RANKS = 1 << 10
"""Limit of ranks of one receiver: a sender connects to each of them."""
MOST_UNITS = 1 << 22
"""Limit of units of one transfer, each of at least one token."""


class Grant(msgspec.Struct, frozen=True, tag=True):
    """Permission to write to blocks of the receiver. Made by the receiver, read by the sender; opaque to whoever
    carries it."""

    transfer_id: Name
    """ "" in an endpoint, which says where the receiver is and grants nothing."""
    address: Name
    """`host:port` of the receiver's control server."""
    epoch: Name
    heads: HeadRange
    """KV heads that the receiver's blocks hold."""


def join_grants(grants: Sequence[bytes]) -> bytes:
    """Join the grants of several ranks into one, for what they receive together."""
    return msgspec.msgpack.encode([msgspec.Raw(grant) for grant in grants])


def read_grants(grant: bytes) -> list[Grant]:
    """Read the grants of one rank, or of several.

    Raises:
        TransferFailed: it is not a grant.
        TypeError: it is not even bytes.
    """
    if not isinstance(grant, bytes | bytearray | memoryview):
        raise TypeError(f"grant: expected bytes, or a list of such, got {type(grant).__name__}")
    try:
        found = msgspec.msgpack.decode(grant, type=Grant | Annotated[list[Grant], msgspec.Meta(max_length=MOST_RANKS)])
    except UNREADABLE as error:
        raise TransferFailed(f"not a grant: {error}") from error
    return found if isinstance(found, list) else [found]


def checked_id(transfer_id: object) -> str:
    """Return the id as a plain str. Raises InvalidRequest, a ValueError, unless it is a Name that is not empty."""
    return plain_id("transfer_id", transfer_id, MOST_CHARACTERS)


def checked_payload(payload: object) -> bytes:
    """Return the payload as bytes. Raises TypeError if it is not bytes."""
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise TypeError(f"payload: expected bytes, got {type(payload).__name__}")
    return bytes(payload)


class Handshake(msgspec.Struct, frozen=True, tag=True):
    """Identity of the sender, and the transports by which it can send."""

    protocol_version: int
    rank: int
    epoch: Name
    address: Name
    fingerprint: dict[Name, Name | int]
    heads: HeadRange
    layout: Layout
    """Layout of the sender's pool. What the two sides have in common follows from both layouts: see
    `hbserve_kv.memory.layout.sides`."""
    offers: dict[str, bytes]
    """Transports that the sender can use, best first, each with its `describe()`."""
    link: Name
    name: Name = ""
    """Name of the sender's instance: a transfer may be granted to one instance by name, see
    `KVTransferManager.post_receive`."""


class LinkReply(msgspec.Struct, frozen=True, tag=True):
    """Identity of the receiver, and the transport that it has chosen."""

    rank: int
    epoch: Name
    heads: HeadRange
    layout: Layout
    transport: Name
    """The first of the sender's offers that the receiver can use too."""
    description: bytes
    passed_over: dict[Name, str]
    """Better offers, and why they were not chosen."""


class Told(msgspec.Struct, frozen=True, tag=True):
    """Sets a value of the link's rendezvous: see `hbserve_kv.transports.base.Rendezvous`."""

    link: Name
    name: Name
    value: bytes


class Asked(msgspec.Struct, frozen=True, tag=True):
    """Asks for a value of the link's rendezvous; answered by a Told as soon as either end has set it."""

    link: Name
    name: Name


class Cancelled(msgspec.Struct, frozen=True, tag=True):
    """Says that the receiver gives up a transfer."""

    transfer_id: Name
    reason: str


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Opens a transfer. `num_bytes` is set if the receiver has not granted it; it then goes to the lookup buffer."""

    transfer_id: Name
    link: Name
    num_bytes: NotNegative | None = None


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Says that the sender may write from now on, and into which blocks."""

    region: Region
    block_ids: list[int]
    checksum: bool
    """Whether the receiver wants a checksum of each block in the commit."""


def misfit(accepted: Accepted, begin: Begin, mine: Side, peer: Side) -> str:
    """Return why no receiver can have granted these blocks to `begin`; "" if one can. `mine` and `peer` are the sides
    of the link."""
    block_ids, region = accepted.block_ids, "pool" if begin.num_bytes is None else "arena"
    if accepted.region != region:
        return f"region={accepted.region!r}, and not {region!r}"
    if block_ids and min(block_ids) < 0:
        return f"block_ids has {min(block_ids)}"
    if begin.num_bytes is not None and len(block_ids) != -(-begin.num_bytes // mine.unit_bytes):
        return f"{len(block_ids)} block_ids for {begin.num_bytes} bytes, in blocks of {mine.unit_bytes}"
    if len(block_ids) * peer.ratio > MOST_UNITS:
        return f"{len(block_ids)} block_ids of {peer.ratio} units each; at most {MOST_UNITS} units"
    return ""


class UnknownLink(msgspec.Struct, frozen=True, tag=True):
    """Says that the message was about a link that the receiver does not have, or no longer has."""


class AnnouncedPart(msgspec.Struct, frozen=True, array_like=True):
    """A part that the sender is about to send."""

    index: int
    first: int
    """Position of the first block. The part is blocks [first, first + num_blocks) of those that were granted; if one
    side's blocks are larger, it is units of them: see `hbserve_kv.memory.layout`."""
    num_blocks: int
    layers: tuple[NotNegative, NotNegative] | None = None
    """The layers [first, end) that the part has; None: all."""

    @property
    def end(self) -> int:
        return self.first + self.num_blocks

    @property
    def blocks(self) -> tuple[range, range | None]:
        """Positions among the granted blocks, and layers; None: all layers."""
        return range(self.first, self.end), self.layers and range(*self.layers)


class PartsAnnounced(msgspec.Struct, frozen=True, tag=True):
    """Parts of one transfer that come next over a two-sided link, in this order."""

    transfer_id: Name
    link: Name
    parts: Annotated[list[AnnouncedPart], msgspec.Meta(max_length=1 << 10)]
    """The announced parts. A sender announces at most 16 at a time."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Says that the sender has no more parts. Once all have landed, the transfer is the receiver's."""

    transfer_id: Name
    link: Name
    num_parts: NotNegative
    num_bytes: NotNegative
    """Number of bytes, which tell with a one-sided transport how many blocks have been written."""
    time_s: Seconds
    """Seconds during which parts were moving. With a two-sided transport, the receiver measures that itself."""
    payload: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    checksums: dict[int, int] = {}
    """Checksums by position among the granted blocks; see `hbserve_kv.protocol.checksum`."""


class Abandon(msgspec.Struct, frozen=True, tag=True):
    """Says that the sender gives up a transfer."""

    transfer_id: Name
    link: Name
    reason: str
    drained: bool
    """Whether the sender will not write to this transfer's blocks any more."""
    may_be_buffered: bool = False
    """Whether what the sender's system has already taken may still arrive for a moment."""


class Keep(msgspec.Struct, frozen=True, tag=True):
    """Says that the receiver wants what is offered, or will be offered. This holds until the stream ends that it
    opens."""

    transfer_id: Name
    epoch: Name = ""
    """Life of the sender that has offered it; "" if it may be offered much later, by any life."""
    num_receivers: NotNegative = 1
    """How many ranks of the receiver fetch from this rank of the sender; 0: none needs it, and it may be dropped."""


class Offered(msgspec.Struct, frozen=True, tag=True):
    """Says that the receiver may fetch the transfer from now on."""

    heads: HeadRange
    """Heads that the sender's blocks hold."""


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Says where the blocks are to go. Sent by a receiver that keeps the offer."""

    transfer_id: Name
    grant: bytes
    first: NotNegative = 0
    """Position of the first wanted block among those offered; the receiver already has those before it."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Report of an instance about itself as a sender."""

    epoch: Name
    writing: list[Name]
    """Links over which it may still write."""


class Nothing(msgspec.Struct, frozen=True, tag=True):
    """A question or an answer with nothing in it."""


LINK: StreamMethod[Handshake, Any] = StreamMethod("kv.link", Handshake, LinkReply | Cancelled)
TELL: Method[Told, Nothing] = Method("kv.tell", Told, Nothing)
ASK: Method[Asked, Told] = Method("kv.ask", Asked, Told)
"""Question for a value of the rendezvous, answered as soon as either end has set it by TELL."""
BEGIN: Method[Begin, Accepted | UnknownLink] = Method("kv.begin", Begin, Accepted | UnknownLink)
PARTS: Notification[PartsAnnounced] = Notification("kv.parts", PartsAnnounced)
COMMIT: Method[Commit, Nothing] = Method("kv.commit", Commit, Nothing)
ABANDON: Method[Abandon, Nothing] = Method("kv.abandon", Abandon, Nothing)
KEEP: StreamMethod[Keep, Any] = StreamMethod("kv.keep", Keep, Offered)
FETCH: Method[Fetch, Nothing] = Method("kv.fetch", Fetch, Nothing)
ALIVE: Method[Nothing, Alive] = Method("kv.alive", Nothing, Alive)
