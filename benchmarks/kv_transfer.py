"""Each KV transport beside its bare peer, in one run: a whole transfer of `hbserve_kv` between two processes, and the
same bytes by the call that it is made of.

    python benchmarks/kv_transfer.py                  # CPU: ipc | memcpy, mooncake | engine call, nccl | Gloo send/recv
    python benchmarks/kv_transfer.py --device cuda    # two processes on one GPU; for nccl under MPS with NCCL >= 2.30:
        LD_PRELOAD=…/libnccl.so.2 NCCL_MULTI_RANK_GPU_ENABLE=1 python benchmarks/kv_transfer.py --device cuda
    python benchmarks/kv_transfer.py --device cuda:0 --peer-device cuda:1           # two GPUs

Rounds of both alternate, so that what else the machine does hits both; the table has medians. "limit" is a plain copy
inside one process: of the device for ipc on a GPU (bytes read and written per second), from one GPU to the other if
they are two, memcpy else.
"""

import argparse
import asyncio
import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from time import perf_counter, sleep

import torch

from hbserve_kv.bench import MIB, Settings, chosen_blocks, make_pool, sender

Bare = Callable[[], float]


def synchronize(settings: Settings) -> None:
    if settings.device != "cpu":
        torch.cuda.synchronize()


def timed(settings: Settings, action: Callable[[], object]) -> float:
    synchronize(settings)
    began_s = perf_counter()
    action()
    synchronize(settings)
    return perf_counter() - began_s


@contextlib.contextmanager
def bare_copy(settings: Settings, source: Sequence[int], target: Sequence[int], num_calls: int) -> Iterator[Bare]:
    """memcpy of each block on the CPU; one copy of all bytes on a GPU."""
    here, there = make_pool(settings), make_pool(settings.of_peer())
    if settings.device != "cpu":
        count = len(source)
        yield lambda: timed(settings, lambda: there[:count].copy_(here[:count]))
        return
    size = settings.block_bytes
    pairs = [(there.data_ptr() + b * size, here.data_ptr() + a * size) for a, b in zip(source, target, strict=True)]

    def copy() -> None:
        for to, of in pairs:
            ctypes.memmove(to, of, size)

    yield lambda: timed(settings, copy)


@contextlib.contextmanager
def peer(role: str, settings: Settings, count: int) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `role` of this file."""
    device = settings.of_peer().device
    command = [sys.executable, __file__, "--role", role, "--device", device, "--count", str(count)]
    process = subprocess.Popen(
        [*command, "--block-bytes", str(settings.block_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def bare_mooncake(settings: Settings, source: Sequence[int], target: Sequence[int], num_calls: int) -> Iterator[Bare]:
    engine, here = make_engine(settings)
    with peer("mooncake", settings, settings.num_blocks) as process:
        session, base = process.stdout.readline().split()
        size = settings.block_bytes
        calls = (
            [here.data_ptr() + block * size for block in source],
            [int(base) + block * size for block in target],
            [size] * len(source),
        )

        def write() -> None:
            assert engine.batch_transfer_sync_write(session, *calls) == 0

        yield lambda: timed(settings, write)


def make_engine(settings: Settings):
    from mooncake.engine import TransferEngine

    engine, pool = TransferEngine(), make_pool(settings)
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(pool.data_ptr(), pool.nbytes) == 0
    return engine, pool


@contextlib.contextmanager
def bare_send(settings: Settings, source: Sequence[int], target: Sequence[int], num_calls: int) -> Iterator[Bare]:
    """send/recv of one contiguous tensor."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with peer(f"send:{store.port}:{num_calls}", settings, len(source)) as process:
        group = make_group(settings, store, 0)
        tensor = make_pool(settings)[: len(source)]
        answer = torch.zeros(1, dtype=torch.uint8, device=settings.device)

        def send() -> None:
            group.send([tensor], 1, 0).wait()
            group.recv([answer], 1, 0).wait()

        def call() -> float:
            # On a GPU a receive that waits takes turns with other processes' kernels, so it is told when it may begin.
            process.stdin.write("go\n")
            process.stdin.flush()
            sleep(0.005)
            return timed(settings, send)

        yield call
        # Under MPS a process that is killed while its kernel waits takes the others' kernels with it.
        process.wait(10)


