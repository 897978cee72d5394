"""Cost of one Mooncake engine, and the calls of it that stop Python: uv run python benchmarks/mooncake_engines.py

docs/rationale.md says why links share engines, and why an engine's socket is told to wait for less long. The script
runs over TCP on this host. "The longest pause" is that of a thread that wants to run every half millisecond, while the
call is under way. The last calls are made while the peer is frozen in the middle of a write.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ |= {"MC_LOG_LEVEL": "ERROR", "MC_FORCE_TCP": "1", "MC_TRANSFER_TIMEOUT": "5"}

from hbserve_kv.transports.mooncake.engines import Engine, end
from hbserve_kv.transports.mooncake.setup import import_engine

SIZE = 256 << 20


def make(memory: torch.Tensor) -> Any:
    engine = import_engine()()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.batch_register_memory([memory.data_ptr()], [memory.nbytes]) == 0
    return engine


def adopted(native: Any) -> Engine:
    """Wrap an engine as links have it, without memory to try a peer with, because no transfer begins with it."""
    return Engine(native, memoryview(b""), 0)


def be_a_peer() -> None:
    memory = torch.zeros(SIZE, dtype=torch.uint8)
    engine = make(memory)
    print(engine.get_rpc_port(), memory.data_ptr(), flush=True)
    time.sleep(600)


class Watch(threading.Thread):
    """Measures the longest time for which this thread could not run."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0

    def run(self) -> None:
        last_s = time.monotonic()
        while True:
            time.sleep(0.0005)
            now_s = time.monotonic()
            self.longest_s = max(self.longest_s, now_s - last_s)
            last_s = now_s

    def during(self, what: str, call: Callable[[], object]) -> None:
        time.sleep(0.05)
        self.longest_s, began_s = 0.0, time.monotonic()
        call()
        took_s = time.monotonic() - began_s
        time.sleep(0.02)
        print(f"{what:44} {took_s * 1e3:9.1f} ms, longest pause of another thread {self.longest_s * 1e3:7.1f} ms")


def held() -> tuple[int, int, int]:
    """Return (resident KiB, threads, files) of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), int(status["Threads"]), len(os.listdir("/proc/self/fd"))


def costs(memory: torch.Tensor, num_engines: int) -> None:
    engines = [make(memory)]  # the first brings what the library keeps
    before, began_s = held(), time.monotonic()
    engines += [make(memory) for _ in range(num_engines)]
    per_s = (time.monotonic() - began_s) / num_engines
    kib, threads, files = ((now - then) / num_engines for now, then in zip(held(), before, strict=True))
    print(
        f"one of {num_engines} engines: {kib:.0f} KiB, {threads:.1f} threads, {files:.1f} files, {per_s * 1e3:.2f} ms"
    )
    asyncio.run(end_all([adopted(each) for each in engines]))


async def end_all(engines: list[Engine]) -> None:
    await asyncio.gather(*(end(engine) for engine in engines))


def pauses(memory: torch.Tensor, ends_as: str) -> None:
    watch = Watch()
    watch.start()
    peer = subprocess.Popen([sys.executable, __file__, "--peer"], stdout=subprocess.PIPE, text=True)
    assert peer.stdout is not None
    port, address = map(int, peer.stdout.readline().split())
    session, source = f"127.0.0.1:{port}", memory.data_ptr()
    engines: list[Any] = []
    watch.during("make and register", lambda: engines.append(make(memory)))
    watch.during("probe", lambda: engines[0].send_probe(session))
    watch.during("first read", lambda: engines[0].transfer_sync_read(session, source, address, 8))
    write = lambda: engines[0].batch_transfer_sync_write(session, [source], [address], [SIZE])  # noqa: E731
    watch.during("write of 256 MiB", write)
    threading.Timer(0.05, os.kill, (peer.pid, signal.SIGSTOP)).start()
    watch.during("writes, the peer is frozen in one of them", lambda: [write() for _ in range(2)])
    if ends_as == "mooncake":
        watch.during("the engine's end, as Mooncake has it", engines.clear)
    else:
        engine = adopted(engines.pop())
        watch.during("the engine's end, as HBServe does it", lambda: asyncio.run(end(engine)))
    peer.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-engines", type=int, default=64)
    parser.add_argument("--peer", action="store_true", help="be the process that is frozen")
    options = parser.parse_args()
    if options.peer:
        be_a_peer()
    ones = torch.ones(SIZE, dtype=torch.uint8)
    costs(ones, options.num_engines)
    for who in ("mooncake", "hbserve"):
        pauses(ones, who)
