"""Effect of a dying peer on the transfers of healthy pairs of instances, in real processes on the CPU.

    python benchmarks/kv_peer_death.py

The table compares the time of healthy transfers in three cases: alone; beside a peer that is well; and beside a peer
that is killed, frozen, thawed and restarted all the time.
One manager here sends to a healthy process and receives from it, one transfer at a time each way. It does the same with
the other peer, though more rarely, so that deaths hit transfers in any state. Rounds of all cases alternate, so that
other work on the machine hits all. The bar is a p99 beside deaths of less than 1.5 times that beside a peer that is
well, which is the same load. The table also has what that load itself costs.
"""

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import statistics
from collections.abc import Iterator
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch

from hbserve_kv import KVTransferConfig, KVTransferManager, Outcome, TransferFailed
from hbserve_testing.narrowing import present

BAR = 1.5
DEADLINE_S = 60.0
PAUSE_S, OTHER_PAUSE_S = 0.005, 0.05
"""Pauses between two transfers with the healthy peer, and with the other, whose mere load must not be noticed."""
KINDS = ("alone", "beside a peer that is well", "beside deaths")
NUM_PLACES = 64
"""Number of transfers for which a pool has room. Those with a frozen peer keep their blocks for a while."""
FREEZES = (0.5, 4.0, 1.5)
"""Durations of freezes, in timeouts: shorter than what counts as dead, longer than a write of Mooncake waits (5 s), and
in between."""
MODULES = [
    "torch",
    "hbserve_kv.testing",
    *(f"hbserve_kv.transports.{name}" for name in ("nccl", "ipc", "mooncake.transport")),
]


def make_manager(rank: int, args: argparse.Namespace, backend: str, num_places: int) -> KVTransferManager:
    pool = torch.zeros(num_places * args.blocks, args.block_bytes, dtype=torch.uint8)
    config = KVTransferConfig(backend=backend, buffer_size=0, timeout_s=args.timeout)
    return KVTransferManager(rank=rank, pool=pool, fingerprint={}, config=config)


# ---- the other processes ---------------------------------------------------------------------------------------------


def peer_main(control: Connection, rank: int, args: argparse.Namespace, backend: str) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        asyncio.run(serve(control, rank, args, backend))


async def serve(control: Connection, rank: int, args: argparse.Namespace, backend: str) -> None:
    """Run a peer, which sends and receives as its control pipe tells it, and ends with that pipe."""
    manager = make_manager(rank, args, backend, 2)
    await manager.start()
    tasks = set()
    while True:
        job, name, grant = await asyncio.to_thread(control.recv)
        done = receive(manager, control, name, args) if job == "receive" else send(manager, name, grant, args)
        tasks.add(task := asyncio.create_task(done))
        task.add_done_callback(tasks.discard)


async def receive(manager: KVTransferManager, control: Connection, name: str, args: argparse.Namespace) -> None:
    posted = manager.post_receive(name, list(range(args.blocks)))
    control.send((name, posted.grant))
    await posted.wait()


async def send(manager: KVTransferManager, name: str, grant: bytes, args: argparse.Namespace) -> None:
    with contextlib.suppress(TransferFailed):
        transfer = await manager.open_send(name, grant)
        transfer.push(list(range(args.blocks, 2 * args.blocks)), 0)
        await transfer.commit()


