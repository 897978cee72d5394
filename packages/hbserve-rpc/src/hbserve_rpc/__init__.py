"""Typed messages, and RPC over ZeroMQ."""

from hbserve_rpc.address import canonical_host, check_host, check_peer_host, format_address, parse_address
from hbserve_rpc.client import RpcClient
from hbserve_rpc.connected_client import Peer, calling_peer
from hbserve_rpc.errors import (
    AddressInUse,
    EngineFailed,
    HBServeRpcError,
    InvalidAddress,
    InvalidRequest,
    KeysError,
    KVTransferFailed,
    LogitsNotFinite,
    NotAllowed,
    Overloaded,
    PeerDied,
    PeerLost,
    ProtocolMismatch,
    RemoteError,
    RequestTimeout,
    RpcTimeout,
    Unavailable,
)
from hbserve_rpc.keys import Keys, load_keys, make_keys
from hbserve_rpc.methods import Method, Notification, StreamMethod
from hbserve_rpc.rpc_stream import RpcStream
from hbserve_rpc.sampling_params import SamplingParams
from hbserve_rpc.server import RpcServer
from hbserve_rpc.structured_outputs import StructuredOutputsParams

__all__ = [
    "AddressInUse",
    "EngineFailed",
    "HBServeRpcError",
    "InvalidAddress",
    "InvalidRequest",
    "KVTransferFailed",
    "Keys",
    "KeysError",
    "LogitsNotFinite",
    "Method",
    "NotAllowed",
    "Notification",
    "Overloaded",
    "Peer",
    "PeerDied",
    "PeerLost",
    "ProtocolMismatch",
    "RemoteError",
    "RequestTimeout",
    "RpcClient",
    "RpcServer",
    "RpcStream",
    "RpcTimeout",
    "SamplingParams",
    "StreamMethod",
    "StructuredOutputsParams",
    "Unavailable",
    "calling_peer",
    "canonical_host",
    "check_host",
    "check_peer_host",
    "format_address",
    "load_keys",
    "make_keys",
    "parse_address",
]
