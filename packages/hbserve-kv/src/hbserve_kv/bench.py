"""`python -m hbserve_kv.bench`: how fast a backend moves blocks between two processes of this host.

Each row is a whole transfer, from the grant to the acknowledged commit; "moving" is the part of it in which bytes move.

A receiver waits for less than that: an instance opens the transfer while it computes the blocks, and the receiver goes
on when the commit arrives, not when it has been answered. `Sender.hand_over` measures that.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import random
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve_kv.config import KVTransferConfig
from hbserve_kv.errors import HBServeKVError
from hbserve_kv.manager import KVTransferManager
from hbserve_kv.memory.pool_layout import PoolLayout
from hbserve_kv.memory.shared_memory import shared_empty
from hbserve_kv.protocol.transfer_state import Outcome

if TYPE_CHECKING:
    import torch

DEADLINE_S = 120.0
MIB = 1 << 20
COMPUTING_CYCLES = 20_000_000
"""GPU clock cycles, some 10 ms, for which the GPU is kept busy, so that the copies of a part are queued meanwhile."""
RECEIVER = (sys.executable, "-P", "-m", "hbserve_kv.bench", "--receive")


class Settings(msgspec.Struct, frozen=True):
    backend: str
    device: str = "cpu"
    num_blocks: int = 256
    block_bytes: int = 2 * MIB
    checksum: bool = False
    peer_device: str = ""
    """Device of the receiving process; "": the same as `device`."""
    num_layers: int = 0
    """Layers of a layer-major pool, with keys and values of each layer apart; 0: a block is one piece."""

    def of_peer(self) -> "Settings":
        """Return the settings of the receiving process."""
        return msgspec.structs.replace(self, device=self.peer_device or self.device)


@dataclass(frozen=True)
class Measurement:
    num_bytes: int
    time_s: float
    """Duration of the whole transfer, from opening it to the acknowledged commit."""
    moving_s: float
    behind_s: float
    """Time from when the blocks were computed until the receiver had them all."""


def make_pool(settings: Settings) -> "torch.Tensor":
    """Make a uint8 tensor (num_blocks, block_bytes), and touch every page of it."""
    import torch

    make: Any = shared_empty if settings.device == "cpu" else torch.empty
    pool: torch.Tensor = make((settings.num_blocks, settings.block_bytes), dtype=torch.uint8, device=settings.device)
    return pool.fill_(1)


def make_manager(settings: Settings, rank: int, pool: "torch.Tensor") -> KVTransferManager:
    config = KVTransferConfig(backend=settings.backend, buffer_size=0, checksum=settings.checksum)
    found: PoolLayout | torch.Tensor = pool
    if settings.num_layers:
        found = PoolLayout(list(pool.view(settings.num_layers, 2, settings.num_blocks, -1)), "kv blocks dim")
    return KVTransferManager(rank=rank, pool=found, fingerprint={}, config=config)


def chosen_blocks(settings: Settings, count: int, scattered: bool, seed: int) -> list[int]:
    """Choose `count` blocks of the pool: neighbours, or blocks in random order."""
    ids = list(range(settings.num_blocks))
    if scattered:
        random.Random(seed).shuffle(ids)
    return ids[:count]


async def receive(settings: Settings) -> None:
    """Run the receiving process. Each line on stdin, a JSON list of block ids, is one transfer. Its grant is written to
    stdout, and then the time at which all of it was there, by the clock that processes of a host share."""
    manager = make_manager(settings, 1, make_pool(settings))
    await manager.start()
    try:
        number = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            posted = manager.post_receive(f"t{number}", msgspec.json.decode(line, type=list[int]))
            sys.stdout.write(posted.grant.hex() + "\n")
            sys.stdout.flush()
            async with asyncio.timeout(DEADLINE_S):
                await posted.wait()
            sys.stdout.write(f"{monotonic()!r}\n")
            sys.stdout.flush()
            number += 1
    finally:
        await manager.close()


class _Computed:
    """Work that the blocks of a transfer wait for, begun now: some of the GPU, or none."""

    def __init__(self, device: str = "cpu") -> None:
        self.ready: Any = None
        if device == "cpu":
            self._began_s = monotonic()
            return
        import torch

        new_event: Any = torch.cuda.Event
        self._began, self.ready = new_event(enable_timing=True), new_event(enable_timing=True)
        torch.cuda.synchronize(device)
        self._began_s = monotonic()
        with torch.cuda.device(device):
            self._began.record()
            torch.cuda._sleep(COMPUTING_CYCLES)  # type: ignore[no-untyped-call]
            self.ready.record()

    def ended_s(self) -> float:
        """Return when the work was done, once it is; by the device's own clock, because the host would look too
        late."""
        return self._began_s if self.ready is None else self._began_s + self._began.elapsed_time(self.ready) / 1e3


class Sender:
    """The sending process: this one, which sends to one that it has started. Made by `sender`."""

    def __init__(self, manager: KVTransferManager, process: asyncio.subprocess.Process, device: str) -> None:
        """`device` is the device of the manager's pool."""
        self.manager = manager
        self._process = process
        self._device = device
        self._number = 0

    async def transfer(self, source: Sequence[int], target: Sequence[int]) -> Measurement:
        """Measure a transfer of blocks that are there already."""
        return await self._transfer(source, target, "cpu")

    async def hand_over(self, source: Sequence[int], target: Sequence[int]) -> Measurement:
        """Measure a transfer that is begun while a GPU still computes its blocks, as instances do."""
        return await self._transfer(source, target, self._device)

    async def _transfer(self, source: Sequence[int], target: Sequence[int], device: str) -> Measurement:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(list(target)) + b"\n")
        async with asyncio.timeout(DEADLINE_S):
            grant = bytes.fromhex((await self._process.stdout.readline()).decode())
            began_s = monotonic()
            transfer = await self.manager.open_send(f"t{self._number}", grant)
            computed = _Computed(device)
            transfer.push(source, 0, computed.ready)
            result = await transfer.commit()
            time_s = monotonic() - began_s
            there_s = float(await self._process.stdout.readline())
        if result.outcome is not Outcome.COMPLETED:
            raise RuntimeError(result.error)
        self._number += 1
        return Measurement(result.num_bytes, time_s, result.time_s, there_s - computed.ended_s())


