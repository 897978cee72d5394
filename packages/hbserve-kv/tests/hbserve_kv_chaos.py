"""Transfers between several managers of one process while everything goes wrong: faults of the transport, aborts on
both sides, and restarts. Every block carries a pattern that says whose it is.
"""

import asyncio
import contextlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from hbserve_kv import PostedReceive
from hbserve_kv.config import KVTransferConfig
from hbserve_kv.errors import TransferFailed
from hbserve_kv.manager import KVTransferManager
from hbserve_kv.protocol.transfer_state import Outcome
from hbserve_kv.sending.transfer import SendTransfer
from hbserve_kv.testing.loopback import Faults, LoopbackNetwork

NUM_BLOCKS, BLOCK_WORDS = 2048, 16
ALL_FAULTS = Faults(drop=0.1, delay=0.1, fail=0.1, duplicate=0.1, late_write=0.1, delay_s=0.01)
ABORT_SHARE = RESTART_SHARE = 0.1
JUNK = -1
NUM_SENDERS = NUM_RECEIVERS = 12


@dataclass
class ChaosReport:
    num_ended: int = 0
    wrong_blocks: int = 0
    restarts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: dict[str, int] = field(default_factory=dict)
    left_behind: str = ""
    """What was not given back at the end; "" if nothing."""


class _Instance:
    """A manager with a pool, as an engine has them; `restart` is another life with another pool."""

    def __init__(self, rank: int, network: LoopbackNetwork) -> None:
        self.rank = rank
        self._network = network
        self.port = 0

    async def start(self) -> None:
        self.pool = torch.full((NUM_BLOCKS, BLOCK_WORDS), JUNK, dtype=torch.int64)
        self.free = set(range(NUM_BLOCKS))
        config = KVTransferConfig(port=self.port, timeout_s=5.0, buffer_size=1 << 14, expiry_s=20.0)
        self.manager = KVTransferManager(
            rank=self.rank, pool=self.pool, fingerprint={"model": "chaos"}, config=config,
            transport=self._network.transport(),
        )  # fmt: skip
        await self.manager.start()
        self.port = int(self.manager.address.rpartition(":")[2])

    async def restart(self) -> None:
        await self.manager.close()
        await self.start()

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def left_behind(self) -> str:
        stats = self.manager.stats()
        kept = (stats.active_transfers, stats.buffered_bytes, stats.num_quarantined, NUM_BLOCKS - len(self.free))
        return "" if kept == (0, 0, 0, 0) else f"rank {self.rank}: {stats}, {len(self.free)} free blocks"


def _kind(error: str) -> str:
    """Without the numbers, by which errors of one kind differ."""
    return re.sub(r"\d+", "N", error)


