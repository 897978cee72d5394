"""Process of one of the ranks 1, 2, …: `python -m hbserve_core.ranks.worker_main`, started by rank 0; see workers.py.

It loads its part of the model, launches every step that rank 0 launches, and ends when rank 0 does.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import msgspec
from tqdm import tqdm

from hbserve_core.engine.step import PendingStep, Runner
from hbserve_core.errors import HBServeCoreError, RankFailed
from hbserve_core.model.loaded_model import choose_device
from hbserve_core.model.shard import Shard
from hbserve_core.ranks.distributed_group import DistributedRankGroup, reach_store
from hbserve_core.ranks.make_runner import make_rank_runner
from hbserve_core.ranks.step_message import StepReader
from hbserve_core.ranks.worker_protocol import END_TIMEOUT_S, REPORT_INTERVAL_S, RankReport, RankSettings
from hbserve_core.transfers.launched_steps import LaunchedSteps
from hbserve_rpc import own_process
from hbserve_rpc.parent_watch import when_parent_ends
from hbserve_rpc.stderr_log import log_to_stderr

logger = logging.getLogger(__name__)


class Reporter:
    """Reporter of the rank's state to rank 0, at intervals."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._report = RankReport("joining")
        self._lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._repeat, name="reporter", daemon=True).start()

    def say(self, report: RankReport) -> None:
        """Report a new state. Raises OSError if rank 0 is gone."""
        with self._lock:
            self._report = report
            os.write(self._fd, msgspec.json.encode(report) + b"\n")

    def _repeat(self) -> None:
        try:
            while True:
                time.sleep(REPORT_INTERVAL_S)
                self.say(self._report)
        except OSError:
            logger.debug("rank 0 is gone")  # the end of stdin tells that too, and ends the process


class Steps:
    """Messages about steps from stdin. A thread reads them, so that rank 0 never waits for room, and its end is always
    noticed."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="steps", daemon=True).start()

    def _read(self) -> None:
        while len(header := self._source.read(4)) == 4:
            self._messages.put(self._source.read(int.from_bytes(header, "big")))
        self.end()

    def end(self) -> None:
        """Note that no more messages come: rank 0 has closed stdin, or is gone. The process ends soon, whatever
        happens."""
        self._messages.put(None)
        time.sleep(END_TIMEOUT_S)
        # A thread that still waits for a device or for another rank cannot be woken.
        os._exit(0)

    def __iter__(self) -> Iterator[bytes]:
        while (message := self._messages.get()) is not None:
            yield message


def follow(runner: Runner, messages: Iterable[bytes], launched: Callable[[Any], object]) -> None:
    """Launch every step that rank 0 launches, and pass its event to `launched`. As in rank 0's engine, a step is waited
    for after the next one is launched, if the runner overlaps."""
    reader = StepReader()
    before: PendingStep | None = None
    for message in messages:
        pending = runner.launch(reader.read(message))
        launched(runner.computed)
        runner.draw()  # the device waits for rank 0's tokens
        if before is not None:
            before()
        before = pending


def main() -> int:
    """Run the rank and end the process, with status 0 if rank 0 wanted it to end."""
    own_process.set_up()
    tqdm.set_lock(threading.RLock())  # see process.py
    reports = os.dup(1)
    os.dup2(2, 1)
    if not (line := sys.stdin.buffer.readline()):
        return 0  # rank 0 has ended, or does not let the ranks begin
    settings = msgspec.json.decode(line, type=RankSettings)
    config, rank = settings.config, settings.rank
    log_to_stderr(config.log_level, f"%(asctime)s %(levelname)s %(name)s [rank {rank}]: %(message)s")
    reporter = Reporter(reports)
    steps = Steps(sys.stdin.buffer)
    status = 0
    try:
        reporter.say(RankReport("joining"))
        reporter.start()
        when_parent_ends(steps.end)
        runner = _make_runner(settings, reporter)
        own_process.freeze_heap()
        launched = LaunchedSteps()
        reporter.say(RankReport("ready", transfer_address=_serve_transfers(settings, runner, launched)))
        follow(runner, steps, launched.add)
    except Exception as error:  # rank 0 passes it on
        status = 1
        if not isinstance(error, HBServeCoreError | BrokenPipeError):
            logger.exception("rank %d failed", rank)
        with contextlib.suppress(OSError):  # rank 0 is gone, which is the reason
            reporter.say(RankReport("failed", f"{type(error).__name__}: {error}", isinstance(error, RankFailed)))
    logging.shutdown()
    sys.stderr.flush()
    # An ordinary exit would wait for stdin's lock, which the reading thread holds, or for a device that hangs.
    os._exit(status)


def _make_runner(settings: RankSettings, reporter: Reporter) -> Runner:
    config, shard = settings.config, _shard(settings)
    device = choose_device(config, shard.rank)
    group = DistributedRankGroup(shard, device, reach_store(settings.store_port), settings.seed)
    group.connect()
    reporter.say(RankReport("loading"))
    return make_rank_runner(config, group)


def _serve_transfers(settings: RankSettings, runner: Runner, launched: LaunchedSteps) -> str:
    if settings.config.role == "hybrid":
        return ""
    from hbserve_core.transfers.rank_transfers import serve_transfers

    return serve_transfers(settings.config, runner, _shard(settings), launched)


def _shard(settings: RankSettings) -> Shard:
    return Shard(settings.rank, settings.config.tensor_parallel_size)


if __name__ == "__main__":
    sys.exit(main())
