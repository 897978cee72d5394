"""KV-cache transfer between LLM engines: blocks of a paged pool, or whole tensors, over several backends."""

from hbserve_kv.base import KVTransferBase
from hbserve_kv.config import KVTransferBackend, KVTransferConfig
from hbserve_kv.errors import (
    AddressNotAvailable,
    BackendUnavailable,
    BufferTooLarge,
    BufferTooSmall,
    FingerprintMismatch,
    HBServeKVError,
    TransferFailed,
    TransferTimeout,
)
from hbserve_kv.figures import LinkInfo, TransferStats
from hbserve_kv.heads import HeadRange
from hbserve_kv.incoming import TransferResult
from hbserve_kv.manager import KVTransferManager, PostedReceive
from hbserve_kv.outgoing import OutgoingTransfer
from hbserve_kv.shared_memory import shared_empty
from hbserve_kv.transfer_state import Outcome
from hbserve_kv.transport import DrainUnknown, Link, Part, Transport

__all__ = [
    "AddressNotAvailable",
    "BackendUnavailable",
    "BufferTooLarge",
    "BufferTooSmall",
    "DrainUnknown",
    "FingerprintMismatch",
    "HBServeKVError",
    "HeadRange",
    "KVTransferBackend",
    "KVTransferBase",
    "KVTransferConfig",
    "KVTransferManager",
    "Link",
    "LinkInfo",
    "Outcome",
    "OutgoingTransfer",
    "Part",
    "PostedReceive",
    "TransferFailed",
    "TransferResult",
    "TransferStats",
    "TransferTimeout",
    "Transport",
    "shared_empty",
]
