"""A transport within one process, which can be told to misbehave. For tests; see `Faults`."""

import asyncio
import random
import uuid
from dataclasses import dataclass

import torch

from hbserve_kv.memory import Memory, gather, head_view, scatter
from hbserve_kv.transport import DrainUnknown, Link, Part, Transport


@dataclass(frozen=True)
class Faults:
    """Shares of the parts, from 0 to 1, to which something happens; at most one thing to each."""

    drop: float = 0.0
    """Nothing arrives, and the push times out."""
    delay: float = 0.0
    """It takes `delay_s`, and succeeds."""
    fail: float = 0.0
    """Half of it arrives, and the push fails at once."""
    duplicate: float = 0.0
    """It arrives twice."""
    late_write: float = 0.0
    """The push times out, and the bytes arrive some time after."""
    delay_s: float = 0.02
    """Also until a push times out, and from then until a late write: each a random share of it."""

    def draw(self, dice: random.Random) -> str:
        point = dice.random()
        for name in ("drop", "delay", "fail", "duplicate", "late_write"):
            if (point := point - getattr(self, name)) < 0:
                return name
        return ""


class LoopbackNetwork:
    """Connects the LoopbackTransports that it makes. What goes wrong depends on the seed and the order of pushes."""

    def __init__(self, faults: Faults | None = None, *, seed: int = 0) -> None:
        self.faults = faults or Faults()
        self.dice = random.Random(seed)
        self.members: dict[str, Memory] = {}
        self.num_faults: dict[str, int] = {}

    def transport(self) -> "LoopbackTransport":
        """One for each manager: `KVTransferManager(..., transport=network.transport())`."""
        return LoopbackTransport(self)


class LoopbackTransport(Transport):
    name = "loopback"
    one_sided = True

    def __init__(self, network: LoopbackNetwork) -> None:
        self._network = network
        self._key = uuid.uuid4().hex
        self._targets: dict[str, Memory] = {}
        self._late: dict[str, set[asyncio.Task[None]]] = {}

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
        faults, dice = self._network.faults, self._network.dice
        happens = faults.draw(dice)
        self._network.num_faults[happens] = self._network.num_faults.get(happens, 0) + 1
        pause_s = faults.delay_s * dice.random()
        if happens in ("drop", "late_write"):
            if happens == "late_write":
                late_s = pause_s + faults.delay_s * dice.random()
                late = asyncio.create_task(self._write_late(self._target(link), link, part, late_s))
                self._late.setdefault(link.key, set()).add(late)
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

    async def _write_late(self, target: Memory, link: Link, part: Part, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        self._write_to(target, link, part, len(part.block_ids))

    def _write(self, link: Link, part: Part, count: int) -> None:
        self._write_to(self._target(link), link, part, count)

    def _target(self, link: Link) -> Memory:
        if link.key not in self._targets:
            raise ConnectionError("the link is closed")
        return self._targets[link.key]

    def _write_to(self, target: Memory, link: Link, part: Part, count: int) -> None:
        if count:
            rows = head_view(target.rows(part.target_region), link.peer_heads, target.num_heads, target.head_bytes)
            source: torch.Tensor = gather(self._memory.part(part.region, link.heads), part.block_ids[:count])
            scatter(rows, part.target_block_ids[:count], source.contiguous())

    async def disconnect(self, link: Link) -> None:
        self._targets.pop(link.key, None)
        late = self._late.pop(link.key, set())
        if late:
            await asyncio.wait(late)

    async def close(self) -> None:
        self._network.members.pop(self._key, None)
        self._targets.clear()
        # Nothing may outlive the transport, as nothing outlives a process.
        late = [task for tasks in self._late.values() for task in tasks]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
