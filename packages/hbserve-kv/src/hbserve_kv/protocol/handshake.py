"""The first exchange between the two ends of a link, which makes sure that their KV means the same, and chooses the
transport that carries it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hbserve_kv.errors import FingerprintMismatch
from hbserve_kv.memory.layout import HeadRange, Layout
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.messages import Handshake, LinkReply
from hbserve_kv.transports.base import Transport
from hbserve_rpc import InvalidAddress, InvalidRequest, parse_address

KV_PROTOCOL = "protocol of hbserve_kv"
"""Name of this protocol in errors about two versions; hbserve_rpc has a protocol version of its own."""


@dataclass(frozen=True)
class Identity:
    """What an instance tells its peers about itself."""

    rank: int
    epoch: str
    fingerprint: dict[str, str | int]
    heads: HeadRange
    layout: Layout
    """Layout of its pool."""
    name: str = ""
    """Name of the instance, to which receivers may grant transfers."""


def common_heads(hello: Handshake, me: Identity) -> HeadRange:
    """Compare the two sides of a handshake, and return the heads that both have.

    Raises:
        InvalidRequest: a field of the fingerprint differs, or the layouts differ in a way that cannot be bridged, or
            the two have no head in common; says which, and both values. Or `hello.address` is not an address.
    """
    try:
        parse_address(hello.address)
    except InvalidAddress as error:
        raise InvalidRequest(f"address={error}") from None
    mine = me.fingerprint | {KV_PROTOCOL: messages.PROTOCOL_VERSION, "num_kv_heads": me.heads.total}
    theirs = hello.fingerprint | {KV_PROTOCOL: hello.protocol_version, "num_kv_heads": hello.heads.total}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise _mismatch(name, theirs.get(name), hello.rank, mine.get(name), me.rank)
    return _common_heads(hello, me)


def check_reply(reply: object, me: Identity, offers: Collection[str]) -> None:
    """Check the answer to a handshake. Raises InvalidRequest if it is no answer to these offers, or if the two sides do
    not fit after all, although the peer should have compared them."""
    if not isinstance(reply, LinkReply):
        raise InvalidRequest(f"it answers a handshake with {type(reply).__name__}")
    if reply.transport not in offers:
        raise InvalidRequest(f"it has chosen transport={reply.transport!r}, of {_names(offers)}")
    if reply.heads.total != me.heads.total:
        raise _mismatch("num_kv_heads", reply.heads.total, reply.rank, me.heads.total, me.rank)
    _common_heads(reply, me)


def _common_heads(peer: Handshake | LinkReply, me: Identity) -> HeadRange:
    if peer.layout.num_heads != peer.heads.count:
        raise _mismatch("heads of its pool", peer.layout.num_heads, peer.rank, peer.heads.count, peer.rank)
    if found := me.layout.mismatch(peer.layout):
        name, their_value, my_value = found
        raise _mismatch(name, their_value, peer.rank, my_value, me.rank)
    common = me.heads.common(peer.heads)
    if common is None:
        raise _mismatch("heads", list(peer.heads.heads()), peer.rank, list(me.heads.heads()), me.rank)
    return common


def _mismatch(name: str, theirs: object, their_rank: int, mine: object, my_rank: int) -> InvalidRequest:
    return InvalidRequest(
        f"{FingerprintMismatch.__name__}: {name} is {theirs!r} on rank {their_rank} and {mine!r} on rank {my_rank}"
    )


def choose_transport(
    hello: Handshake, transports: Mapping[str, Transport], rank: int
) -> tuple[Transport, dict[str, str]]:
    """Return the sender's best offer that works from here too, and for each better one, why it does not.

    Raises:
        InvalidRequest: no offer works; says why, for each.
    """
    passed_over = {}
    for name, description in hello.offers.items():
        if name not in transports:
            passed_over[name] = f"rank {rank} does not have it"
        elif reason := _unreachable(transports[name], description):
            passed_over[name] = reason
        else:
            return transports[name], passed_over
    if not hello.offers.keys() & transports.keys():
        raise _mismatch("kv_transfer.backend", _names(hello.offers), hello.rank, _names(transports), rank)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise InvalidRequest(f"no transport connects rank {hello.rank} and rank {rank}: {reasons}")


def _unreachable(transport: Transport, description: bytes) -> str:
    try:
        return transport.unreachable(description)
    except Exception as error:  # whatever a backend raises because of what a peer has sent
        return f"cannot be read: {error}"


def _names(transports: Collection[str]) -> str:
    return ", ".join(transports)
