"""KV-cache transfer between LLM engines: blocks of a paged pool, or whole tensors, over several backends.

torch is imported with the first name that needs it: who only configures transfers does not wait for it.
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
from hbserve_kv.figures import LinkInfo, TransferStats
from hbserve_kv.heads import HeadRange
from hbserve_kv.transfer_state import Outcome

if TYPE_CHECKING:
    from hbserve_kv.incoming import TransferResult
    from hbserve_kv.manager import KVTransferManager, PostedReceive
    from hbserve_kv.outgoing import OutgoingTransfer
    from hbserve_kv.shared_memory import shared_empty
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

_NEED_TORCH = {
    "DrainUnknown": "transport",
    "KVTransferManager": "manager",
    "Link": "transport",
    "OutgoingTransfer": "outgoing",
    "Part": "transport",
    "PostedReceive": "manager",
    "TransferResult": "incoming",
    "Transport": "transport",
    "shared_empty": "shared_memory",
}


def __getattr__(name: str) -> Any:
    """Called for names that are not here yet (PEP 562)."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
