"""One survivor in the test's own process, and processes around it that die, freeze, vanish or are well."""

import asyncio
import itertools
import multiprocessing
import signal
import statistics
import time
from collections import defaultdict
from typing import Any

import hbserve_kv_victims as victims
import pytest
from hbserve_kv_victims import BACKWARDS, DEADLINE_S, IS_FREE, NUM_BLOCKS

from hbserve_kv.testing import is_empty
from hbserve_testing.processes import strike

TIMEOUT_S = 3.0
HEARTBEAT_S = TIMEOUT_S / 4
MOONCAKE_TIMEOUT_S = 5.0
"""Of a write, which can not be shorter; then its engine is ended."""
SLACK_S = 2.0
"""What a busy machine may add."""
HEALTHY_S = TIMEOUT_S / 4
"""What a transfer to a healthy peer takes at most, as a rule: it waits for nobody else's deadline."""
TEST_S = 90.0


class Victim:
    """One such process, seen from the test."""

    def __init__(
        self, rank: int, backend: str, point: str, timeout_s: float, expiry_s: float, where: str = "",
        host: str = "127.0.0.1",
    ) -> None:  # fmt: skip
        """`where`: the network namespace in which it is."""
        self.name = victims.name_of(rank)
        self._control, theirs = multiprocessing.Pipe()
        arguments = (theirs, rank, backend, point, timeout_s, expiry_s, where, host)
        self.process = victims.start_process(victims.main, *arguments)
        theirs.close()
        self._heard: dict[str, asyncio.Queue[tuple[Any, ...]]] = defaultdict(asyncio.Queue)
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._read)

    def _read(self) -> None:
        try:
            what, details = self._control.recv()
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(self._control.fileno())
        else:
            self._heard[what].put_nowait(details)

    def tell(self, *command: Any) -> None:
        self._control.send(command)

    async def heard(self, what: str) -> Any:
        """What it says next of this kind."""
        async with asyncio.timeout(DEADLINE_S):
            details = await self._heard[what].get()
        return details[0] if details else None

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        strike(self.process.pid, number)

    async def closes_in_order(self) -> None:
        self.tell("close")
        assert await self.heard("closed"), "a block was written to after it had been given back"
        await asyncio.to_thread(self.process.join, DEADLINE_S)
        assert self.process.exitcode == 0

    async def end(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.join, DEADLINE_S)
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        self.process.close()


class Rig:
    """The survivor, with room for every state's blocks and the healthy peer's, and the processes around it."""

    def __init__(
        self, backend: str, monkeypatch: pytest.MonkeyPatch, host: str = "127.0.0.1", timeout_s: float = TIMEOUT_S
    ) -> None:
        # Mooncake has its timeout from here, and whoever made an engine in this process before has set it.
        monkeypatch.setenv("MC_TRANSFER_TIMEOUT", str(int(MOONCAKE_TIMEOUT_S)))
        self.backend = backend
        self.is_one_sided = backend != "nccl"
        self.must_ask = backend == "ipc"
        """What a sender writes with cannot be taken from it."""
        self.pool = victims.make_pool(16)
        self._timeout_s = timeout_s
        self.manager = victims.make_manager(0, backend, self.pool, timeout_s, expiry_s=60.0, host=host)
        self._processes: list[Victim] = []
        self._num_places = -1

    async def __aenter__(self) -> "Rig":
        await self.manager.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(process.end() for process in self._processes))
        await self.manager.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def start(self, point: str, expiry_s: float = 60.0, where: str = "", host: str = "127.0.0.1") -> Victim:
        rank = 1 + len(self._processes)
        self._processes.append(Victim(rank, self.backend, point, self._timeout_s, expiry_s, where, host))
        return self._processes[-1]

    def new_blocks(self) -> list[int]:
        self._num_places += 1
        return [self._num_places * NUM_BLOCKS + block for block in BACKWARDS]

    async def until_empty(self) -> None:
        async with asyncio.timeout(30):
            while not is_empty(self.manager):
                await asyncio.sleep(0.01)
        assert (self.pool == IS_FREE).all(), "a block was written to after it had been given back"


async def while_healthy_ones_go_on(transfer, jobs):
    """Run the jobs, and all the time one transfer to a healthy peer after the other."""
    times_s, is_over = list[float](), asyncio.Event()

    async def go_on():
        for number in itertools.count():
            if is_over.is_set() and len(times_s) > 10:  # who is killed is noticed sooner than so many take
                return
            began_s = time.monotonic()
            await transfer(f"healthy {number}")
            times_s.append(time.monotonic() - began_s)
            await asyncio.sleep(0.1)  # leaves the processor to the others

    async with asyncio.timeout(TEST_S):
        await transfer("connects")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(go_on())
            async with asyncio.TaskGroup() as dying:
                for job in jobs:
                    dying.create_task(job)
            is_over.set()
    assert statistics.median(times_s) < HEALTHY_S


class Clock:
    """From when the peer died, or went on, to when the blocks are back."""

    def __init__(self, deadline_s: float) -> None:
        self._longest_s = 2 * HEARTBEAT_S + deadline_s + SLACK_S
        self._began_s = time.monotonic()

    def check(self, state: str) -> None:
        took_s = time.monotonic() - self._began_s
        assert took_s < self._longest_s, f"{state}: the blocks were back after {took_s:.1f} s"
