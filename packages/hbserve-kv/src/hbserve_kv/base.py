"""The public extension point: a KV transfer backend of your own. Imports no torch.

A subclass with `send_kv_cache` and `receive_kv_cache` is a full backend: `kv_transfer.backend: "module:Class"` (or an
entry point in the group `hbserve_kv.backends`) makes every PD run carry its KV with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class KVTransferBase(ABC):
    """Moves tensors between ranks, matched by request id.

    All methods run in the event loop of the instance and must not block it. Make threads if you need them.
    """

    def __init__(self, rank: int, options: Mapping[str, Any]) -> None:
        """`rank` is this instance's `kv_rank`; `options` is `kv_transfer.options` of the configuration."""
        self.rank = rank
        self.options = options

    async def start(self) -> None:  # noqa: B027  optional
        """Prepare the backend. Called once, before anything else. If it raises or is cancelled, it must leave nothing
        behind, because `close` is not called then."""

    async def close(self) -> None:  # noqa: B027  optional
        """Release everything. Called once, after everything else; must end what `send_kv_cache` and `receive_kv_cache`
        still wait for."""

    def describe(self) -> bytes:
        """Return what a peer needs to reach this rank, for example an address. It is sent to each peer at the
        handshake."""
        return b""

    async def connect(self, rank: int, description: bytes) -> None:  # noqa: B027  optional
        """Prepare for a peer, given its `rank` and its `describe()`.

        Called on both sides before the two exchange anything, and again when the peer was restarted.
        """

    @abstractmethod
    async def send_kv_cache(self, request_id: str, kv_buffer: "torch.Tensor", target_rank: int) -> None:
        """Send `kv_buffer` to the rank whose `receive_kv_cache` names the same `request_id`.

        HBServe calls this once for each part of a transfer, with an id that it uses only once, so a backend need not
        keep any order. The buffer is contiguous, of dtype uint8 and shape (num_blocks, block_bytes), on the CPU or a
        CUDA device. The method may read it until it returns, and no longer. It may return before the peer has received
        the data. It is cancelled when the peer will not receive it.

        Raises:
            Exception: any error fails the transfer; the receiver is told.
        """

    @abstractmethod
    async def receive_kv_cache(self, request_id: str, source_rank: int) -> "torch.Tensor":
        """Return the tensor that `source_rank` sent under `request_id`: the same bytes, in any shape and on any device.

        May be called before or after the peer's send; returns when the tensor is there. It is cancelled when the
        transfer is given up. Anything other than a tensor of the same number of bytes fails the transfer.
        """
