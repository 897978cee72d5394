"""Transports within one process, one-sided and two-sided, for tests. They can be told to misbehave; see `Faults`."""

import asyncio
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hbserve_kv.memory.memory import Memory, copy_on_host
from hbserve_kv.transports.base import DrainUnknown, Link, Part, Transport


@dataclass(frozen=True)
class Faults:
    """Shares of parts, from 0 to 1, to which each kind of fault happens. At most one happens to a part."""

    drop: float = 0.0
    """Share of parts of which nothing arrives, and whose push times out."""
    delay: float = 0.0
    """Share of parts that are delayed, and succeed."""
    fail: float = 0.0
    """Share of parts of which half arrives, and whose push fails at once."""
    duplicate: float = 0.0
    """Share of parts that arrive twice."""
    late_write: float = 0.0
    """Share of parts whose push times out, and whose bytes arrive some time later. With the two-sided transport, they
    arrive only if the receiver still takes them."""
    delay_s: float = 0.02
    """Longest delay. Each of these is a random share of it: a delay, the time until a push times out, and the time from
    then until a late write."""

    def draw(self, dice: random.Random) -> str:
        point = dice.random()
        for name in ("drop", "delay", "fail", "duplicate", "late_write"):
            if (point := point - getattr(self, name)) < 0:
                return name
        return ""


class LoopbackNetwork:
    """Network that connects the transports that it makes. The seed and the order of pushes decide what goes wrong."""

    def __init__(self, faults: Faults | None = None, *, seed: int = 0, two_sided: bool = False) -> None:
        self.faults = faults or Faults()
        self.dice = random.Random(seed)
        self.members: dict[str, Memory] = {}
        """Memory that may be written, by key of its transport; one-sided transports only."""
        self.channels: dict[str, asyncio.Queue[_Message | None]] = {}
        """Messages under way, by link, as long as the receiver's end is there; None means that the sender has left.
        Two-sided transports only."""
        self.num_faults: dict[str, int] = {}
        self._two_sided = two_sided

    def transport(self) -> "LoopbackTransport | TwoSidedLoopbackTransport":
        """Make a transport. Each manager needs its own: `KVTransferManager(..., transport=network.transport())`."""
        return TwoSidedLoopbackTransport(self) if self._two_sided else LoopbackTransport(self)

    def draw(self) -> tuple[str, float]:
        """Draw the fault that happens to the next part, "" for none, and how long its pause is."""
        happens = self.faults.draw(self.dice)
        self.num_faults[happens] = self.num_faults.get(happens, 0) + 1
        return happens, self.faults.delay_s * self.dice.random()


@dataclass(frozen=True)
class _Message:
    """A part on its way to the receiver, which has to take it."""

    transfer_id: str
    index: int
    rows: torch.Tensor
    is_whole: bool


class _FaultyTransport(Transport):
    """A transport that also keeps track of what arrives after its push has timed out."""

    def __init__(self, network: LoopbackNetwork) -> None:
        self._network = network
        self._late: dict[str, set[asyncio.Task[None]]] = {}

    def _arrive_late(self, link: Link, pause_s: float, arrive: Callable[[], None]) -> None:
        """Call `arrive` some time after the push has timed out, which is in `pause_s`."""
        late_s = pause_s + self._network.faults.delay_s * self._network.dice.random()

        async def wait_and_arrive() -> None:
            await asyncio.sleep(late_s)
            arrive()

        self._late.setdefault(link.key, set()).add(asyncio.create_task(wait_and_arrive()))

    async def _until_all_arrived(self, link: Link) -> None:
        if late := self._late.pop(link.key, set()):
            await asyncio.wait(late)

    async def _drop_late(self) -> None:
        """Cancel what has not arrived yet: nothing may outlive the transport, as nothing outlives a process."""
        late = [task for tasks in self._late.values() for task in tasks]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


