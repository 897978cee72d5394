"""What a KV transfer is configured with. Imports no torch."""

from enum import StrEnum
from typing import Any

import msgspec


class KVTransferBackend(StrEnum):
    """The backends that ship with hbserve_kv. A custom one is named by entry point or `module:Class` instead."""

    NCCL = "nccl"
    """torch.distributed: NCCL between GPUs, Gloo where memory is on the CPU or both sides share one GPU."""
    MOONCAKE = "mooncake"
    """Mooncake's TransferEngine: one-sided writes over TCP or RDMA."""


class KVTransferConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How one instance moves KV."""

    backend: str = KVTransferBackend.NCCL.value
    """A built-in backend, the name of an entry point in the group `hbserve_kv.backends`, or `module:Class`."""
    buffer_size: int = 1 << 30
    """Bytes of the lookup buffer, where transfers wait that nobody has asked for yet. Touched as it is used."""
    host: str = "127.0.0.1"
    """Address that the control server binds, and that peers are told."""
    port: int = 0
    """Port of the control server; 0 lets the OS choose."""
    timeout_s: float = 30.0
    """A peer that is silent for so long has failed."""
    expiry_s: float = 120.0
    """An unexpected transfer that nobody asked for in this time is dropped from the lookup buffer."""
    options: dict[str, Any] = {}
    """Handed to a custom backend."""
