"""Errors of hbserve_rpc.

HBServeRpcError
├── InvalidRequest (ValueError)          the request is wrong; sending it again cannot help
├── LogitsNotFinite (FloatingPointError) the model gives NaN or infinity for this request, on any instance
├── Overloaded                           refused for lack of room; after `retry_after_s` it may pass
├── RpcTimeout (TimeoutError)            no answer before the call's deadline
├── PeerLost (ConnectionError)           the peer's heartbeats stopped, or it ended in order during the call
│   ├── PeerDied                         its process has ended, and not in order
│   └── NotAllowed                       it does not let this side in: one has no keys, or keys unknown to the other
├── InvalidAddress (ValueError)          a host or address that cannot be one; has what is expected instead
├── AddressInUse (OSError)               the address to serve on belongs to another process
├── KeysError (ValueError)               keys that cannot be used; has the file, or what is missing
├── ProtocolMismatch                     the peer speaks another protocol version
└── RemoteError                          the peer's handler failed; its message is kept
    ├── EngineFailed                     the engine can compute nothing any more, for any request
    ├── KVTransferFailed                 the KV of a request did not get from one instance to the other
    ├── RequestTimeout (TimeoutError)    the request did not end before the deadline that the deployment sets
    └── Unavailable                      nobody is there who could serve the request; later somebody may be
"""

from typing import ClassVar


class HBServeRpcError(Exception):
    """Base of every error of this package."""

    code: ClassVar[str] = "internal"
    """Name of the error on the wire."""


class InvalidRequest(HBServeRpcError, ValueError):
    code = "invalid_request"


class LogitsNotFinite(HBServeRpcError, FloatingPointError):
    code = "logits_not_finite"


class Overloaded(HBServeRpcError):
    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Time to wait before another try; an earlier one is of no use."""


class RpcTimeout(HBServeRpcError, TimeoutError):
    code = "timeout"


class PeerLost(HBServeRpcError, ConnectionError):
    code = "peer_lost"


class PeerDied(PeerLost):
    pass


class NotAllowed(PeerLost):
    code = "not_allowed"


class KeysError(HBServeRpcError, ValueError):
    code = "keys"


class InvalidAddress(HBServeRpcError, ValueError):
    code = "invalid_address"


class AddressInUse(HBServeRpcError, OSError):
    code = "address_in_use"


class ProtocolMismatch(HBServeRpcError):
    code = "protocol_mismatch"


class RemoteError(HBServeRpcError):
    code = "internal"


class EngineFailed(RemoteError):
    code = "engine_failed"


class KVTransferFailed(RemoteError):
    code = "kv_transfer_failed"


class RequestTimeout(RemoteError, TimeoutError):
    code = "request_timeout"


class Unavailable(RemoteError):
    code = "unavailable"
