"""KVTransferBase, which hbserve_kv owns: subclass it to move KV in a way of your own."""

from hbserve_kv.base import KVTransferBase as KVTransferBase

__all__ = ["KVTransferBase"]
