"""Time of sums over two ranks on two GPUs of this host, by our kernels and by NCCL, each in a CUDA graph.

    python benchmarks/rank_sums.py
    python benchmarks/rank_sums.py --rows 1 256 2048 --hidden 4096

For each number of rows the table has microseconds of one sum that is added to the residual stream and normed: by NCCL
and the kernels that follow it then, by our kernel for few rows, and by ours for many. It also has NCCL's sum alone, and
the time of the bytes that a rank must send, at the rate of a copy between the two GPUs, measured in the same run.
One time is the median of seven replays of a graph of 40 sums. All of our results are compared, bit for bit, with a sum
in float32 that is rounded once.
Then, for --prefill-rows, it has a rank's output and down products of one layer of an 8B model: alone; with the sums
behind them by NCCL; and with those by our kernel, in parts where one place has no room for all. Numbers are bfloat16.
"""

import argparse
import copy
import multiprocessing
import socket
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from hbserve_core.cuda_runner.kernels.pointwise import rms_norm
from hbserve_core.cuda_runner.products import CudaProducts, ResidualStream
from hbserve_core.model.layers import Linear, RmsNorm
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.shard import Shard
from hbserve_core.ranks.distributed_group import DistributedRankGroup, host_store, reach_store
from hbserve_core.ranks.mapped_memory import FEW_BYTES, MappedMemory
from hbserve_testing.narrowing import present

DTYPE, EPS = torch.bfloat16, 1e-6
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
SUMS, REPLAYS, RANKS = 40, 7, 2
PREFILL_ROWS, INPUTS, LAYERS = [2048, 8192, 16384], (2048, 6144), 6
COPY_BYTES = 256 << 20
MOST_FEW_BYTES = 4 << 20
"""Largest sum that the kernel for few rows computes here. Ranks take it only up to FEW_BYTES."""
START_S = 120.0
spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setup:
    """Parameters that both ranks know."""

    port: int
    rows: tuple[int, ...]
    hidden: int
    prefill_rows: tuple[int, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--hidden", type=int, default=4096, help="numbers of a row")
    parser.add_argument("--prefill-rows", type=int, nargs="*", default=PREFILL_ROWS)
    args = parser.parse_args()
    if torch.cuda.device_count() < RANKS:
        print("needs two CUDA devices: what is measured here are sums over both", file=sys.stderr)
        return 2
    listening = socket.create_server(("127.0.0.1", 0))
    setup = Setup(listening.getsockname()[1], tuple(args.rows), args.hidden, tuple(args.prefill_rows))
    store = host_store(listening.detach(), setup.port)
    ends, processes = [], []
    for rank in range(RANKS):
        here, there = spawn.Pipe()
        processes.append(spawn.Process(target=rank_main, args=(rank, setup, there), daemon=True))
        processes[-1].start()
        there.close()
        ends.append(here)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}; times in microseconds", flush=True)
    is_right = True
    try:
        while (said := [end.recv() for end in ends])[0][0] is not None:
            print(said[0][0], flush=True)
            is_right = is_right and all(right for _, right in said)
    except EOFError:
        is_right = False
    for process in processes:
        process.join(10)
    del store
    return 0 if is_right else 1


