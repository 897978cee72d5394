"""Figures of a KVTransferManager, as its `stats()` and `links()` return them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TransferStats:
    """Figures of one manager. Gauges tell the present state; counters count from the start of the manager."""

    active_transfers: int = 0
    num_offers: int = 0
    """Transfers that wait for a receiver to fetch them, or are being fetched."""
    buffered_bytes: int = 0
    num_quarantined: int = 0
    """Failed transfers that are not drained yet."""
    quarantined_blocks: int = 0
    """Blocks of these transfers, which are out of use. The log names the sender."""
    num_failed: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    busy_time_s: float = 0.0
    """Time during which parts were moving to or from this instance, added up over transfers."""
    dropped_messages: int = 0
    """Messages without effect: late, duplicate, unknown or of an earlier life."""
    dropped_frames: int = 0
    failed_notifications: int = 0
    """This and `dropped_frames` are counts of the server that peers talk to: see hbserve_rpc.counts.RpcFaults."""


@dataclass(frozen=True)
class LinkInfo:
    """One direction to or from a peer, while it is connected."""

    peer_rank: int
    is_sender: bool
    transport: str
    detail: str
    """What really carries the bytes, for example "TCP" or "GPU memory of this host"."""
