"""KV transfer, which hbserve_kv owns."""

from hbserve_kv.base import KVTransferBase as KVTransferBase
from hbserve_kv.manager import KVTransferManager as KVTransferManager

__all__ = ["KVTransferBase", "KVTransferManager"]