@contextlib.asynccontextmanager
async def sender(settings: Settings, receiver: Sequence[str] = RECEIVER) -> AsyncIterator[Sender]:
    """Start a manager here, and the receiving process by the command `receiver` with its settings as an argument. Both
    end with the context."""
    manager = make_manager(settings, 0, make_pool(settings))
    await manager.start()
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *receiver,
        msgspec.json.encode(settings.of_peer()).decode(),
        stdin=pipe,
        stdout=pipe,
    )
    try:
        yield Sender(manager, process, settings.device)
    finally:
        await manager.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def measure(
    settings: Settings, num_bytes: int, scattered: bool, num_rounds: int
) -> tuple[list[Measurement], str]:
    """Do what `measure_with` does, with a receiving process that is started for it."""
    async with sender(settings) as there:
        return await measure_with(there, settings, num_bytes, scattered, num_rounds)


async def measure_with(
    there: Sender, settings: Settings, num_bytes: int, scattered: bool, num_rounds: int
) -> tuple[list[Measurement], str]:
    """Return the measured rounds, after one that warms up, and what carried the bytes. `there` must have been made with
    these settings."""
    count = max(1, num_bytes // settings.block_bytes)
    source, target = (chosen_blocks(settings, count, scattered, seed) for seed in (1, 2))
    await there.transfer(source, target)
    found = [await there.transfer(source, target) for _ in range(num_rounds)]
    link = there.manager.links()[0]
    return found, f"{link.transport}, {link.detail}"


def report(found: Sequence[Measurement]) -> str:
    median = statistics.median(each.time_s for each in found)
    moving = statistics.median(each.moving_s for each in found)
    gigabytes = found[0].num_bytes / 1e9
    return f"{gigabytes / median:8.2f} GB/s {1e3 * median:9.2f} ms, moving {gigabytes / moving:8.2f} GB/s"


async def run(arguments: argparse.Namespace) -> None:
    write = sys.stdout.write
    for size in arguments.sizes:
        settings = Settings(
            arguments.backend,
            arguments.device,
            max(1, size * MIB // arguments.block_bytes),
            arguments.block_bytes,
            arguments.checksum,
            num_layers=arguments.layers,
        )
        for scattered in (False, True):
            found, carrier = await measure(settings, size * MIB, scattered, arguments.rounds)
            order = "scattered" if scattered else "neighbours"
            write(f"{size:6d} MiB  {order:10s}  {report(found)}   ({carrier})\n")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hbserve_kv.bench", description=__doc__)
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="auto", help="nccl, mooncake, ipc, auto, or module:Class")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", type=_positive, nargs="+", default=[4, 64, 512], metavar="MIB")
    parser.add_argument("--block-bytes", type=_positive, default=2 * MIB)
    parser.add_argument("--layers", type=int, default=0, help="of a layer-major pool; 0: a block is one piece")
    parser.add_argument("--rounds", type=_positive, default=7)
    parser.add_argument("--checksum", action="store_true", help="the receiver verifies a checksum of each block")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.exit(1, "python -m hbserve_kv.bench moves tensors, and needs torch: pip install 'hbserve-kv[torch]'\n")
    if arguments.layers < 0 or (arguments.layers and arguments.block_bytes % (2 * arguments.layers)):
        parser.error(f"--layers={arguments.layers}: expected so many that --block-bytes is divisible by twice of them")
    if arguments.receive:
        asyncio.run(receive(msgspec.json.decode(arguments.receive, type=Settings)))
        return
    try:
        asyncio.run(run(arguments))
    except (HBServeKVError, RuntimeError) as error:  # torch raises RuntimeError: no such device, or no memory
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
