"""Memory of each rank that all ranks of the host have mapped, in which their kernels sum: see
cuda_runner/kernels/rank_sum.py.

It is mapped by hbserve_kv's own way, as KV pools are, and tried before it is used: there are hosts whose GPUs say that
they reach each other, and do not.
"""

import contextlib
import logging
import time

import torch
from torch.distributed.distributed_c10d import Store

from hbserve_core.cuda_runner.kernels.rank_sum import CLOSED, LATE, MOST_PROGRAMS, SharedMemory, rank_sum
from hbserve_core.errors import RankFailed
from hbserve_core.model.shard import Shard
from hbserve_kv.memory import cuda_ipc

logger = logging.getLogger(__name__)

FEW_BYTES = 512 << 10
"""Up to here a sum is one of few rows (docs/performance.md)."""
MANY_BYTES = 32 << 20
TRIAL_TIMEOUT_S = 60.0
"""Kernels may be compiled in it."""
END_TIMEOUT_S = 2.0
_OFFSET_BYTES = 8


class MappedMemory:
    """One rank's own, and that of all others as it has mapped it."""

    def __init__(self, shard: Shard, device: torch.device, store: Store, few_bytes: int = FEW_BYTES) -> None:
        """few_bytes: of the largest sum by the kernel for few rows.

        Raises:
            OSError: this rank cannot map another's.
        """
        self._device = device
        self._mapped = contextlib.ExitStack()
        self._stream: torch.cuda.Stream | None = None
        numbers = torch.ones(MOST_PROGRAMS, dtype=torch.int32, device=device)
        host_word = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        bases = torch.zeros(shard.size, dtype=torch.int64)
        self.shared = SharedMemory(shard.rank, shard.size, bases.to(device), numbers, host_word, few_bytes, MANY_BYTES)
        self._own = torch.zeros(self.shared.num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()  # zeros before others write
        try:
            for rank, name in enumerate(_exchange(shard, store, self._name())):
                bases[rank] = self._own.data_ptr() if rank == shard.rank else self._map(name)
        except BaseException:
            self._mapped.close()
            raise
        self.shared.bases.copy_(bases)

    def _name(self) -> bytes:
        """b"" if it has none."""
        try:
            handle, offset = cuda_ipc.name_memory(self._own.data_ptr(), self._own.nbytes, self._device)
        except OSError as error:
            logger.info("memory of this rank cannot be mapped by others: %s", error)
            return b""
        return offset.to_bytes(_OFFSET_BYTES, "big") + handle

    def _map(self, name: bytes) -> int:
        if not name:
            raise OSError("another rank's memory has no name")
        base = self._mapped.enter_context(cuda_ipc.mapped(name[_OFFSET_BYTES:], self._device))
        return base + int.from_bytes(name[:_OFFSET_BYTES], "big")

    def adds(self) -> bool:
        """Whether sums of both kinds are right. Called by all ranks at once."""
        rank, size = self.shared.rank, self.shared.num_ranks
        right = True
        for rows in (1, FEW_BYTES // 4096 + 1):
            numbers = torch.arange(rows * 1024, dtype=torch.float32, device=self._device).view(rows, 1024)
            total, _ = self.sum(numbers * (rank + 1))
            if not self._ends_within(TRIAL_TIMEOUT_S):
                self.shared.host_word.fill_(CLOSED)
                return False
            right = right and torch.equal(total, numbers * (size * (size + 1) // 2))
        return right

    def fits(self, partial: torch.Tensor) -> bool:
        """Whether it can sum such rows (T, E), and is faster than NCCL."""
        return partial.nbytes <= self.shared.few_bytes and partial.shape[1] % 2 == 0

    def sum(
        self,
        partial: torch.Tensor,
        add_to: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `rank_sum`."""
        self._stream = torch.cuda.current_stream(self._device)
        return rank_sum(partial, self.shared, add_to=add_to, norm=norm)

    def check(self) -> None:
        """Raises RankFailed: a sum has waited for too long."""
        if self.shared.host_word.item() == LATE:
            raise RankFailed(f"rank {self.shared.rank} has waited too long for the others' part of a sum")

    def end_sums(self) -> None:
        """Let kernels that wait go on, with whatever is there; nobody launches others. From any thread."""
        self.shared.host_word.fill_(CLOSED)

    def close(self) -> None:
        """After `end_sums`: give the others' memory back."""
        try:
            if self._ends_within(END_TIMEOUT_S):
                self._mapped.close()
            else:
                logger.error("rank %d: memory of others stays mapped: its kernels do not end", self.shared.rank)
        except (RuntimeError, OSError):  # of a device that has failed
            logger.exception("rank %d: memory of others stays mapped", self.shared.rank)

    def _ends_within(self, timeout_s: float) -> bool:
        """Whether all sums that were launched have ended in that time."""
        deadline_s = time.monotonic() + timeout_s
        while self._stream is not None and not self._stream.query():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.001)
        return True


def _exchange(shard: Shard, store: Store, own: bytes) -> list[bytes]:
    """What every rank says, in their order."""
    store.set(f"memory of {shard.rank}", own.hex())
    return [bytes.fromhex(store.get(f"memory of {rank}").decode()) for rank in range(shard.size)]
