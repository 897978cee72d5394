"""Errors of hbserve_kv.

HBServeKVError
├── BackendUnavailable (ImportError)   a backend, or a library that it needs, is missing; says how to cure that
├── FingerprintMismatch (ValueError)   the peer's KV means something else; names the field and both values
├── TransferFailed (ConnectionError)   a transfer ended without its data; says the first cause
├── TransferTimeout (TimeoutError)     nothing came, or no room was given, before the deadline
├── AddressNotAvailable (OSError)      this machine does not have the address, or no peer could reach it there
├── BufferTooSmall (ValueError)        a message cannot fit the peer's lookup buffer, even when that is empty
└── BufferTooLarge (MemoryError)       this machine does not have the memory for the configured lookup buffer
"""


class HBServeKVError(Exception):
    """Base of every error of this package."""


class BackendUnavailable(HBServeKVError, ImportError):
    pass


class FingerprintMismatch(HBServeKVError, ValueError):
    pass


class TransferFailed(HBServeKVError, ConnectionError):
    pass


class TransferTimeout(HBServeKVError, TimeoutError):
    pass


class BufferTooSmall(HBServeKVError, ValueError):
    pass


class AddressNotAvailable(HBServeKVError, OSError):
    pass


class BufferTooLarge(HBServeKVError, MemoryError):
    pass
