"""Rate of each KV transport, compared with the bare call that it is made of: a whole transfer of `hbserve_kv` between
two processes, and the same bytes by that call, in one run.

    python benchmarks/kv_transfer.py                  # CPU: ipc | memcpy, mooncake | engine call, nccl | Gloo send/recv
    python benchmarks/kv_transfer.py --device cuda    # two processes on one GPU; for nccl under MPS with NCCL >= 2.30:
        LD_PRELOAD=…/libnccl.so.2 NCCL_MULTI_RANK_GPU_ENABLE=1 python benchmarks/kv_transfer.py --device cuda
    python benchmarks/kv_transfer.py --device cuda:0 --peer-device cuda:1           # two GPUs
    python benchmarks/kv_transfer.py --beside --device cuda:0 --peer-device cuda:1  # copies beside computation

Rounds of both alternate, so that other work on the machine hits both; the table has medians. "limit" is a plain copy
inside one process: of the device for ipc on a GPU (bytes read and written per second), from one GPU to the other if
there are two, and memcpy otherwise.

--beside measures each way to copy while the sender computes products of a prefill and the receiver reads memory as a
decode step does. It prints how fast the KV of 2048 tokens moves then, how much longer the products and the steps take
meanwhile, and how much of the products' time a GB costs.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any
from unittest import mock

import msgspec
import torch

from hbserve_kv.bench import MIB, Sender, Settings, chosen_blocks, make_pool, receive, sender

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
    """Make a bare peer that copies: by memcpy of each block on the CPU, or by one copy of all bytes on a GPU."""
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
    """Start a process that runs `role` of this file."""
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
        assert process.stdout is not None
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
    """Make a bare peer that uses send/recv of one contiguous tensor."""
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
            assert process.stdin is not None
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
        gloo: Any = torch.distributed.ProcessGroupGloo  # whose options torch does not declare
        options = gloo._Options()
        options._timeout = timedelta(seconds=60)
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        return gloo(store, rank, 2, options)
    return torch.distributed.ProcessGroupNCCL(store, rank, 2, torch.distributed.ProcessGroupNCCL.Options())


def play(role: str, settings: Settings, count: int) -> None:
    """Run the other process of a bare peer. It ends after its calls or with its stdin, or is killed."""
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


@dataclass(frozen=True)
class Way:
    """A way to copy that --beside compares, given by constants of a transport."""

    name: str
    backend: str
    constants: dict[str, int]

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, value in self.constants.items():
                stack.enter_context(mock.patch(f"hbserve_kv.transports.{self.backend}.{name}", value))
            yield


WAYS = (
    Way("ipc, kernel, normal priority", "ipc", {"COPY_PRIORITY": 0, "ENGINE_BLOCK_BYTES": 1 << 62}),
    Way("ipc, kernel, high priority", "ipc", {"ENGINE_BLOCK_BYTES": 1 << 62}),
    Way("ipc, copy engine", "ipc", {"ENGINE_BLOCK_BYTES": 0}),
    Way("nccl, normal priority, 32 CTAs", "nccl", {"COPY_PRIORITY": 0, "MOST_CTAS": 32}),
    Way("nccl, high priority, 32 CTAs", "nccl", {"MOST_CTAS": 32}),
    Way("nccl, high priority, 16 CTAs", "nccl", {"MOST_CTAS": 16}),
    Way("nccl, high priority, 8 CTAs", "nccl", {"MOST_CTAS": 8}),
)
PREFILL_S = {True: 0.25, False: 0.05}
"""Duration of one run of a prefill's products, on a GPU and on a CPU."""


