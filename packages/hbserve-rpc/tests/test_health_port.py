"""The small HTTP port: what it answers to probes, to Prometheus, and to whoever asks something else."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable

import pytest

from hbserve_rpc import AddressInUse, health_port
from hbserve_rpc.counts import Histogram
from hbserve_rpc.health_port import HealthPort
from hbserve_rpc.instance_metrics import instance_metrics
from hbserve_rpc.messages import InstanceStats
from hbserve_rpc.metrics_text import Family, text_of


class Process:
    """What a port tells of."""

    def __init__(self) -> None:
        self.dead = ""
        self.not_ready = "p0 is starting"
        self.port = self.make(0)

    def make(self, port: int) -> HealthPort:
        return HealthPort(
            "127.0.0.1", port, why_dead=lambda: self.dead, why_not_ready=lambda: self.not_ready, metrics=self.metrics
        )

    async def metrics(self) -> Iterable[Family]:
        return instance_metrics([InstanceStats("p0", "prefill", "ready", num_blocks=7)])

    async def send(self, request: bytes) -> bytes:
        host, port = self.port.address.split(":")
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            try:
                return await reader.read()
            except ConnectionResetError:  # it has closed without having read all
                return b""
            finally:
                writer.close()

    async def ask(self, path: str, method: str = "GET") -> tuple[int, str]:
        head, _, body = (await self.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).partition(
            b"\r\n\r\n"
        )
        return int(head.split()[1]), body.decode()


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    found = Process()
    await found.port.start()
    yield found
    await found.port.stop()
    assert found.port._answering == set()


async def test_probes_are_told_whether_it_lives_and_whether_it_serves(process):
    assert await process.ask("/health") == (200, "")
    assert await process.ask("/ready") == (503, "p0 is starting\n")
    process.not_ready = ""
    assert await process.ask("/ready?verbose") == (200, "")
    process.dead = "the engine failed"
    assert await process.ask("/health") == await process.ask("/ready") == (503, "the engine failed\n")
    assert await process.ask("/health", "HEAD") == (503, "")


async def test_metrics_are_there_and_their_head_alone_says_how_long_they_are(process):
    status, text = await process.ask("/metrics")
    assert status == 200
    assert 'hbserve:kv_blocks{instance_id="p0",role="prefill"} 7\n' in text
    head = await process.send(b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert f"Content-Length: {len(text)}\r\n".encode() in head


@pytest.mark.parametrize(
    ("request_text", "status"),
    [("GET /x HTTP/1.1", 404), ("POST /metrics HTTP/1.1", 405), ("GET", 404), ("\xff\xfe", 405), ("", 405)],
)
async def test_whatever_else_is_asked_is_refused(process, request_text, status):
    found = await process.send(request_text.encode("latin-1") + b"\r\n\r\n")
    assert int(found.split()[1]) == status
    assert (await process.ask("/health"))[0] == 200


async def test_a_head_without_end_and_a_client_that_says_nothing_are_dropped(process, monkeypatch):
    monkeypatch.setattr(health_port, "PATIENCE_S", 0.05)
    assert await process.send(b"GET /health HTTP/1.1\r\n") == b""
    assert await process.send(b"x" * 100_000) == b""
    assert (await process.ask("/health"))[0] == 200


async def test_who_is_still_connected_when_it_stops_leaves_nothing_behind(process):
    host, port = process.port.address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(30):
        while not process.port._answering:
            await asyncio.sleep(0.01)
    await process.port.stop()
    assert process.port._answering == set()
    writer.close()


async def test_a_port_that_is_taken_is_named(process):
    other = process.make(int(process.port.address.split(":")[1]))
    with pytest.raises(AddressInUse, match="health_port"):
        await other.start()
    await other.stop()


OUT_OF_FILES = """
import asyncio, os, resource, socket
from hbserve_rpc.health_port import HealthPort
from hbserve_rpc.stderr_log import log_to_stderr

async def metrics():
    return []

async def serve():
    port = HealthPort("127.0.0.1", 0, why_dead=str, why_not_ready=str, metrics=metrics)
    await port.start()
    clients = [socket.socket() for _ in range(4)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for number, client in enumerate(clients):
        if number == 3:
            os.close(held.pop())
        host, of_port = port.address.split(":")
        client.connect((host, int(of_port)))
        client.sendall(b"GET /health HTTP/1.1\\r\\n\\r\\n")
        client.setblocking(False)
        answer = await asyncio.get_running_loop().sock_recv(client, 1000)
        print(answer.split()[1].decode())
        client.close()
        if number < 3:
            held.append(os.open(os.devnull, os.O_RDONLY))
    await port.stop()

log_to_stderr("WARNING", "%(message)s")
asyncio.run(serve())
"""


def test_where_no_file_may_be_opened_probes_are_told_so_and_one_line_is_logged():
    done = subprocess.run([sys.executable, "-c", OUT_OF_FILES], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["503", "503", "503", "200"], done.stderr
    assert done.stderr == "connections are refused: this process may open 64 files (ulimit -n)\n"


def test_text_is_as_prometheus_reads_it():
    counter = Family("n", "counter", "Two\nlines \\", ["a", "b"])
    counter.add(1.5, 'x"\\\n', "y")
    histogram = Family("h", "histogram", "H.")
    histogram.add_histogram(Histogram([0.5, 1.0, 2.0], [1, 2, 3, 4], 9.5), bounds=[0.5, 2.0])
    assert text_of([counter, histogram]).decode() == (
        "# HELP n_total Two\\nlines \\\\\n# TYPE n_total counter\n"
        'n_total{a="x\\"\\\\\\n",b="y"} 1.5\n'
        "# HELP h H.\n# TYPE h histogram\n"
        'h_bucket{le="0.5"} 1\nh_bucket{le="2.0"} 6\nh_bucket{le="+Inf"} 10\nh_count 10\nh_sum 9.5\n'
    )
