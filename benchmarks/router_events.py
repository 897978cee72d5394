"""Processor time of the router for vLLM servers, alone: for a request, and for an event of a stream.

    python benchmarks/router_events.py [--before FOLDER]

Its servers are one process, which speaks as little HTTP as it must. A step is one event for each of the streams. The
next step begins when the clients have all of it, so no events are merged, however busy the machine is. `--before`
names a folder with another state of this project's packages, which takes turns with this one. The limit is what a
process takes for an event that it only reads from one socket and writes to another.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from hbserve_testing.narrowing import present

STREAMS, STEPS, REQUESTS = 64, 60, 100
LIMIT = "read and written"
CHOICE = b'{"index":0,"text":" word","logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null}'
EVENT = (
    b'data: {"id":"cmpl-0","object":"text_completion","created":1,"model":"m","choices":[%b],"usage":null}\n\n' % CHOICE
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
PARAMS = {"kv_transfer_params": {"do_remote_prefill": True, "transfer_id": "t"}}


class Counted:
    """A counter of bytes, with which to wait for so many."""

    def __init__(self) -> None:
        self._num, self._wanted, self._there = 0, 0, asyncio.Event()

    def add(self, num: int) -> None:
        self._num += num
        if self._num >= self._wanted:
            self._there.set()

    async def more(self, num: int) -> None:
        self._wanted += num
        if self._num < self._wanted:
            self._there.clear()
            await asyncio.wait_for(self._there.wait(), 60)


class Server(asyncio.Protocol):
    """A server for both prefill and decode. Requests with "stream":true get their events by `step`."""

    streams: ClassVar[list[asyncio.Transport]] = []
    begun = Counted()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._data = transport, b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, rest = self._data.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
            if len(rest) < length:
                return
            body, self._data = rest[:length], rest[length:]
            if b'"stream":true' in body.replace(b" ", b""):
                self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                self._transport.write(b"transfer-encoding: chunked\r\n\r\n")
                self.streams.append(self._transport)
                self.begun.add(1)
            else:
                answer = json.dumps(PARAMS).encode()
                self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                self._transport.write(b"content-length: %d\r\n\r\n%b" % (len(answer), answer))

    @classmethod
    def step(cls, part: bytes) -> None:
        for each in cls.streams:
            each.write(part)


class Stream(asyncio.Protocol):
    """A client of one stream. `on_bytes` is called with the number of new bytes, without the head of the answer."""

    def __init__(self, body: bytes, on_bytes: Callable[[int], None]) -> None:
        self._body, self._on_bytes, self._is_begun = body, on_bytes, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(self._body)
        transport.write(head + self._body)

    def data_received(self, data: bytes) -> None:
        if not self._is_begun:
            data = data.partition(b"\r\n\r\n")[2]
            self._is_begun = True
        self._on_bytes(len(data))


class Relay(asyncio.Protocol):
    """The limit: a protocol that only reads, and writes to another socket."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.other: asyncio.Transport | None = None
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        present(self.other).write(data)


async def relay(port: int, to_port: int) -> None:
    """Run the relay in a process of its own. Each connection to `port` becomes one to `to_port`."""
    loop = asyncio.get_running_loop()

    class Accepted(Relay):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._connecting = loop.create_task(self._connect())

        async def _connect(self) -> None:
            self.transport.pause_reading()
            _, there = await loop.create_connection(Relay, "127.0.0.1", to_port)
            there.other, self.other = self.transport, there.transport
            self.transport.resume_reading()

    server = await loop.create_server(Accepted, "127.0.0.1", port)
    await server.serve_forever()


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def connected(port: int, body: bytes, on_bytes: Callable[[int], None]) -> asyncio.Transport:
    loop, until_s = asyncio.get_running_loop(), time.monotonic() + 60
    while True:
        try:
            transport, _ = await loop.create_connection(lambda: Stream(body, on_bytes), "127.0.0.1", port)
            return transport
        except ConnectionError:
            if time.monotonic() > until_s:
                raise
            await asyncio.sleep(0.1)


async def measured(process: subprocess.Popen[bytes], port: int) -> tuple[float, float]:
    """Measure the processor time of a router: milliseconds for a request that is not streamed, and microseconds for an
    event."""
    body = json.dumps({"model": "m", "prompt": list(range(3, 2051)), "max_tokens": 9}).encode()
    stream = json.dumps({"model": "m", "prompt": [3, 4, 5], "max_tokens": STEPS, "stream": True}).encode()
    answers, events = Counted(), Counted()
    await asyncio.sleep(3)  # until it has found its servers
    before_s = processor_s(process.pid)
    for _ in range(REQUESTS):
        transport = await connected(port, body, answers.add)
        await answers.more(len(json.dumps(PARAMS)))
        transport.close()
    request_ms = (processor_s(process.pid) - before_s) / REQUESTS * 1e3
    streams = [await connected(port, stream, events.add) for _ in range(STREAMS)]
    await Server.begun.more(STREAMS)
    Server.step(CHUNK)
    await events.more(STREAMS * len(CHUNK))
    before_s = processor_s(process.pid)
    for _ in range(STEPS):
        Server.step(CHUNK)
        await events.more(STREAMS * len(CHUNK))
    event_us = (processor_s(process.pid) - before_s) / (STREAMS * STEPS) * 1e6
    Server.step(b"0\r\n\r\n")
    Server.streams.clear()
    for each in streams:
        each.abort()
    return request_ms, event_us


def started(name: str, port: int, servers_port: int, before: str) -> subprocess.Popen[bytes]:
    """Start the router, of "now" or "before", or the relay."""
    url, environment = f"http://127.0.0.1:{servers_port}", dict(os.environ)
    if name == "before":
        found = [*map(str, Path(before).glob("packages/*/src")), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(found)
    command = [__file__, "--relay", str(port), str(servers_port)]
    if name != LIMIT:
        command = ["-m", "hbserve_kv.integrations.router", "--port", str(port)]
        command += ["--prefill", f"{url},7100", "--decode", url]
    return subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.DEVNULL)


async def compare(before: str, rounds: int) -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    servers_port = server.sockets[0].getsockname()[1]
    ways = [LIMIT, "now", *(["before"] if before else [])]
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds * len(ways)):
        name, port = ways[number % len(ways)], 20_000 + (os.getpid() * 7 + number) % 10_000
        process = started(name, port, servers_port, before)
        try:
            seen[name].append(await measured(process, port))
        finally:
            process.kill()
            process.wait()
    for name, found_of in seen.items():
        request_ms, event_us = (statistics.median(each) for each in zip(*found_of, strict=True))
        each = ", ".join(f"{us:.0f}" for _, us in found_of)
        print(f"{name:18} {request_ms:6.2f} ms for a request of 2048 tokens, {event_us:5.1f} us for an event ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--relay", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    asyncio.run(relay(*options.relay) if options.relay else compare(options.before, options.rounds))


if __name__ == "__main__":
    main()
