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

from hbserve_core.cuda_runner.kernels.experts import ExpertParts
from hbserve_core.cuda_runner.kernels.rank_sum import CLOSED, FLAG_BYTES, LATE, MOST_PROGRAMS, SharedMemory, rank_sum
from hbserve_core.errors import RankFailed
from hbserve_core.model.shard import Shard
from hbserve_kv.memory import cuda_ipc

logger = logging.getLogger(__name__)

FEW_BYTES = 1 << 20
"""Of two ranks: up to here a sum is one of few rows, as docs/performance-kernels.md has it."""
MANY_BYTES = 64 << 20
"""Of two ranks: of many rows, which are summed in parts where they are more."""
MANY_BYTES_OF_MORE = 32 << 20
"""Of more ranks, by the square of how many others there are: from there on NCCL sums."""
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
        self._turn = 0
        numbers = torch.ones(MOST_PROGRAMS, dtype=torch.int32, device=device)
        device_word = torch.zeros(1, dtype=torch.int32, device=device)
        host_word = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        bases = torch.zeros(shard.size, dtype=torch.int64)
        self.shared = SharedMemory(
            shard.rank, shard.size, bases.to(device), numbers, device_word, host_word, *_limits(shard.size, few_bytes)
        )
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
        for rows in (1, 2):
            numbers = torch.arange(rows * 1024, dtype=torch.float32, device=self._device).view(rows, 1024)
            partial = numbers * (rank + 1)
            if rows > 1:
                partial = self._place(0, (rows, 1024), partial.dtype).copy_(partial)
            total, _ = self.sum(partial)
            if not self._ends_within(TRIAL_TIMEOUT_S):
                self.end_sums()
                return False
            right = right and torch.equal(total, numbers * (size * (size + 1) // 2))
        return right

    def partial(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        """Where to write many rows (T, E) for the next sum; None for few, which may lie anywhere, and for too many.

        Two places take turns: others may read one until the sum that follows on that of its rows. A step begins with a
        sum of rows that lie elsewhere, so it does not matter at which place the last one has ended.
        """
        if not self.shared.few_bytes < shape[0] * shape[1] * dtype.itemsize <= self.shared.many_bytes:
            return None
        self._turn = 1 - self._turn
        return self._place(self._turn, shape, dtype)

    def _place(self, turn: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        start = self.shared.many_start + turn * self.shared.many_bytes
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        return self._own[start : start + num_bytes].view(dtype).view(shape)

    def sum(
        self,
        partial: torch.Tensor,
        add_to: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, float] | None = None,
        normed_to: torch.Tensor | None = None,
        parts: ExpertParts | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `rank_sum`. Of rows that `can_sum`, or with parts `can_sum_parts`."""
        self._stream = torch.cuda.current_stream(self._device)
        start = self._start(partial)
        where = start if self._is_mapped(start) else None
        return rank_sum(partial, self.shared, start=where, add_to=add_to, norm=norm, normed_to=normed_to, parts=parts)

    def can_sum(self, partial: torch.Tensor) -> bool:
        """Whether it is small, of whole words, or at a place for many rows."""
        return self.can_sum_parts(partial) or self._is_mapped(self._start(partial))

    def can_sum_parts(self, partial: torch.Tensor) -> bool:
        """Whether it is small, of whole words."""
        return partial.nbytes <= self.shared.few_bytes and partial.shape[1] * partial.dtype.itemsize % 4 == 0

    def _start(self, partial: torch.Tensor) -> int:
        return partial.data_ptr() - self._own.data_ptr()

    def _is_mapped(self, start: int) -> bool:
        return 0 <= start < self._own.nbytes

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


def _limits(num_ranks: int, few_bytes: int) -> tuple[int, int]:
    """Bytes of the largest sums of few rows and of many. Each rank reads what all others have, while NCCL sends a row
    no more than twice: the more ranks, the more is left to it. That follows from the bytes; two have been measured."""
    others = num_ranks - 1
    few, many = few_bytes // others, MANY_BYTES if others == 1 else MANY_BYTES_OF_MORE // others**2
    return few - few % FLAG_BYTES, many - many % FLAG_BYTES


def _exchange(shard: Shard, store: Store, own: bytes) -> list[bytes]:
    """What every rank says, in their order."""
    store.set(f"memory of {shard.rank}", own.hex())
    return [bytes.fromhex(store.get(f"memory of {rank}").decode()) for rank in range(shard.size)]
