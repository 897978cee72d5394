"""Hostile frames on every port of a scheduler and of two KV managers, while a good client and transfers go on.

    python benchmarks/wires.py [--frames 200000] [--half-open 1000] [--backend nccl] [--keyed]

The script sends malformed, truncated, oversized, mutated and replayed messages, and forged LINKs, BEGINs, COMMITs and
grants. It also makes connections that stay half open or send a byte now and then. Without keys, every peer that reaches
a port is heard, so that is the hard case. With --keyed, strangers get no further than the handshake.

The exit status says whether it went well: nothing crashes or hangs, every transfer brings what was sent, memory and
files are as before, and the good client waits less than 100 ms at the 99th percentile.
"""

import argparse
import asyncio
import contextlib
import json
import os
import queue
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq

from hbserve_rpc import Keys, RpcClient, SamplingParams, make_keys, own_process, wire
from hbserve_rpc.keys import Party
from hbserve_rpc.messages import (
    SCHEDULER_ABORT,
    SCHEDULER_GENERATE,
    SCHEDULER_INFO,
    AbortRequest,
    Empty,
    GenerateRequest,
)

MOST_P99_MS, MOST_GROWTH_MIB, MOST_FILES = 100.0, 48.0, 40
NUM_BLOCKS, BLOCK_BYTES = 64, 4096
OVERSIZED = 300 << 20
CONNECT_TIMEOUT_S = 0.02
"""How long to wait for a connection. It is short, because a port that refuses strangers does not say so."""
Frames = list[bytes]


# ---- who is attacked -------------------------------------------------------------------------------------------------


async def serve(backend: str, keys: dict[str, Keys]) -> None:
    """Run the process that is attacked. It prints its addresses, and then, in lines, how many transfers succeeded."""
    import torch

    from hbserve_kv import KVTransferConfig, KVTransferManager, Outcome
    from hbserve_scheduler import CpuScheduler, SchedulerConfig, SchedulerServer

    server = SchedulerServer(CpuScheduler(SchedulerConfig(port=0)), keys=keys.get("scheduler"))
    await server.start()
    pools = [torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8) for _ in range(2)]
    managers = [
        KVTransferManager(
            rank=rank, pool=pool, fingerprint={"model": "m"}, name=f"instance-{rank}",
            config=KVTransferConfig(backend=backend, buffer_size=1 << 20, timeout_s=10, keys=keys.get("instance")),
        )
        for rank, pool in enumerate(pools)
    ]  # fmt: skip
    for manager in managers:
        await manager.start()
    sender, receiver = managers
    number = 0
    while True:
        blocks = [number % NUM_BLOCKS, (number + 7) % NUM_BLOCKS]
        pools[0][blocks] = number % 251
        posted = receiver.post_receive(f"t{number}", blocks, sender="instance-0")
        transfer = await sender.open_send(f"t{number}", posted.grant)
        transfer.push(blocks, 0)
        sent, received = await transfer.commit(b"%d" % number), await posted.wait()
        assert sent.outcome is received.outcome is Outcome.COMPLETED, (sent, received)
        assert received.payload == b"%d" % number
        assert bool((pools[1][blocks] == number % 251).all())
        number += 1
        if number % 20 == 1:
            ports = [address.rpartition(":")[2] for address in (server.address, sender.address, receiver.address)]
            print(json.dumps({"ports": [int(port) for port in ports], "transfers": number}), flush=True)
        await asyncio.sleep(0.005)


async def ask(port: int, keys: dict[str, Keys]) -> None:
    """Run the good client, which measures the milliseconds of each call until stdin ends."""
    times: list[float] = []
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    async with RpcClient(f"127.0.0.1:{port}", keys=keys.get("client"), server="scheduler") as client:
        await client.call(SCHEDULER_INFO, Empty(), timeout_s=30)
        print("asking", flush=True)
        while not ended.done():
            began_s = time.perf_counter()
            await client.call(SCHEDULER_INFO, Empty(), timeout_s=30)
            times.append(1e3 * (time.perf_counter() - began_s))
            await asyncio.sleep(0.005)
    print(json.dumps(times))


# ---- what is sent ----------------------------------------------------------------------------------------------------