class Chaos:
    """`await Chaos(seed=1).run(10_000)`; over a one-sided transport, or a two-sided one."""

    def __init__(self, *, seed: int, faults: Faults = ALL_FAULTS, two_sided: bool = False) -> None:
        self._dice = random.Random(seed)
        self._network = LoopbackNetwork(faults, seed=seed, two_sided=two_sided)
        self._senders = [_Instance(rank, self._network) for rank in range(NUM_SENDERS)]
        self._receivers = [_Instance(NUM_SENDERS + rank, self._network) for rank in range(NUM_RECEIVERS)]
        self._restarting: set[_Instance] = set()
        self.report = ChaosReport(faults=self._network.num_faults)

    async def run(self, num_transfers: int, *, concurrency: int = 96) -> ChaosReport:
        """Run so many transfers; returns when everything has been given back, or raises TimeoutError."""
        instances = [*self._senders, *self._receivers]
        for instance in instances:
            await instance.start()
        numbers = iter(range(num_transfers))
        await asyncio.gather(*(self._work(numbers) for _ in range(concurrency)))
        try:
            async with asyncio.timeout(30):
                while any(instance.left_behind() for instance in instances):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            self.report.left_behind = "; ".join(filter(None, (instance.left_behind() for instance in instances)))
        for instance in instances:
            await instance.manager.close()
        return self.report

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            async with asyncio.timeout(60):
                await self._transfer(number)
            self.report.num_ended += 1

    async def _transfer(self, number: int) -> None:
        count = self._dice.randint(1, 6)
        sender, receiver = await self._choose(count)
        pattern = torch.arange(count * BLOCK_WORDS).view(count, BLOCK_WORDS) + (number << 20)
        life, target_life = sender.manager, receiver.manager
        source, target = sender.take(count), receiver.take(count)
        sender.pool[source] = pattern
        source_pool, target_pool = sender.pool, receiver.pool
        source_free, target_free = sender.free, receiver.free
        target_pool[target] = JUNK
        posted = target_life.post_receive(f"t{number}", target)
        sending = asyncio.create_task(self._send(life, f"t{number}", posted.grant, source))
        receiving = asyncio.create_task(self._receive(posted, target_pool, target, pattern))
        if self._dice.random() < RESTART_SHARE:
            await self._restart(self._dice.choice([sender, receiver]))
        await sending
        source_pool[source] = JUNK
        source_free.update(source)
        await receiving
        target_free.update(target)

    async def _choose(self, num_blocks: int) -> tuple[_Instance, _Instance]:
        """A sender and a receiver that are there and have room, as a scheduler would."""
        while True:
            senders, receivers = (
                [each for each in instances if each not in self._restarting and len(each.free) >= num_blocks]
                for instances in (self._senders, self._receivers)
            )
            if senders and receivers:
                return self._dice.choice(senders), self._dice.choice(receivers)
            await asyncio.sleep(0.005)

    async def _send(self, manager: KVTransferManager, name: str, grant: bytes, source: list[int]) -> None:
        """Returns when the source blocks are not read any more."""
        try:
            transfer = await manager.open_send(name, grant)
        except TransferFailed as error:
            self.report.errors[_kind(str(error))] += 1
            return
        cut = self._dice.randint(0, len(source))
        for first, blocks in ((0, source[:cut]), (cut, source[cut:])):
            if blocks:
                transfer.push(blocks, first)
            await asyncio.sleep(0.002 * self._dice.random())
        await self._finish(transfer)

    async def _finish(self, transfer: SendTransfer) -> None:
        if self._dice.random() < ABORT_SHARE / 2:
            outcome = await transfer.abort("chaos")
        else:
            outcome = (await transfer.commit(b"payload")).outcome
        if outcome is Outcome.UNKNOWN:
            await transfer.drained()

    async def _receive(
        self, posted: PostedReceive, pool: torch.Tensor, target: list[int], pattern: torch.Tensor
    ) -> None:
        """Returns when the blocks may be used for something else."""
        waiting = asyncio.ensure_future(posted.wait())
        if self._dice.random() < ABORT_SHARE / 2:
            await asyncio.wait([waiting], timeout=0.01 * self._dice.random())
            await posted.cancel("chaos")
        # A sender that failed before it began is known to the scheduler only, which cancels.
        await asyncio.wait([waiting], timeout=1.0)
        await posted.cancel("the scheduler gave up")
        result = await waiting
        self.report.outcomes[result.outcome.value] += 1
        self.report.errors[_kind(result.error)] += 1
        if result.outcome is Outcome.UNKNOWN:
            with contextlib.suppress(TransferFailed):  # the receiver was restarted: its pool is gone with its life
                await posted.drained()
        if result.outcome is not Outcome.COMPLETED:
            return
        for _ in range(2):  # right now, and after late writes of others may have come
            self.report.wrong_blocks += int((pool[target] != pattern).any(dim=1).sum())
            await asyncio.sleep(0.02)

    async def _restart(self, instance: _Instance) -> None:
        if instance in self._restarting:
            return
        self._restarting.add(instance)
        self.report.restarts += 1
        await instance.restart()
        self._restarting.discard(instance)