def make_group(settings: Settings, store, rank: int):
    from torch.distributed.distributed_c10d import PrefixStore

    store = PrefixStore("bench", store)
    if settings.device == "cpu":
        options = torch.distributed.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=60)
        options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        return torch.distributed.ProcessGroupGloo(store, rank, 2, options)
    return torch.distributed.ProcessGroupNCCL(store, rank, 2, torch.distributed.ProcessGroupNCCL.Options())


def play(role: str, settings: Settings, count: int) -> None:
    """The other process of a bare peer; ends after its calls, with its stdin, or is killed."""
    name, _, numbers = role.partition(":")
    if name == "mooncake":
        engine, pool = make_engine(settings)
        print(f"127.0.0.1:{engine.get_rpc_port()}", pool.data_ptr(), flush=True)
        sys.stdin.read()
        return
    port, num_calls = map(int, numbers.split(":"))
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    group = make_group(settings, store, 1)
    tensor = make_pool(settings)[:count]
    for _ in range(num_calls):
        sys.stdin.readline()
        group.recv([tensor], 0, 0).wait()
        group.send([tensor[0, :1]], 0, 0).wait()
    synchronize(settings)
    group.abort()


BARE = {"ipc": bare_copy, "mooncake": bare_mooncake, "nccl": bare_send}
NAMES = {"ipc": "memcpy", "mooncake": "engine call", "nccl": "send/recv"}


async def compare(backend: str, settings: Settings, size_mib: int, scattered: bool, num_rounds: int) -> str:
    count = size_mib * MIB // settings.block_bytes
    source, target = (chosen_blocks(settings, count, scattered, seed) for seed in (1, 2))
    num_calls = num_rounds + 2
    with (
        BARE[backend](settings, source, target, num_calls) as bare,
        bare_copy(settings, source, target, num_calls) as plain,
    ):
        async with sender(settings) as there:
            times = []
            for _ in range(num_calls):
                ours = await there.transfer(source, target)
                times.append((ours.time_s, bare(), plain(), ours.moving_s))
            carrier = there.manager.links()[0].detail
    ours_s, bare_s, plain_s, moving_s = (statistics.median(column[2:]) for column in zip(*times, strict=True))
    ratio = statistics.median(theirs / mine for mine, theirs, _, _ in times[2:])
    twice = 2 if settings.device != "cpu" and settings.device == settings.of_peer().device and backend == "ipc" else 1
    rates = [twice * count * settings.block_bytes / each / 1e9 for each in (ours_s, moving_s, bare_s, plain_s)]
    order = "scattered" if scattered else "neighbours"
    return (
        f"{backend:9s}{size_mib:5d} MiB {order:11s}{rates[0]:8.2f}{rates[1]:8.2f}{rates[2]:8.2f} "
        f"{NAMES[backend]:12s}{ratio:6.2f}{rates[3]:9.2f}  {carrier}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer-device", default="", help="of the receiving process, if it is another one: cuda:1")
    parser.add_argument("--backends", nargs="+", default=["ipc", "mooncake", "nccl"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512], metavar="MIB")
    parser.add_argument("--block-bytes", type=int, default=2 * MIB)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("MC_FORCE_TCP", "1")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    if arguments.role:
        settings = Settings("", arguments.device, arguments.count, arguments.block_bytes)
        play(arguments.role, settings, arguments.count)
        return
    torch.set_num_threads(1)
    print("GB/s:                            ours  moving    bare              ratio    limit")
    for backend in arguments.backends:
        for size in arguments.sizes:
            num_blocks = max(1, size * MIB // arguments.block_bytes)
            settings = Settings(
                backend, arguments.device, num_blocks, arguments.block_bytes, peer_device=arguments.peer_device
            )
            for scattered in (False, True):
                print(asyncio.run(compare(backend, settings, size, scattered, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
