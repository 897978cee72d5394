"""Ranks 1, 2, … of an instance, which rank 0 starts, supplies with steps, watches and ends.

The loss of a rank shows in many places at once, as a collective operation that never returns or as a step with wrong
tokens. There is one verdict: the first rank that ended for a reason of its own. All others are then ended, which frees
whoever waits for them, and every call here raises the verdict.
"""

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import RankFailed
from hbserve_core.model.loaded_model import choose_device
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.shard import Shard
from hbserve_core.ranks.distributed_group import DistributedRankGroup, host_store
from hbserve_core.ranks.worker_process import GRACE_S, SILENCE_S, START_TIMEOUT_S, ExitCause, WorkerProcess
from hbserve_core.ranks.worker_protocol import RankSettings, RankState

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 600.0
"""Longest time that the other ranks may still load after rank 0 has loaded."""
SETTLE_S = 0.3
"""Pause between the first report of a rank's end and the verdict, because the rank that is the cause may be heard
last."""

VERDICT_TIMEOUT_S = SILENCE_S + GRACE_S + 2.0
"""Longest time that a failed operation waits to hear which rank is the cause. It is longer than the time it takes to
notice that a rank is frozen."""


class Workers:
    """All ranks of an instance but this one. Called by the engine's thread."""

    def __init__(self, config: InstanceConfig, on_failure: Callable[[Exception], None]) -> None:
        """on_failure: called once, from another thread, if a rank is lost, perhaps while nothing is computed.

        Raises:
            InvalidInstanceConfig: the device of a rank does not exist.
        """
        size = config.tensor_parallel_size
        self._device = choose_device(config)
        threads = max(1, (config.num_threads or torch.get_num_threads()) // size)
        self.config = msgspec.structs.replace(config, num_threads=threads)
        """Configuration that each rank has, including this one."""
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._exit_causes: list[ExitCause] = []
        self._verdict = ""
        self._concluded = threading.Event()
        self._group: RankGroup | None = None
        self._seed = secrets.randbits(63)
        listening = socket.create_server(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        self._store = host_store(listening.detach(), port)
        self._processes: list[WorkerProcess] = []
        try:
            for rank in range(1, size):
                settings = RankSettings(self.config, rank, port, self._seed)
                self._processes.append(WorkerProcess(settings, self._ended))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2, …"""
        return [process.pid for process in self._processes]

    @property
    def transfer_addresses(self) -> list[str]:
        """Addresses of ranks 1, 2, … once they are ready, if the instance's role has transfers."""
        return [process.transfer_address for process in self._processes if process.transfer_address]

    def join(self) -> RankGroup:
        """Let all ranks begin, and return the group in which this one is rank 0. Raises RankFailed."""
        for process in self._processes:
            process.send_settings()
        self._wait_for("joining", START_TIMEOUT_S)
        shard = Shard(0, self.config.tensor_parallel_size)
        group = self._group = DistributedRankGroup(shard, self._device, self._store, self._seed)
        self._check()  # the loss of a rank before this moment has not closed the group
        group.connect()
        return group

    def wait_ready(self) -> None:
        """Wait until all ranks have loaded their part. Raises RankFailed."""
        self._wait_for("ready", READY_TIMEOUT_S)

    def _wait_for(self, state: RankState, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for process in self._processes:
            process.wait_for(state, max(0.0, deadline_s - time.monotonic()))

    def send(self, message: bytes) -> None:
        """Send every rank a step to launch, without waiting for them. Raises RankFailed."""
        for process in self._processes:
            process.send(message)

    @contextlib.contextmanager
    def naming_the_lost_rank(self) -> Iterator[None]:
        """Guard work that needs all ranks: if a rank is lost, raise the RankFailed that names it, whatever the work
        itself raises."""
        self._check()
        try:
            yield
        except Exception as error:
            if isinstance(error, RankFailed):
                self._concluded.wait(VERDICT_TIMEOUT_S)
            if self._concluded.is_set():
                raise RankFailed(self._verdict) from error
            raise
        self._check()

    def _check(self) -> None:
        if self._concluded.is_set():
            raise RankFailed(self._verdict)

    def _ended(self, exit_cause: ExitCause) -> None:
        """Find out which rank is the cause. Called in the thread that listens to the rank that has ended."""
        with self._lock:
            self._exit_causes.append(exit_cause)
        time.sleep(SETTLE_S)
        with self._lock:
            cause = min(self._exit_causes, key=lambda each: each.is_consequence).cause
        if self.fail_all(cause):
            self._on_failure(RankFailed(cause))

    def fail_all(self, cause: str) -> bool:
        """End all ranks. From now on every call raises RankFailed with this cause. Returns False if there already is
        another cause."""
        with self._lock:
            if self._verdict:
                return False
            self._verdict = cause
        logger.debug("%s; heard from others: %s", cause, self._exit_causes)
        for process in self._processes:
            process.kill()
        self._concluded.set()
        if self._group is not None:
            self._group.close()  # until then, kernels wait for the rank that is gone
        return True

    def close(self) -> None:
        """End all ranks. May be called twice."""
        processes, self._processes = self._processes, []
        for process in processes:
            process.begin_close()
        for process in processes:
            process.close()
        if self._group is not None:
            self._group.close()