class Prefill:
    """The products of a prefill. On a GPU, each layer has 2048 tokens of an 8B model, and the host only queues it."""

    def __init__(self, device: str) -> None:
        is_gpu = device != "cpu"
        tokens, hidden = (2048, 4096) if is_gpu else (64, 512)
        shapes = [(hidden, 6 * hidden), (hidden, 3 * hidden // 2), (3 * hidden, hidden), (hidden, hidden)]
        dtype = torch.bfloat16 if is_gpu else torch.float32
        self._inputs = [torch.randn(tokens, rows, device=device, dtype=dtype) for rows, _ in shapes]
        self._weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._num_layers = 10
        took_s = statistics.median(self.begin()() for _ in range(5))
        self._num_layers = max(1, int(self._num_layers * PREFILL_S[is_gpu] / took_s))

    def begin(self) -> Callable[[], float]:
        """Queue the products. The returned function waits until they are done, and returns the seconds that they took;
        on a CPU it computes them."""
        if self._stream is None:
            return self._compute
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            began.record()
            self._compute()
            ended.record()

        def took_s() -> float:
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3

        return took_s

    def _compute(self) -> float:
        began_s = perf_counter()
        for _ in range(self._num_layers):
            for given, weights in zip(self._inputs, self._weights, strict=True):
                given @ weights
        return perf_counter() - began_s


def decode_steps(device: str, file: str) -> None:
    """Run decode steps, each of which reads 1 GB on a GPU, without an end. Records when each ended, and how long it
    took."""
    is_gpu = device != "cpu"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    weights = torch.randn((4, 16384, 8192) if is_gpu else (4, 256, 1024), device=device, dtype=dtype)
    given = torch.randn(weights.shape[2], device=device, dtype=dtype)
    stream = torch.cuda.Stream(device) if is_gpu else None
    with open(file, "w", buffering=1) as steps, torch.cuda.stream(stream):
        while True:
            began_s = monotonic()
            for each in weights:
                torch.mv(each, given)
            if stream is not None:
                stream.synchronize()
            steps.write(f"{monotonic()} {monotonic() - began_s}\n")


def receive_beside_decode(role: str, settings: Settings) -> None:
    """Run the receiving process of --beside."""
    what = json.loads(role)
    if settings.device != "cpu":
        torch.cuda.set_device(settings.device)
    torch.set_num_threads(1)
    threading.Thread(target=decode_steps, args=(settings.device, what["file"]), daemon=True).start()
    with Way("", settings.backend, what["constants"]).chosen():
        asyncio.run(receive(settings))


async def compare_ways(settings: Settings, name: str) -> None:
    """Print a line for each way whose name has this text."""
    if settings.device != "cpu":
        torch.cuda.set_device(settings.device)
    prefill = Prefill(settings.device)
    print(f"{'':31s} alone   beside products        products take     a decode step beside it")
    print(f"{'':31s}  GB/s   GB/s  a transfer, ms   longer, %  ms/GB   alone, us  longer, %")
    for way in (each for each in WAYS if name in each.name):
        with tempfile.TemporaryDirectory() as folder, way.chosen():
            file = Path(folder) / "steps"
            role = json.dumps({"file": str(file), "constants": way.constants})
            receiver = [sys.executable, "-P", __file__, "--role", role, "--settings"]
            async with sender(msgspec.structs.replace(settings, backend=way.backend), receiver) as there:
                print(f"{way.name:31s}{await measure_beside(there, settings, prefill, file)}", flush=True)


async def measure_beside(there: Sender, settings: Settings, prefill: Prefill, file: Path, num_rounds: int = 3) -> str:
    blocks = chosen_blocks(settings, settings.num_blocks, True, 1)
    for _ in range(2):
        await there.transfer(blocks, blocks)
    idle_s = monotonic()
    alone_s = statistics.median([await asyncio.to_thread(prefill.begin()) for _ in range(num_rounds)])
    copying_s = monotonic()
    found = [await there.transfer(blocks, blocks) for _ in range(9)]
    rate = statistics.median(each.num_bytes / each.moving_s for each in found)
    beside, lost_s, busy_s = [], 0.0, monotonic()
    for _ in range(num_rounds):
        computing = asyncio.create_task(asyncio.to_thread(prefill.begin()))
        while not computing.done():
            beside.append(await there.transfer(blocks, blocks))
        lost_s += await computing - alone_s
    step_s, beside_s = median_step(file, idle_s, copying_s), median_step(file, busy_s, monotonic())
    return (
        f"{rate / 1e9:7.1f}{statistics.median(each.num_bytes / each.moving_s for each in beside) / 1e9:7.1f}"
        f"{1e3 * statistics.median(each.time_s for each in beside):16.2f}{100 * lost_s / num_rounds / alone_s:12.1f}"
        f"{1e12 * lost_s / sum(each.num_bytes for each in beside):8.2f}"
        f"{1e6 * step_s:11.0f}{100 * (beside_s / step_s - 1):11.1f}"
    )


def median_step(file: Path, since_s: float, until_s: float) -> float:
    lines = file.read_text().splitlines()[:-1]  # the last one may be half of one
    steps = (map(float, line.split()) for line in lines)
    return statistics.median(took_s for at_s, took_s in steps if since_s < at_s < until_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer-device", default="", help="of the receiving process, if it is another one: cuda:1")
    parser.add_argument("--backends", nargs="+", default=["ipc", "mooncake", "nccl"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512], metavar="MIB")
    parser.add_argument("--block-bytes", type=int, default=2 * MIB)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--beside",
        nargs="?",
        const="",
        metavar="WAY",
        help="copies beside computation, in each way with this in its name",
    )
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1 or min(arguments.sizes) * MIB < arguments.block_bytes:
        parser.error("--rounds and --sizes: expected a round and a block of --block-bytes at least")
    os.environ.setdefault("MC_FORCE_TCP", "1")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    if arguments.settings:
        receive_beside_decode(arguments.role, msgspec.json.decode(arguments.settings, type=Settings))
        return
    if arguments.role:
        settings = Settings("", arguments.device, arguments.count, arguments.block_bytes)
        play(arguments.role, settings, arguments.count)
        return
    torch.set_num_threads(1)
    if arguments.beside is not None:
        num_blocks = 144 if arguments.device != "cpu" else 8  # 2 MiB each: 2048 tokens of an 8B model
        settings = Settings("", arguments.device, num_blocks, peer_device=arguments.peer_device)
        asyncio.run(compare_ways(settings, arguments.beside))
        return
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
