"""Configuration of KV transfers. Imports no torch."""

import socket
from enum import StrEnum
from typing import Annotated

from hbserve_kv.errors import AddressNotAvailable
from hbserve_rpc import InvalidAddress, Keys, check_peer_host
from hbserve_rpc.address import is_own_address
from hbserve_rpc.settings import PORT, Bounds, KVTransferSettings, misfits

GOODBYE_TIMEOUT_S = 1.0
"""How long a manager that is being closed gives its peers, on either side, to hear how their transfers ended."""


class KVTransferBackend(StrEnum):
    """The backends that ship with hbserve_kv. A custom one is named by entry point or `module:Class` instead."""

    NCCL = "nccl"
    """torch.distributed: NCCL between GPUs, Gloo where memory is on the CPU or both sides share one GPU."""
    MOONCAKE = "mooncake"
    """Mooncake's TransferEngine: one-sided writes over TCP or RDMA."""
    IPC = "ipc"
    """Direct writes between processes of one host: the sender maps the receiver's memory, by CUDA IPC on GPUs."""
    AUTO = "auto"
    """The first backend that works for each pair: ipc on one host, mooncake where there is RDMA, else nccl."""


class KVTransferConfig(KVTransferSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one instance for moving KV.

    Raises:
        ValueError: a value is wrong; names the field, the value and what is allowed.
    """

    host: str = "127.0.0.1"
    """Address that the control server binds and that peers are given: an IP address without brackets, or a name."""
    port: Annotated[int, PORT] = 0
    """Port of the control server; 0 lets the OS choose."""
    keys: Keys | None = None
    """Keys of this instance. With keys, the control server lets in only instances that have keys too; without, anybody
    who reaches it."""
    expiry_s: Annotated[float, Bounds(0.0)] = 120.0
    """Seconds after which a transfer is given up for which the other side has not come: an unexpected one that nobody
    has asked for is dropped from the lookup buffer, and a posted receive fails if not all of its senders have begun."""

    def __post_init__(self) -> None:
        for _, problem in misfits(self):
            raise ValueError(problem)

    def check_host(self) -> None:
        """Refuse a `host` that cannot work, before anything waits for it. May ask a name server.

        Raises:
            AddressNotAvailable: `host` is not an address, not one that peers could reach (0.0.0.0, ::), not one of this
                machine, or an unknown name.
        """
        try:
            check_peer_host(self.host)
        except InvalidAddress as error:
            raise AddressNotAvailable(f"kv_transfer.ip={error}") from error
        cure = "use an address of this machine that its peers reach, or none for the one that the instance serves on"
        try:
            found = {place[:2] for *_, place in socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)}
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME:
                raise AddressNotAvailable(f"kv_transfer.ip={self.host!r}: this name is unknown; {cure}") from error
            raise
        if not any(is_own_address(str(address)) for address, _ in found):
            raise AddressNotAvailable(f"kv_transfer.ip={self.host!r}: this machine does not have it; {cure}")
