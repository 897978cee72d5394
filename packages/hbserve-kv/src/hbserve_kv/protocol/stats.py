"""Figures of a KVTransferManager, as its `stats()` and `links()` return them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TransferStats:
    """Gauges are of now, counters from the start."""

    active_transfers: int = 0
    num_offers: int = 0
    """Transfers that wait for a receiver to fetch them, or are being fetched."""
    buffered_bytes: int = 0
    num_quarantined: int = 0
    """Failed transfers that are not drained yet."""
    quarantined_blocks: int = 0
    """Blocks of those: out of use. The log names the sender."""
    num_failed: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    busy_time_s: float = 0.0
    """Time during which parts were moving to or from this instance, added up over transfers."""
    dropped_messages: int = 0
    """Late, duplicate, unknown or of an earlier life: without effect."""
    dropped_frames: int = 0
    failed_notifications: int = 0
    """As hbserve_rpc.counts.RpcFaults: of the server that peers talk to."""


@dataclass(frozen=True)
class LinkInfo:
    """One direction to or from a peer, while it is connected."""

    peer_rank: int
    is_sender: bool
    transport: str
    detail: str
    """What really carries the bytes, for example "TCP" or "GPU memory of this host"."""
