"""Memory of each rank that all ranks of the host have mapped and in which their kernels sum: see
cuda_runner/kernels/rank_sum.py.

It is mapped by hbserve_kv in the same way as KV pools, and is tried before it is used: there are hosts whose GPUs
report that they can access each other's memory although they cannot.
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
"""Largest sum of two ranks that counts as one of few rows, as described in docs/performance-kernels.md."""
MANY_BYTES = 64 << 20
"""Largest sum of many rows of two ranks. Larger ones are summed in parts."""
MANY_BYTES_OF_MORE = 32 << 20
"""Largest sum of many rows of more ranks, to be divided by the square of the number of other ranks. NCCL does larger
sums."""
TRIAL_TIMEOUT_S = 60.0
"""Longest time that the trial may take, in which kernels may be compiled."""
END_TIMEOUT_S = 2.0
_OFFSET_BYTES = 8


class MappedMemory:
    """Memory of one rank, together with that of all other ranks as this rank has mapped it."""

    def __init__(self, shard: Shard, device: torch.device, store: Store, few_bytes: int = FEW_BYTES) -> None:
        """few_bytes: size of the largest sum that the kernel for few rows does.

        Raises:
            OSError: this rank cannot map the memory of another.
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
        torch.cuda.current_stream(device).synchronize()  # the zeros must be there before others write
        try:
            for rank, name in enumerate(_exchange(shard, store, self._name())):
                bases[rank] = self._own.data_ptr() if rank == shard.rank else self._map(name)
        except BaseException:
            self._mapped.close()
            raise
        self.shared.bases.copy_(bases)

    def _name(self) -> bytes:
        """Return the name by which others can map this rank's memory, or b"" if it has none."""
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
        """Return whether sums of both kinds are right. All ranks call it at the same time."""
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
        """Return where to write many rows (T, E) for the next sum. None for few rows, which may lie anywhere, and for
        too many.

        Two places take turns, because others may read one place until the sum after that of its rows. A step begins
        with a sum of rows that lie elsewhere, so it does not matter at which place the last step ended.
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
        """Sum rows over all ranks: see `rank_sum`. `can_sum`, or with parts `can_sum_parts`, must be true for them."""
        self._stream = torch.cuda.current_stream(self._device)
        start = self._start(partial)
        where = start if self._is_mapped(start) else None
        return rank_sum(partial, self.shared, start=where, add_to=add_to, norm=norm, normed_to=normed_to, parts=parts)

    def can_sum(self, partial: torch.Tensor) -> bool:
        """Return whether `partial` is small and consists of whole words, or lies at a place for many rows."""
        return self.can_sum_parts(partial) or self._is_mapped(self._start(partial))

    def can_sum_parts(self, partial: torch.Tensor) -> bool:
        """Return whether `partial` is small and consists of whole words."""
        return partial.nbytes <= self.shared.few_bytes and partial.shape[1] * partial.dtype.itemsize % 4 == 0

    def _start(self, partial: torch.Tensor) -> int:
        return partial.data_ptr() - self._own.data_ptr()

    def _is_mapped(self, start: int) -> bool:
        return 0 <= start < self._own.nbytes

    def check(self) -> None:
        """Raise RankFailed if a sum has waited for too long."""
        if self.shared.host_word.item() == LATE:
            raise RankFailed(f"rank {self.shared.rank} has waited too long for the others' part of a sum")

    def end_sums(self) -> None:
        """Let kernels that wait continue with whatever is there. No more kernels are launched. May be called from any
        thread."""
        self.shared.host_word.fill_(CLOSED)

    def close(self) -> None:
        """Unmap the memory of other ranks, after `end_sums`."""
        try:
            if self._ends_within(END_TIMEOUT_S):
                self._mapped.close()
            else:
                logger.error("rank %d: memory of others stays mapped: its kernels do not end", self.shared.rank)
        except (RuntimeError, OSError):  # the device has failed
            logger.exception("rank %d: memory of others stays mapped", self.shared.rank)

    def _ends_within(self, timeout_s: float) -> bool:
        """Wait, and return whether all sums that were launched have ended in time."""
        deadline_s = time.monotonic() + timeout_s
        while self._stream is not None and not self._stream.query():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.001)
        return True


def _limits(num_ranks: int, few_bytes: int) -> tuple[int, int]:
    """Return the bytes of the largest sums of few rows and of many rows. Each rank reads the rows of all others,
    whereas NCCL sends a row no more than twice, so more ranks leave more to NCCL. That follows from the number of
    bytes; only two ranks have been measured."""
    others = num_ranks - 1
    few, many = few_bytes // others, MANY_BYTES if others == 1 else MANY_BYTES_OF_MORE // others**2
    return few - few % FLAG_BYTES, many - many % FLAG_BYTES


def _exchange(shard: Shard, store: Store, own: bytes) -> list[bytes]:
    """Return the names that all ranks give, in the order of ranks."""
    store.set(f"memory of {shard.rank}", own.hex())
    return [bytes.fromhex(store.get(f"memory of {rank}").decode()) for rank in range(shard.size)]