class LoopbackTransport(_FaultyTransport):
    name = "loopback"
    one_sided = True
    connects_to_itself = True

    def __init__(self, network: LoopbackNetwork) -> None:
        super().__init__(network)
        self._key = uuid.uuid4().hex
        self._targets: dict[str, Memory] = {}

    async def start(self, memory: Memory) -> None:
        self._memory = self._network.members[self._key] = memory

    def describe(self) -> bytes:
        return self._key.encode()

    def unreachable(self, description: bytes) -> str:
        return "" if description.decode() in self._network.members else "it is not of this network"

    async def connect(self, link: Link) -> None:
        key = link.peer_description.decode()
        if key not in self._network.members:
            raise ConnectionError("the peer has left the network")
        self._targets[link.key] = self._network.members[key]

    async def push(self, link: Link, part: Part) -> None:
        happens, pause_s = self._network.draw()
        if happens in ("drop", "late_write"):
            if happens == "late_write":
                target = self._target(link)
                self._arrive_late(link, pause_s, lambda: self._write_to(target, link, part, len(part.block_ids)))
            await asyncio.sleep(pause_s)
            raise DrainUnknown("timed out")
        if happens == "delay":
            await asyncio.sleep(pause_s)
        if happens == "fail":
            half = len(part.block_ids) // 2
            self._write(link, part, half)
            raise ConnectionError("failed")
        for _ in range(1 + (happens == "duplicate")):
            self._write(link, part, len(part.block_ids))

    def _write(self, link: Link, part: Part, count: int) -> None:
        self._write_to(self._target(link), link, part, count)

    def _target(self, link: Link) -> Memory:
        if link.key not in self._targets:
            raise ConnectionError("the link is closed")
        return self._targets[link.key]

    def _write_to(self, target: Memory, link: Link, part: Part, count: int) -> None:
        if count:
            plan = link.plan(self._memory, part, target.addresses[part.target_region])
            here, there = self._memory.addresses[part.region][0], target.addresses[part.target_region][0]
            copy_on_host(plan, here, part.block_ids[:count], there, part.target_block_ids[:count])

    async def disconnect(self, link: Link) -> None:
        self._targets.pop(link.key, None)
        await self._until_all_arrived(link)

    async def close(self) -> None:
        self._network.members.pop(self._key, None)
        self._targets.clear()
        await self._drop_late()


class TwoSidedLoopbackTransport(_FaultyTransport):
    """Transport whose receiver takes each part from the link, in order, as from a TCP connection. So nothing lands
    without the receiver."""

    name = "two-sided loopback"
    one_sided = False

    def __init__(self, network: LoopbackNetwork) -> None:
        super().__init__(network)
        self._links: dict[str, Link] = {}

    async def start(self, memory: Memory) -> None:
        self._memory = memory

    def describe(self) -> bytes:
        return b""

    async def connect(self, link: Link) -> None:
        self._links[link.key] = link
        if not link.is_sender:
            self._network.channels[link.key] = asyncio.Queue()

    async def push(self, link: Link, part: Part) -> None:
        happens, pause_s = self._network.draw()
        rows = link.rows(self._memory, part.region, part.layers).gather(part.block_ids).clone()
        message = _Message(part.transfer_id, part.index, rows, is_whole=happens != "fail")
        if happens in ("drop", "late_write"):
            if happens == "late_write":
                self._arrive_late(link, pause_s, lambda: self._send(link, message))
            await asyncio.sleep(pause_s)
            raise TimeoutError("timed out")
        if happens == "delay":
            await asyncio.sleep(pause_s)
        for _ in range(1 + (happens == "duplicate")):
            self._send(link, message)
        if happens == "fail":
            raise ConnectionError("failed")

    def _send(self, link: Link, message: _Message | None) -> None:
        """Send a message. This has no effect when the receiver has left, like data that a kernel still sends then."""
        if (channel := self._network.channels.get(link.key)) is not None:
            channel.put_nowait(message)

    async def accept(self, link: Link, part: Part) -> None:
        while (message := await self._next(link)) is not None:
            if (message.transfer_id, message.index) != (part.transfer_id, part.index):
                continue  # a duplicate of an earlier one
            count = len(part.block_ids) if message.is_whole else len(part.block_ids) // 2
            if count:
                rows = link.rows(self._memory, part.region, part.layers)
                rows.scatter(part.block_ids[:count], message.rows[:count])
            if message.is_whole:
                return
            raise ConnectionError("failed")
        raise ConnectionError("the sender has left")

    async def _next(self, link: Link) -> _Message | None:
        if link.key not in self._network.channels:
            raise ConnectionError("the link is closed")
        return await self._network.channels[link.key].get()

    async def disconnect(self, link: Link) -> None:
        if self._links.pop(link.key, None) is None:
            return
        if link.is_sender:
            # As with TCP, what was sent late arrives before the end of the connection.
            await self._until_all_arrived(link)
            self._send(link, None)
        elif (channel := self._network.channels.pop(link.key, None)) is not None:
            channel.put_nowait(None)  # wakes a caller that waits in `accept`

    async def close(self) -> None:
        await self._drop_late()
        for link in list(self._links.values()):
            await self.disconnect(link)