def corpus() -> list[Frames]:
    """Return valid messages of every kind and method, for each port."""
    from hbserve_kv.memory.layout import HeadRange, Layout, Plane
    from hbserve_kv.protocol import messages as kv

    request = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=3))
    grant = kv.Grant("t0", "127.0.0.1:1", "epoch", HeadRange())
    plane = Plane(0, 0, BLOCK_BYTES, 0, 0, BLOCK_BYTES)
    layout = Layout(NUM_BLOCKS, 1, 1, 1, [plane], [NUM_BLOCKS * BLOCK_BYTES], is_opaque=True)
    hello = kv.Handshake(
        kv.PROTOCOL_VERSION, 0, "epoch", "127.0.0.1:1", {"model": "m"}, HeadRange(), layout, {"nccl": b""}, "l"
    )
    bodies: list[tuple[Any, Any, Any]] = [
        (wire.Call, SCHEDULER_INFO, Empty()),
        (wire.Call, SCHEDULER_ABORT, AbortRequest("r")),
        (wire.Open, SCHEDULER_GENERATE, request),
        (wire.Open, kv.LINK, hello),
        (wire.Call, kv.BEGIN, kv.Begin("t0", "l")),
        (wire.Call, kv.BEGIN, kv.Begin("t0", "l", 1 << 62)),
        (wire.Notify, kv.PARTS, kv.PartsAnnounced("t0", "l", [kv.AnnouncedPart(0, 0, 1 << 40)])),
        (wire.Call, kv.COMMIT, kv.Commit("t0", "l", 0, 0, 0.0, b"")),
        (wire.Call, kv.ABANDON, kv.Abandon("t0", "l", "forged", drained=True)),
        (wire.Call, kv.TELL, kv.Told("l", "0", b"value")),
        (wire.Call, kv.ASK, kv.Asked("l", "0")),
        (wire.Call, kv.ALIVE, kv.Nothing()),
        (wire.Call, kv.ALIVE, grant),
    ]
    found = [[wire.encode(kind(7, method.name)), wire.encode(body)] for kind, method, body in bodies]
    plain = [
        wire.Hello(wire.PROTOCOL_VERSION, 5.0), wire.Hello(999, 5.0), wire.Ping(3), wire.Close(7), wire.Goodbye(id=8),
        wire.Credits(9, [(7, 1 << 60)] * 100), wire.Welcome(7, "epoch"), wire.Reply("epoch", 7),
    ]  # fmt: skip
    return found + [[wire.encode(each), b""] for each in plain]


def hostile(dice: random.Random, sound: list[Frames]) -> Frames:
    """Make one hostile message: whole but out of place, or spoilt in some way."""
    frames = [bytes(frame) for frame in dice.choice(sound)]
    way = dice.randrange(8)
    place = dice.randrange(len(frames))
    if way == 0:  # replayed as it is
        return frames
    if way == 1:
        frames[place] = frames[place][: dice.randrange(1 + len(frames[place]))]
    elif way == 2:
        spoilt = bytearray(frames[place] or b"\0")
        for _ in range(dice.randint(1, 4)):
            spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
        frames[place] = bytes(spoilt)
    elif way == 3:
        frames[place] = dice.randbytes(dice.choice((0, 1, 30, 5000)))
    elif way == 4:
        frames = frames * dice.randint(2, 4)
    elif way == 5:
        frames = frames[:1]
    elif way == 6:
        frames[place] = b"\x91" * dice.choice((10, 10_000)) + frames[place]  # lists in lists
    else:
        frames[place] = msgspec.msgpack.encode({"type": "Call", "id": -(1 << 60), "method": "x" * 3000})
    return frames


