"""Rate of all pairs of several prefill and decode instances that move KV at once, compared with bare copies. Then one
decode instance is killed, and the others' transfer times are compared with those before.

    python benchmarks/links_at_once.py                                         # 4 + 4 processes on the CPU
    python benchmarks/links_at_once.py --device cuda --mib 64                  # eight GPUs
    python benchmarks/links_at_once.py --device cuda --senders 1 --receivers 1 # two GPUs

With --device cuda sender i is on GPU i and receiver j on GPU senders + j, modulo the number of GPUs. The limit is the
sum of bare copies: memcpy on the CPU, else copies from GPU to GPU, by each sender at the same time, to each receiver's
device in turn.
"""

import argparse
import asyncio
import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch

from hbserve_kv.bench import MIB, Settings, make_manager, make_pool
from hbserve_kv.protocol.transfer_state import Outcome

spawn = multiprocessing.get_context("spawn")
START_S = 120.0


@dataclass(frozen=True)
class Load:
    """Parameters of the load, which all processes know."""

    settings: Settings
    devices: tuple[str, ...]
    """Devices of the senders, followed by those of the receivers."""
    senders: int
    blocks: int
    """Number of blocks of one transfer."""
    phase_s: float

    @property
    def receivers(self) -> int:
        return len(self.devices) - self.senders

    def of(self, rank: int, num_peers: int) -> Settings:
        """Return the settings of one process, whose pool has blocks for each of its peers."""
        return Settings(self.settings.backend, self.devices[rank], num_peers * self.blocks, self.settings.block_bytes)

    def block_ids(self, peer: int) -> list[int]:
        return list(range(peer * self.blocks, (peer + 1) * self.blocks))


async def receive(load: Load, number: int, pipes: Sequence[Connection]) -> None:
    """Run a receiver. It grants the same blocks to each sender again and again, until the sender leaves."""
    settings = load.of(load.senders + number, load.senders)
    manager = make_manager(settings, load.senders + number, make_pool(settings))
    await manager.start()

    async def from_sender(sender: int) -> None:
        for count in range(1 << 30):
            posted = manager.post_receive(f"{sender}-{number}-{count}", load.block_ids(sender))
            pipes[sender].send_bytes(posted.grant)
            await posted.wait()

    async with asyncio.TaskGroup() as group:
        for sender in range(load.senders):
            group.create_task(from_sender(sender))


async def send(load: Load, number: int, pipes: Sequence[Connection], parent: Connection) -> None:
    """Run a sender. It says when it is ready, and in each phase sends to all receivers at once. It answers with the
    receiver and the seconds of each transfer."""
    settings = load.of(number, load.receivers)
    pool = make_pool(settings)
    manager = make_manager(settings, number, pool)
    await manager.start()
    counts = [0] * load.receivers

    async def transfer(receiver: int) -> float:
        grant = await asyncio.to_thread(pipes[receiver].recv_bytes)
        began_s = perf_counter()
        sending = await manager.open_send(f"{number}-{receiver}-{counts[receiver]}", grant)
        counts[receiver] += 1
        sending.push(load.block_ids(receiver), 0)
        result = await sending.commit()
        if result.outcome is not Outcome.COMPLETED:
            raise ConnectionError(result.error)
        return perf_counter() - began_s

    async def keep_sending(receiver: int, until_s: float) -> list[tuple[int, float]]:
        found = []
        while perf_counter() < until_s:
            try:
                found.append((receiver, await transfer(receiver)))
            except (ConnectionError, EOFError):  # it was killed
                break
        return found

    for receiver in range(load.receivers):
        await transfer(receiver)  # connects
    parent.send("ready")
    while (phase := await asyncio.to_thread(parent.recv)) != "end":
        until_s = perf_counter() + load.phase_s
        if phase == "bare":
            parent.send(await asyncio.to_thread(bare_copies, load, pool, until_s))
        else:
            each = await asyncio.gather(*(keep_sending(receiver, until_s) for receiver in range(load.receivers)))
            parent.send([one for of_receiver in each for one in of_receiver])
    await manager.close()


