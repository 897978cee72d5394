"""RankGroup over torch.distributed: NCCL between GPUs, Gloo on the CPU. GPUs that can access each other's memory sum
with our own kernels (mapped_memory.py).

The group is made directly on a store and not by init_process_group, so nothing is global and several instances can live
in one process.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from hbserve_core.errors import RankFailed
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.shard import Shard

if TYPE_CHECKING:
    from hbserve_core.ranks.mapped_memory import MappedMemory

logger = logging.getLogger(__name__)

RENDEZVOUS_TIMEOUT_S = 30.0
"""Longest time that all ranks may take to find each other. By then every one of them is known to be running."""
COLLECTIVE_TIMEOUT_S = 600.0
"""Timeout of a collective operation, as the last resort: a rank that is lost is noticed within seconds by other means
(see workers.py). It must be longer than the time by which one rank may finish loading its weights after another."""
CLOSE_TIMEOUT_S = 5.0
LOOK_EVERY = timedelta(seconds=0.2)
"""Interval at which a wait for Gloo checks whether the group is closed. When a rank dies in the middle of a message,
Gloo forgets who waits for that message, and its abort does nothing."""
_HOST = "127.0.0.1"
# Public, but not in the stubs' __all__.
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
AllgatherOptions: Any = dist.distributed_c10d.AllgatherOptions  # type: ignore[attr-defined]


class DistributedRankGroup(RankGroup):
    """Group of ranks in processes, or threads, of their own. On a GPU everything but `least` is queued on the current
    stream, may be captured in a graph, and is not waited for."""

    def __init__(self, shard: Shard, device: torch.device, store: Store, seed: int) -> None:
        """Make a group that is not connected yet: call `connect` next."""
        self.shard = shard
        self.seed = seed
        self._device = device
        self._store = store
        self._sum = dist.AllreduceOptions()
        self._sum.asyncOp = False
        self._minimum = dist.AllreduceOptions()
        self._minimum.reduceOp = dist.ReduceOp.MIN
        self._minimum.asyncOp = False
        self._broadcast = dist.BroadcastOptions()  # from rank 0
        self._broadcast.asyncOp = False
        self._gather = AllgatherOptions()
        self._gather.asyncOp = False
        self._process_group: Any = None
        self._memory: MappedMemory | None = None
        self._closing: threading.Thread | None = None
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Connect to the other ranks. Returns when all ranks are connected; raises RankFailed."""
        store = PrefixStore("ranks", self._store)
        with self._checked():
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                self._process_group = self._make_nccl(store)
            else:
                self._process_group = self._make_gloo(store)
        self.least(0)  # NCCL connects at the first use
        if self._device.type == "cuda" and self.shard.size > 1:
            self._memory = self._map_memory(PrefixStore("memory", self._store))

    def _map_memory(self, store: Store) -> "MappedMemory | None":
        """Map the memory of all ranks, either on all ranks or on none."""
        from hbserve_core.ranks.mapped_memory import MappedMemory  # Triton may be missing on systems without CUDA

        memory = None
        try:
            memory = MappedMemory(self.shard, self._device, store)
        except OSError as error:
            logger.warning("rank %d: sums are left to NCCL: %s", self.shard.rank, error)
        # All ranks have mapped the memory before any of them writes to it.
        if self.least(memory is not None) and self.least(memory is not None and memory.adds()):
            return memory
        if memory is not None:
            logger.warning("rank %d: sums are left to NCCL: not all ranks' memory can be mapped", self.shard.rank)
            memory.close()
        return None

    def _make_nccl(self, store: Store) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        return dist.ProcessGroupNCCL(store, self.shard.rank, self.shard.size, options)

    def _make_gloo(self, store: Store) -> Any:
        backend: Any = dist.ProcessGroupGloo
        options = backend._Options()
        options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        # Gloo would guess an interface from the host's name. All ranks are on this host.
        options._devices = [backend.create_device(hostname=_HOST)]
        made: Future[Any] = Future()

        def make() -> None:
            try:
                made.set_result(backend(store, self.shard.rank, self.shard.size, options))
            except BaseException as error:
                made.set_exception(error)

        # Nothing ends Gloo's wait for a rank that never comes, so it waits in a thread of its own.
        threading.Thread(target=make, name="rank-group-connect", daemon=True).start()
        while True:
            with contextlib.suppress(TimeoutError):
                return made.result(LOOK_EVERY.total_seconds())
            self._require_open()

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self._memory is not None and self._memory.can_sum(partial):
            with self._open():
                return self._memory.sum(partial)[0]
        self._run(self._process_group.allreduce, [partial], self._sum)
        return partial

    def partial(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        return None if self._memory is None else self._memory.partial(shape, dtype)

    def rows_at_once(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return shape[0] if self._memory is None else self._memory.shared.rows_at_once(shape, dtype)

    def add_sum(
        self,
        rows: torch.Tensor,
        partial: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None = None,
        normed_to: torch.Tensor | None = None,
        parts: Any = None,
    ) -> torch.Tensor | None:
        if self._memory is None or not self._memory.can_sum(partial):
            return super().add_sum(rows, partial, norm, normed_to)
        with self._open():
            return self._memory.sum(partial, rows, norm, normed_to, parts)[1]

    def takes_parts(self, partial: torch.Tensor) -> bool:
        return self._memory is not None and self._memory.can_sum_parts(partial)

    def gather_logits(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        rows, columns = logits.shape
        parts = logits.new_empty((self.shard.size, rows, columns))
        flat = parts.view(self.shard.size * rows, columns)
        self._run(self._process_group._allgather_base, flat, logits.contiguous(), self._gather)
        # One kernel copies whole rows; a transposed copy takes twice as long.
        return torch.cat(parts.unbind(), dim=1)[:, :vocab_size].contiguous()

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        self._run(self._process_group.broadcast, [values], self._broadcast)
        return values

    def least(self, number: int) -> int:
        found = torch.tensor([number], dtype=torch.int64, device=self._device)
        self._run(self._process_group.allreduce, [found], self._minimum)
        return int(found.item())

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> None:
        with self._checked():
            work = operation(*arguments)
            # NCCL has queued the operation on the current stream, and may have nothing to wait for.
            if work is None:
                return
            if self._device.type == "cuda":
                work.wait()
            else:
                self._wait_for_gloo(work)

    def _wait_for_gloo(self, work: Any) -> None:
        try:
            while not work.is_completed():
                with contextlib.suppress(RuntimeError):  # the timeout, or the operation's own error, raised below
                    work.wait(LOOK_EVERY)
                    return
                self._require_open()
            work.wait()
        finally:
            if not work.is_completed():
                # Whoever drops the last reference to the group waits for what is under way, even at the end of the
                # process.
                keep = threading.Thread(
                    target=_keep, args=(self._process_group, work), name="rank-group-keep", daemon=True
                )
                keep.start()

    def _require_open(self) -> None:
        if self._closing is not None:
            raise RankFailed("the ranks are being closed")

    def check(self) -> None:
        if self._memory is not None:
            self._memory.check()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Keep the group from being closed inside the block, so that no kernel is launched on memory that is no longer
        mapped."""
        with self._lock:
            self._require_open()
            yield

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except RankFailed:
            raise
        except RuntimeError as error:
            raise RankFailed(f"rank {self.shard.rank} has lost the others: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        memory = None
        if self._memory is not None:
            self._memory.end_sums()  # before taking the lock: a thread that launches behind waiting kernels may hold it
        with self._lock:
            if self._closing is None:
                memory = self._memory
                # NCCL first ends kernels that wait, and then waits for the graphs in which they were captured.
                self._closing = threading.Thread(target=self._abort, name="rank-group-abort", daemon=True)
                self._closing.start()
        if self.on_close is not None:
            self.on_close()
        self._closing.join(CLOSE_TIMEOUT_S)
        if self._closing.is_alive():
            logger.error("rank %d: its group is not closed after %.0f s", self.shard.rank, CLOSE_TIMEOUT_S)
        if memory is not None:
            memory.close()

    def _abort(self) -> None:
        try:
            if self._process_group is not None:  # otherwise it is not connected yet
                self._process_group.abort()
        except RuntimeError:
            logger.exception("rank %d: closing its group failed", self.shard.rank)


def _keep(process_group: Any, work: Any) -> None:
    """Keep the group until the operation has ended, after COLLECTIVE_TIMEOUT_S at the latest."""
    with contextlib.suppress(RuntimeError):
        work.wait()


def host_store(listening_fd: int, port: int) -> Store:
    """Make the store through which ranks find each other, on a socket that listens on the loopback address only."""
    timeout = timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
    store: Store = TCPStore(
        _HOST, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listening_fd
    )
    return store


def reach_store(port: int) -> Store:
    """Connect to that store from another process."""
    timeout = timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
    store: Store = TCPStore(_HOST, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return store