def rank_main(rank: int, setup: Setup, pipe: Connection) -> None:
    try:
        Rank(rank, setup).measure(lambda text, right: pipe.send((text, right)))
        pipe.send((None, True))
    except BaseException:
        traceback.print_exc()
        raise


Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Adds the sum of partial sums to rows of the residual stream, and returns the normed rows."""


class Rank:
    """One of the two processes."""

    def __init__(self, rank: int, setup: Setup) -> None:
        self._device = torch.device("cuda", rank)
        self._setup = setup
        shard, store = Shard(rank, RANKS), reach_store(setup.port)
        self._group = DistributedRankGroup(shard, self._device, store, seed=0)
        self._group.connect()
        self._norm = torch.rand(setup.hidden, generator=torch.Generator().manual_seed(1)).to(self._device, DTYPE)
        prefix = torch.distributed.PrefixStore
        self._few = MappedMemory(shard, self._device, prefix("few", store), few_bytes=MOST_FEW_BYTES)
        self._many = MappedMemory(shard, self._device, prefix("many", store), few_bytes=0)
        self._group.least(0)  # both have mapped the other's
        self._stream = torch.cuda.Stream(self._device)

    def _nccl(self, rows: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        self._group._run(self._group._process_group.allreduce, [partial], self._group._sum)
        rows += partial
        return rms_norm(rows, self._norm, EPS)

    def _nccl_alone(self, rows: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        self._group._run(self._group._process_group.allreduce, [partial], self._group._sum)
        return partial

    def _few_rows(self, rows: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        return present(self._few.sum(partial, rows, (self._norm, EPS))[1])

    def _many_rows(self, rows: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        """Sum by the kernel for many rows. In a graph, the partial sums are where a product would have written them;
        else they are copied there first."""
        place = present(self._many.partial((len(partial), self._setup.hidden), DTYPE))
        if not torch.cuda.is_current_stream_capturing():
            place.copy_(partial)
        return present(self._many.sum(place, rows, (self._norm, EPS))[1])

    def ways(self, num_bytes: int) -> dict[str, Way]:
        found: dict[str, Way] = {"nccl+norm": self._nccl}
        if num_bytes <= MOST_FEW_BYTES:
            found["few"] = self._few_rows
        return found | {"many": self._many_rows}

    def measure(self, say: Callable[[str, bool], None]) -> None:
        bytes_per_s = self._copy_rate()
        say(f"a copy between the GPUs: {bytes_per_s / 1e9:.0f} GB/s; few rows are up to {FEW_BYTES >> 10} KiB", True)
        for count in self._setup.rows:
            num_bytes = count * self._setup.hidden * DTYPE.itemsize
            partials = [self._random(count, 10 + rank) for rank in range(RANKS)]
            before = self._random(count, 9)
            expected = (partials[0].float() + partials[1].float() + before.float()).to(DTYPE)
            own = partials[self._group.shard.rank]
            times, wrong = {"nccl": self._microseconds(self._nccl_alone, before.clone(), own.clone())}, []
            for name, way in self.ways(num_bytes).items():
                rows = before.clone()
                way(rows, own.clone())
                if name != "nccl+norm" and not torch.equal(rows, expected):
                    wrong.append(name)
                times[name] = self._microseconds(way, rows, own.clone())
            limit_us = 1e6 * num_bytes / bytes_per_s
            text = f"{count:5} rows {num_bytes >> 10:6} KiB  limit {limit_us:6.1f}"
            text += "".join(f"  {name} {us:6.1f}" for name, us in times.items())
            say(text + (f"  WRONG: {wrong}" if wrong else ""), not wrong)
        for count in self._setup.prefill_rows:
            say(self._prefill(count), True)

    def _prefill(self, count: int) -> str:
        """Measure the products of a layer whose results are summed. Returns a line of the table."""
        products, norm = CudaProducts(self._device), RmsNorm(self._norm, EPS)
        options: Any = {"dtype": DTYPE, "device": self._device}
        linears = [Linear(torch.randn((self._setup.hidden, size), **options)) for size in INPUTS]
        given = [torch.randn((count, size), **options) for size in INPUTS]
        stream = ResidualStream(self._random(count, 4))
        by_nccl = copy.copy(self._group)
        by_nccl._memory = None

        def summed(group: RankGroup) -> None:
            for linear, inputs in zip(linears, given, strict=True):
                products.add_sum_to(stream, inputs, linear, group, norm)
                stream.normed_by(norm)

        def alone() -> None:
            for linear, inputs in zip(linears, given, strict=True):
                linear(inputs)

        text = f"{count:5} rows, two products of a layer: alone {self._launched(alone):7.1f}"
        text += f"  nccl+norm {self._launched(lambda: summed(by_nccl)):7.1f}"
        return f"{text}  many {self._launched(lambda: summed(self._group)):7.1f}"

    def _launched(self, layer: Callable[[], None]) -> float:
        """Return the microseconds of one of several layers that are launched in turn, without a graph, because no graph
        has so many rows."""
        times, meeting = [], torch.zeros(1, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            layer()
            for _ in range(REPLAYS + 1):
                self._group.least(0)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._nccl_alone(meeting, meeting)
                begin.record(self._stream)
                for _ in range(LAYERS):
                    layer()
                end.record(self._stream)
                end.synchronize()
                times.append(1e3 * begin.elapsed_time(end) / LAYERS)
        return statistics.median(times[1:])

    def _random(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self._setup.hidden, generator=generator).to(self._device, DTYPE)

    def _copy_rate(self) -> float:
        """Measure the rate of a copy to the other GPU, in bytes a second."""
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self._device)
        target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{1 - self._device.index}")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        return COPY_BYTES / (begin.elapsed_time(end) / 1e3)

    def _microseconds(self, way: Way, rows: torch.Tensor, partial: torch.Tensor) -> float:
        """Return the microseconds of one sum, in a graph of several."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        times = []
        with torch.cuda.stream(stream):
            meeting = torch.zeros(1, device=self._device)
            partial.zero_()  # NCCL's sums are in place, and would grow
            way(rows, partial)
            graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(SUMS):
                    way(rows, partial)
            for _ in range(REPLAYS + 1):
                self._group.least(0)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._nccl_alone(rows, meeting)  # so that none is measured waiting for the other to begin
                begin.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                times.append(1e3 * begin.elapsed_time(end) / SUMS)
            graph.reset()
        return statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
