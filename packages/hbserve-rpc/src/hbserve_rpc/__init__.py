"""Typed messages, and RPC over ZeroMQ."""

from hbserve_rpc.client import RpcClient, RpcStream
from hbserve_rpc.errors import (
    AddressInUse,
    HBServeRpcError,
    InvalidRequest,
    LogitsNotFinite,
    Overloaded,
    PeerLost,
    ProtocolMismatch,
    RemoteError,
    RpcTimeout,
)
from hbserve_rpc.methods import Method, Notification, StreamMethod
from hbserve_rpc.sampling_params import SamplingParams
from hbserve_rpc.server import RpcServer

__all__ = [
    "AddressInUse",
    "HBServeRpcError",
    "InvalidRequest",
    "LogitsNotFinite",
    "Method",
    "Notification",
    "Overloaded",
    "PeerLost",
    "ProtocolMismatch",
    "RemoteError",
    "RpcClient",
    "RpcServer",
    "RpcStream",
    "RpcTimeout",
    "SamplingParams",
    "StreamMethod",
]