def flood(ports: list[int], count: int, seed: int, *, patience_ms: int = 2000) -> None:
    """Send messages to each port in turn, over connections that are made anew now and then. `patience_ms` is 0 for
    ports that let nobody in, so that nothing leaves."""
    dice, sound = random.Random(seed), corpus()
    context = zmq.Context()
    sockets: dict[int, zmq.Socket[bytes]] = {}
    for number in range(count):
        port = ports[number % len(ports)]
        if number % 5000 < len(ports):
            if port in sockets:
                sockets[port].close(linger=0)
            sockets[port] = context.socket(zmq.DEALER)
            sockets[port].setsockopt(zmq.SNDTIMEO, patience_ms)
            sockets[port].connect(f"tcp://127.0.0.1:{port}")
            with contextlib.suppress(zmq.Again):
                sockets[port].send_multipart([wire.encode(wire.Hello(wire.PROTOCOL_VERSION, 5.0)), b""])
        with contextlib.suppress(zmq.Again):
            sockets[port].send_multipart(hostile(dice, sound))
        with contextlib.suppress(zmq.Again):
            while number % 50 == 0:
                sockets[port].recv_multipart(zmq.NOBLOCK)
    context.destroy(linger=patience_ms // 2)


def raw_frames(dice: random.Random) -> bytes:
    """Return bytes that no library sends: half a greeting, a frame that claims to be huge, noise, other protocols."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    return dice.choice(
        [
            greeting[: dice.randrange(64)],
            greeting + ready + b"\x02" + OVERSIZED.to_bytes(8, "big") + b"x" * 100,
            greeting + ready + b"\x02" + ((1 << 63) - 1).to_bytes(8, "big"),
            greeting + ready + dice.randbytes(200),
            greeting.replace(b"NULL", b"CURV") + dice.randbytes(300),
            dice.randbytes(dice.randint(1, 4000)),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        ]
    )


def knock(ports: list[int], count: int, seed: int) -> None:
    """Make connections that send one of `raw_frames`, and close."""
    dice = random.Random(seed)
    for number in range(count):
        address = "127.0.0.1", ports[number % len(ports)]
        with contextlib.suppress(OSError), socket.create_connection(address, CONNECT_TIMEOUT_S) as one:
            one.sendall(raw_frames(dice))
            if number % 3 == 0:
                one.settimeout(0.05)
                one.recv(4096)


@contextlib.contextmanager
def half_open(ports: list[int], count: int) -> Iterator[list[socket.socket]]:
    """Make connections that send a byte at a time, or nothing."""
    made: list[socket.socket] = []
    try:
        for number in range(count):
            with contextlib.suppress(OSError):
                made.append(socket.create_connection(("127.0.0.1", ports[number % len(ports)]), CONNECT_TIMEOUT_S))
        yield made
    finally:
        for each in made:
            each.close()


def drip(sockets: list[socket.socket], place: int) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    for each in sockets[::2]:
        with contextlib.suppress(OSError):
            each.send(greeting[place % len(greeting) :][:1])


# ---- what comes of it ------------------------------------------------------------------------------------------------


def state(pid: int) -> tuple[float, int, int]:
    """Return MiB, files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(rss_kib) / 1024, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def listening(pid: int) -> list[int]:
    """Return the ports at which a process listens, including those of libraries."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:[").removesuffix("]"))
    rows = [row.split() for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes})


class Victim:
    """The process that is attacked, and its good client."""

    def __init__(self, backend: str, keys: Mapping[Party, Keys]) -> None:
        self._keys = msgspec.json.encode(keys) + b"\n"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads would hold the process up
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.process = self._start("--serve", backend)
        threading.Thread(target=self._take_lines, daemon=True).start()
        self.ours: list[int] = self.read()["ports"]
        self.client = self._start("--ask", str(self.ours[0]))
        assert self.client.stdout is not None
        assert self.client.stdout.readline() == b"asking\n", "the good client was not let in"

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, __file__, *arguments]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        assert started.stdin is not None
        started.stdin.write(self._keys)
        started.stdin.flush()
        return started

    def _take_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def read(self) -> dict[str, Any]:
        if not (line := self._lines.get()):
            sys.exit(f"the process that was attacked has ended: {self._last_words()}")
        return dict(json.loads(line))

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-3000:]

    def transfers(self) -> int:
        """Return how many transfers have succeeded, and wait for one more, which shows that nothing hangs."""
        began_s = time.monotonic()
        while True:
            last = self.read()["transfers"]
            if time.monotonic() - began_s > 0.2:
                return int(last)

    def client_times(self) -> list[float]:
        out, _ = self.client.communicate(timeout=60)
        if self.client.returncode:
            sys.exit(f"the good client has ended: {self._last_words()}")
        return list(json.loads(out))

    def kill(self) -> None:
        for process in (self.client, self.process):
            process.kill()
            process.wait()


def attack(victim: Victim, arguments: argparse.Namespace) -> bool:
    pid = victim.process.pid
    ports = listening(pid)
    assert set(victim.ours) <= set(ports)
    patience_ms = 0 if arguments.keyed else 2000
    flood(victim.ours, 500, 0, patience_ms=patience_ms)  # so that what is made at the first such message is there
    knock(ports, 50, 0)
    before, began_s, transfers = state(pid), time.monotonic(), victim.transfers()
    rounds = 4
    with half_open(ports, arguments.half_open) as sockets:
        for number in range(rounds):
            drip(sockets, number)
            flood(victim.ours, arguments.frames // rounds, number + 1, patience_ms=patience_ms)
            knock(ports, arguments.frames // rounds // 100, number + 1)
            drip(sockets, rounds + number)
    deadline_s = time.monotonic() + 30
    while state(pid)[1] > before[1] + MOST_FILES and time.monotonic() < deadline_s:
        victim.read()
    after, took_s, done = state(pid), time.monotonic() - began_s, victim.transfers() - transfers
    times = sorted(victim.client_times())
    p99_ms = times[int(0.99 * len(times))]
    print(
        f"{arguments.frames} messages, {arguments.half_open} half-open connections to ports {ports} in {took_s:.0f} s"
    )
    print(f"transfers: {done}, each with what was sent")
    print(f"good client: {len(times)} calls, p50 {statistics.median(times):.1f} ms, p99 {p99_ms:.1f} ms")
    names = zip(("MiB", "files", "threads"), before, after, strict=True)
    print("; ".join(f"{name}: {old:.0f} before, {new:.0f} after" for name, old, new in names))
    grown = [new - old for old, new in zip(before, after, strict=True)]
    is_well = p99_ms < arguments.p99_ms and grown[0] < MOST_GROWTH_MIB and grown[1] <= MOST_FILES and done > 0
    print("well" if is_well else "NOT as it must be")
    return is_well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--half-open", type=int, default=1000)
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--keyed", action="store_true")
    parser.add_argument("--p99-ms", type=float, default=MOST_P99_MS, help="Of the good client, at most.")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--ask", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    own_process.set_up()
    if arguments.serve or arguments.ask:
        keys = msgspec.json.decode(sys.stdin.buffer.readline(), type=dict[str, Keys])
        asyncio.run(serve(arguments.serve, keys) if arguments.serve else ask(arguments.ask, keys))
        return
    victim = Victim(arguments.backend, make_keys() if arguments.keyed else {})
    try:
        is_well = attack(victim, arguments)
    finally:
        victim.kill()
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
