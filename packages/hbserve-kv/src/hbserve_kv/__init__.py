"""KV-cache transfer between LLM engines: blocks of a paged pool, or whole tensors, over several backends."""

from hbserve_kv.base import KVTransferBase
from hbserve_kv.config import KVTransferBackend, KVTransferConfig
from hbserve_kv.errors import (
    BackendUnavailable,
    BufferTooSmall,
    FingerprintMismatch,
    HBServeKVError,
    TransferFailed,
    TransferTimeout,
)
from hbserve_kv.manager import KVTransferManager, PostedReceive, TransferStats
from hbserve_kv.receiver import TransferResult
from hbserve_kv.sender import OutgoingTransfer
from hbserve_kv.transfer_state import Outcome

__all__ = [
    "BackendUnavailable",
    "BufferTooSmall",
    "FingerprintMismatch",
    "HBServeKVError",
    "KVTransferBackend",
    "KVTransferBase",
    "KVTransferConfig",
    "KVTransferManager",
    "Outcome",
    "OutgoingTransfer",
    "PostedReceive",
    "TransferFailed",
    "TransferResult",
    "TransferStats",
    "TransferTimeout",
]