def bare_copies(load: Load, pool: torch.Tensor, until_s: float) -> int:
    """Count the copies of a transfer's bytes that this process makes in the time."""
    targets = [
        torch.empty((load.blocks, pool.shape[1]), dtype=torch.uint8, device=device)
        for device in load.devices[load.senders :]
    ]
    count = 0
    while perf_counter() < until_s:
        target = targets[count % len(targets)]
        target.copy_(pool[: load.blocks])
        if target.is_cuda:
            torch.cuda.synchronize(target.device)
        count += 1
    return count


def run_process(role: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    asyncio.run(role(*arguments))


def measure(load: Load) -> str:
    """Measure a load, and return its line of the table."""
    num_receivers = load.receivers
    pairs = [[spawn.Pipe() for _ in range(num_receivers)] for _ in range(load.senders)]
    parents = [spawn.Pipe() for _ in range(load.senders)]
    receivers = [
        spawn.Process(target=run_process, args=(receive, load, j, [row[j][1] for row in pairs]))
        for j in range(num_receivers)
    ]
    senders = [
        spawn.Process(target=run_process, args=(send, load, i, [pipe for pipe, _ in pairs[i]], parents[i][1]))
        for i in range(load.senders)
    ]
    processes = receivers + senders
    try:
        for process in processes:
            process.start()
        for _, theirs in [pipe for row in pairs for pipe in row]:
            theirs.close()  # so that a sender sees the end of one that was killed
        for mine, _ in parents:
            if not mine.poll(START_S):
                raise SystemExit(f"a sender was not ready within {START_S:g} s")
            mine.recv()
        together, bare = ask(parents, "together", load), ask(parents, "bare", load)
        receivers[0].kill()
        alone = ask(parents, "after", load)
        for mine, _ in parents:
            mine.send("end")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return line(load, [one for each in together for one in each], sum(bare), [one for each in alone for one in each])


def ask(parents: Sequence[tuple[Connection, Connection]], phase: str, load: Load) -> list[Any]:
    for mine, _ in parents:
        mine.send(phase)
    if not all(mine.poll(load.phase_s + START_S) for mine, _ in parents):
        raise SystemExit(f"a sender did not end the phase {phase!r}")
    return [mine.recv() for mine, _ in parents]


def line(load: Load, together: list[tuple[int, float]], bare: int, after: list[tuple[int, float]]) -> str:
    gigabytes = load.blocks * load.settings.block_bytes / 1e9
    rate, limit = (count * gigabytes / load.phase_s for count in (len(together), bare))
    before_s, after_s = (sorted(time_s for receiver, time_s in found if receiver != 0) for found in (together, after))
    p99 = [1e3 * statistics.quantiles(times, n=100)[98] for times in (before_s, after_s) if len(times) > 1]
    others = f"{p99[0]:12.1f} ms{p99[1]:9.1f} ms{p99[1] / p99[0]:8.2f}" if len(p99) == 2 else "  too few to others"
    return (
        f"{load.settings.backend:9}{load.senders} x {load.receivers}  {1e3 * gigabytes:8.0f} MB  {rate:8.2f} GB/s"
        f"{limit:10.2f} GB/s{rate / limit:8.2f}{others}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["ipc", "nccl"])
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--receivers", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mib", type=int, default=16, help="of one transfer")
    parser.add_argument("--block-bytes", type=int, default=MIB)
    parser.add_argument("--phase-s", type=float, default=5.0)
    arguments = parser.parse_args()
    count = arguments.senders + arguments.receivers
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 0
    devices = tuple(f"cuda:{rank % gpus}" if gpus else "cpu" for rank in range(count))
    print(f"{'':9}{'pairs':6}{'a transfer':>13}{'all at once':>15}{'bare copies':>13}{'ratio':>10}", end="")
    print(f"{'p99 of others':>15}{'after a kill':>13}{'ratio':>8}")
    for backend in arguments.backends:
        blocks = arguments.mib * MIB // arguments.block_bytes
        settings = Settings(backend, block_bytes=arguments.block_bytes)
        print(measure(Load(settings, devices, arguments.senders, blocks, arguments.phase_s)), flush=True)


if __name__ == "__main__":
    main()
