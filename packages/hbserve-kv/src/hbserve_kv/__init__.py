"""KV-cache transfer between LLM engines: blocks of a paged pool, or whole tensors, over several backends.

Names that are not needed to configure transfers are imported when they are first used. torch is an extra and is
imported with the first tensor; without it, `ipc` and `mooncake` serve host memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from hbserve_kv.protocol.stats import LinkInfo, TransferStats
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult

if TYPE_CHECKING:
    from hbserve_kv.manager import KVTransferManager
    from hbserve_kv.memory.layout import HeadRange
    from hbserve_kv.memory.pool_layout import PoolLayout
    from hbserve_kv.memory.shared_memory import shared_buffer, shared_empty
    from hbserve_kv.protocol.messages import join_grants
    from hbserve_kv.receiving.claims import Claim, SourceRank
    from hbserve_kv.receiving.transfer import PostedReceive
    from hbserve_kv.sending.offers import Offer
    from hbserve_kv.sending.transfer import OutgoingTransfer, SendTransfer
    from hbserve_kv.transports.base import DrainUnknown, Link, Part, Transport

__all__ = [
    "AddressNotAvailable",
    "BackendUnavailable",
    "BufferTooLarge",
    "BufferTooSmall",
    "Claim",
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
    "Offer",
    "Outcome",
    "OutgoingTransfer",
    "Part",
    "PoolLayout",
    "PostedReceive",
    "SendTransfer",
    "SourceRank",
    "TransferFailed",
    "TransferResult",
    "TransferStats",
    "TransferTimeout",
    "Transport",
    "join_grants",
    "shared_buffer",
    "shared_empty",
]

_LATER = {
    "Claim": "receiving.claims",
    "DrainUnknown": "transports.base",
    "HeadRange": "memory.layout",
    "KVTransferManager": "manager",
    "Link": "transports.base",
    "Offer": "sending.offers",
    "OutgoingTransfer": "sending.transfer",
    "Part": "transports.base",
    "PoolLayout": "memory.pool_layout",
    "PostedReceive": "receiving.transfer",
    "SendTransfer": "sending.transfer",
    "SourceRank": "receiving.claims",
    "Transport": "transports.base",
    "join_grants": "protocol.messages",
    "shared_buffer": "memory.shared_memory",
    "shared_empty": "memory.shared_memory",
}


def __getattr__(name: str) -> Any:
    """Import a name of `_LATER` when it is first used (PEP 562)."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