class Peer:
    """A peer, as this process sees it. `restart` starts another process in its place."""

    def __init__(self, rank: int, args: argparse.Namespace, backend: str) -> None:
        self._arguments = (rank, args, backend)
        self._grants: dict[str, asyncio.Future[bytes]] = {}
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        self._control, theirs = context.Pipe()
        self._process = context.Process(target=peer_main, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._read)

    def _read(self) -> None:
        try:
            name, grant = self._control.recv()
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            return
        if (waiting := self._grants.get(name)) and not waiting.done():
            waiting.set_result(grant)

    def tell(self, *command: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead
            self._control.send(command)

    async def grant(self, name: str, timeout_s: float) -> bytes:
        self._grants[name] = asyncio.get_running_loop().create_future()
        self.tell("receive", name, b"")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._grants[name]
        finally:
            del self._grants[name]

    def signal(self, number: signal.Signals) -> None:
        os.kill(present(self._process.pid), number)

    async def end(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.join, DEADLINE_S)
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()


# ---- transfers from here ---------------------------------------------------------------------------------------------


class Traffic:
    """Transfers with one peer, one at a time in each direction, during the block."""

    def __init__(self, manager: KVTransferManager, peer: Peer, places: "Places", name: str, is_healthy: bool) -> None:
        self._manager, self._peer, self._places = manager, peer, places
        self._name, self._is_healthy = name, is_healthy
        self._numbers = itertools.count()
        self._is_over = False
        self.times_s: dict[str, list[float]] = {"to it": [], "from it": []}
        self.num_failed = 0

    async def __aenter__(self) -> "Traffic":
        self._is_over = False
        self._running = [asyncio.create_task(self._go_on(*way)) for way in (("to it", self._to), ("from it", self._of))]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True
        await asyncio.gather(*self._running)

    async def _go_on(self, way: str, transfer: Any) -> None:
        while not self._is_over:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    self.times_s[way].append(await transfer(f"{self._name} {way} {next(self._numbers)}"))
            except (TransferFailed, TimeoutError):
                if self._is_healthy:
                    raise
                self.num_failed += 1
            await asyncio.sleep(PAUSE_S if self._is_healthy else OTHER_PAUSE_S)

    async def _to(self, name: str) -> float:
        grant = await self._peer.grant(name, DEADLINE_S if self._is_healthy else 0.5)
        place = await self._places.take()
        try:
            began_s = perf_counter()
            transfer = await self._manager.open_send(name, grant)
            transfer.push(place, 0)
            result = await transfer.commit()
            time_s = perf_counter() - began_s
            if result.outcome is Outcome.UNKNOWN:
                await transfer.drained()
        finally:
            self._places.give_back(place)
        if result.outcome is not Outcome.COMPLETED:
            raise TransferFailed(result.error)
        return time_s

    async def _of(self, name: str) -> float:
        place = await self._places.take()
        began_s = perf_counter()
        posted = self._manager.post_receive(name, place)
        self._peer.tell("send", name, posted.grant)
        waiting = asyncio.create_task(posted.wait())
        await asyncio.wait([waiting], timeout=DEADLINE_S if self._is_healthy else 1.0)
        if not waiting.done():  # as a scheduler does whose other instance is silent
            await posted.cancel("its sender says nothing")
        result = await waiting
        time_s = perf_counter() - began_s
        self._places.give_back_when_drained(place, posted, result.outcome)
        if result.outcome is not Outcome.COMPLETED:
            raise TransferFailed(result.error)
        return time_s


class Places:
    """Hands out the blocks of this process's pool, in portions for one transfer."""

    def __init__(self, num_blocks: int) -> None:
        self._free: asyncio.Queue[list[int]] = asyncio.Queue()
        self.take, self.give_back = self._free.get, self._free.put_nowait
        self._draining: set[asyncio.Task[None]] = set()
        for place in range(NUM_PLACES):
            self._free.put_nowait([place * num_blocks + block for block in range(num_blocks)])

    def give_back_when_drained(self, place: list[int], posted: Any, outcome: Outcome) -> None:
        if outcome is not Outcome.UNKNOWN:
            self.give_back(place)
            return
        task = asyncio.create_task(posted.drained())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)
        task.add_done_callback(lambda _: self.give_back(place))

    async def until_all_are_back(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self._free.qsize() < NUM_PLACES:  # noqa: ASYNC110  no event says so
                await asyncio.sleep(0.05)


async def harm(peer: Peer, seconds: float, timeout_s: float, dice: random.Random, lengths: Iterator[float]) -> int:
    """Kill, freeze and thaw, or freeze and kill the peer, again and again. Leaves it alive, and returns how often."""
    ends_s, count = perf_counter() + seconds, 0
    for what in itertools.cycle(("kill", "freeze and thaw", "freeze and kill")):
        await asyncio.sleep(0.5 + 0.5 * dice.random())
        if what != "kill":
            peer.signal(signal.SIGSTOP)
            await asyncio.sleep(timeout_s * next(lengths))
        if what == "freeze and thaw":
            peer.signal(signal.SIGCONT)
        else:
            await peer.end()
            peer.start()
        count += 1
        if perf_counter() > ends_s:
            break
    return count


async def measure(backend: str, args: argparse.Namespace) -> None:
    manager = make_manager(0, args, backend, NUM_PLACES)
    await manager.start()
    healthy, other = Peer(1, args, backend), Peer(2, args, backend)
    places, dice, num_harms = Places(args.blocks), random.Random(0), 0
    lengths = itertools.cycle(FREEZES)
    to_healthy = {kind: Traffic(manager, healthy, places, f"healthy, {kind},", True) for kind in KINDS}
    to_other = {kind: Traffic(manager, other, places, f"other, {kind},", False) for kind in KINDS[1:]}
    async with Traffic(manager, healthy, places, "connects", True), Traffic(manager, other, places, "tries", False):
        await asyncio.sleep(2)
    for _ in range(args.rounds):
        async with to_healthy["alone"]:
            await asyncio.sleep(args.seconds)
        async with to_healthy[KINDS[1]], to_other[KINDS[1]]:
            await asyncio.sleep(args.seconds)
        async with to_other["beside deaths"], to_healthy["beside deaths"]:
            num_harms += await harm(other, args.seconds, args.timeout, dice, lengths)
        await places.until_all_are_back()
    print(f"{backend}: {num_harms} deaths and freezes; {to_other[KINDS[2]].num_failed} transfers with that peer failed")
    for way in ("to it", "from it"):
        print(report(way, {kind: traffic.times_s[way] for kind, traffic in to_healthy.items()}), flush=True)
    await asyncio.gather(healthy.end(), other.end())
    await manager.close()


def percentile_99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def report(way: str, times_s: dict[str, list[float]]) -> str:
    lines = [
        f"  {way if kind == 'alone' else '':8s}{kind:27s}p50 {1e3 * statistics.median(times):7.2f} ms, "
        f"p99 {1e3 * percentile_99(times):7.2f} ms, longest {1e3 * max(times):7.2f} ms, of {len(times)}"
        for kind, times in times_s.items()
    ]
    alone, well, deaths = (percentile_99(times_s[kind]) for kind in KINDS)
    verdict = f"bar {BAR}: {'met' if deaths / well < BAR else 'MISSED'}"
    lines.append(f"{'':10s}p99 beside deaths / well {deaths / well:.2f}, {verdict}; well / alone {well / alone:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["ipc", "mooncake", "nccl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one kind, in each round")
    parser.add_argument("--timeout", type=float, default=2.0, help="after which a silent peer has failed")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-bytes", type=int, default=256 << 10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for backend in args.backends:
        asyncio.run(measure(backend, args))


if __name__ == "__main__":
    main()
