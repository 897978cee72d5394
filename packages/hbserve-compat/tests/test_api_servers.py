"""`--api-servers N`: several processes on one port. Each may end by itself, and they end together with the server."""

import asyncio
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hbserve_served import Served, served, until

from hbserve.processes import child_process
from hbserve.server import front_ends
from hbserve.server.front_end import FrontEnd
from hbserve.server.front_ends import FrontEnds
from hbserve.server.http import http_server
from hbserve_rpc import AddressInUse
from hbserve_scheduler import CpuScheduler, SchedulerConfig, SchedulerServer
from hbserve_scheduler.config import ServerSection
from hbserve_testing.narrowing import present

BODY = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
NO_HEARTBEATS = {"port": 0, "heartbeat_timeout_s": 600}
"""Settings of a scheduler whose heartbeats notice no dead process, so that the tests see the other ways to notice."""


def processes(server: Served) -> set[int]:
    """Return the pids of the processes that serve HTTP."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_text().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if parent == server.process.pid and front_ends.MODULE in command:
            found.add(int(path.parent.name))
    return found


class Stream:
    """One streamed answer, on a connection of its own."""

    def __init__(self, url: str) -> None:
        self.lines: list[str] = []
        self.failed = False
        self._thread = threading.Thread(target=self._read, args=[url])
        self._thread.start()

    def _read(self, url: str) -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=60) as response:
                self.lines.extend(filter(None, response.iter_lines()))
        except httpx.HTTPError:
            self.failed = True

    def wait(self) -> None:
        self._thread.join(timeout=90)
        assert not self._thread.is_alive()

    @property
    def is_whole(self) -> bool:
        return self.lines[-1:] == ["data: [DONE]"] and '"finish_reason":"length"' in self.lines[-2]


def begin(url: str, count: int) -> list[Stream]:
    streams = [Stream(url) for _ in range(count)]
    until(lambda: all(each.lines or each.failed for each in streams))
    return streams


@pytest.mark.warm
def test_one_that_is_killed_is_started_again_while_the_others_serve_and_sigterm_lets_all_answers_end(
    tmp_path, small_model
):
    sections: dict[str, Any] = {"model": {"path": str(small_model("qwen3"))}, "scheduler": NO_HEARTBEATS}
    with served(tmp_path, "--api-servers=3", "--drain-timeout=60", **sections) as server:
        url = server.url
        before = processes(server)
        assert len(before) == 3
        streams = begin(url, 9)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        for stream in streams:
            stream.wait()
            assert stream.is_whole != stream.failed
        server.until_empty()  # what the dead one had, too
        server.found(r"(api-server-.*SIGKILL.*restart 1 of at most 5 in a row, in 0\.5 s)")
        until(lambda: len(processes(server)) == 3)
        assert killed not in processes(server)

        def all_have_answered() -> bool:
            httpx.get(f"{url}/v1/models/again")  # each request is a connection, which any of them may get
            log = server.log.read_text()
            return all(f"[api-server-{number}]" in _of(log, "GET /v1/models/again") for number in range(3))

        until(all_have_answered)
        totals = {server.metrics()["hbserve:requests_total"] for _ in range(6)}
        assert len(totals) == 1, "each has the sum"
        streams = begin(url, 6)
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.wait()
            assert stream.is_whole


def _of(log: str, what: str) -> str:
    return "\n".join(line for line in log.splitlines() if what in line)


@pytest.mark.warm
def test_ctrl_c_three_times_ends_all_without_a_traceback(tmp_path, small_model):
    options: dict[str, Any] = {"model": {"path": str(small_model("qwen3"))}, "statuses": (0, 128 + signal.SIGINT)}
    with served(tmp_path, "--api-servers=2", "--drain-timeout=60", **options) as server:
        url, group = server.url, processes(server)
        streams = begin(url, 4)
        for count in (1, 2, 3):
            server.process.send_signal(signal.SIGINT)
            until(partial(_has, server, "ending: SIGINT", min(count, 2)))
        server.process.wait(timeout=60)
        for stream in streams:
            stream.wait()
        assert not any(Path(f"/proc/{pid}").exists() for pid in group)
        assert "Traceback" not in server.log.read_text()


def _has(server: Served, text: str, count: int) -> bool:
    return server.log.read_text().count(text) >= count


async def test_an_address_in_use_is_an_error_although_ports_are_shared_and_is_free_at_the_end(monkeypatch):
    first = FrontEnds(ServerSection(port=0, api_servers=2), "INFO", lambda *_: None)
    port = int(first.url.rpartition(":")[2])
    for settings in (ServerSection(port=port), ServerSection(port=port, api_servers=2)):
        with pytest.raises(AddressInUse):
            FrontEnd(settings) if settings.api_servers == 1 else FrontEnds(settings, "INFO", lambda *_: None)
    await first.start()
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{first.url}/health")).status_code == 503
    await first.stop()
    again = FrontEnd(ServerSection(port=port))
    await again.stop()


def test_connections_that_a_server_of_several_processes_has_ended_do_not_keep_the_next_one_from_its_port():
    settings = ServerSection(host="127.0.0.1", port=0, api_servers=2)
    first = http_server._bound(settings)
    port = first.getsockname()[1]
    held = http_server.held_for_others(first)
    first.close()
    own = msgspec.structs.replace(settings, port=port)
    with http_server.shared_with_others(own, None) as listening:
        listening.listen()
        with socket.create_connection(("127.0.0.1", port)) as client, listening.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_WR)  # the side that ends first is the one that is remembered
            assert client.recv(1) == b""
    with pytest.raises(AddressInUse):  # though nobody listens
        http_server._bound(own)
    held.close()
    http_server._bound(own).close()


CHILD = """
import json, pathlib, socket, sys, time
settings = sys.stdin.readline()
if pathlib.Path(sys.argv[1]).exists():
    sys.exit("mishap")
while "api-server-1" in settings and pathlib.Path(sys.argv[1]).with_name("slow").exists():
    time.sleep(0.01)
print('{"address": "127.0.0.1:1"}', flush=True)
sys.stderr.write(settings)
if (fd := json.loads(settings)["listening_fd"]) is not None:
    print("listens at", socket.socket(fileno=fd).getsockname(), file=sys.stderr)
sys.stdin.read()
"""
"""Program that replaces a process of the server: it serves nothing, and prints its settings and the
address of the socket that it has inherited."""


@pytest.fixture
def broken(monkeypatch, tmp_path) -> Path:
    """Path while which exists, processes of a server, which are CHILDs, end at once; `slow` beside it holds one up."""
    path, execute = tmp_path / "broken", asyncio.create_subprocess_exec

    async def start_child(*_: str, **options: Any) -> asyncio.subprocess.Process:
        return await execute(sys.executable, "-S", "-c", CHILD, str(path), **options)

    monkeypatch.setattr(child_process.asyncio, "create_subprocess_exec", start_child)
    return path


async def test_one_that_ends_again_and_again_is_given_up_and_the_server_ends_with_the_last(
    monkeypatch, broken, caplog, capsys
):
    monkeypatch.setattr(child_process, "FIRST_RESTART_S", 0.0001)
    deaths: list[str] = []
    front_end = FrontEnds(ServerSection(port=0, api_servers=2), "INFO", lambda *death: deaths.append(": ".join(death)))
    server = SchedulerServer(CpuScheduler(SchedulerConfig(host="0.0.0.0", port=0, max_queue_size=9)))
    await server.start()
    await server.scheduler.add_instance("h0", "hybrid", "127.0.0.1:2")
    try:
        await front_end.begin("small", Path("/models/small"), server)
        first, second = present(front_end._processes).processes
        await _until(lambda: len(first._last_lines) == 1)
        told = msgspec.json.decode(first._last_lines[0], type=front_ends.FrontEndSettings)
        assert told.instances == [("h0", "hybrid", "127.0.0.1:2")]
        assert (told.scheduler.max_queue_size, told.server.port) == (5, int(front_end.url.rpartition(":")[2]))
        assert told.parent == f"127.0.0.1:{server.address.rpartition(':')[2]}"
        broken.touch()
        os.kill(present(first.pid), signal.SIGKILL)
        await _until(lambda: f"{first.name}: " in caplog.text and "is given up" in caplog.text)
        assert not deaths, "the other one serves"
        os.kill(present(second.pid), signal.SIGKILL)
        await _until(lambda: bool(deaths))
        assert re.fullmatch(f"{second.name}: .*mishap; it was started 5 times again, and is given up", deaths[0])
    finally:
        await front_end.stop()
        await server.stop()


async def test_when_the_first_process_serves_nobody_answers_503_in_its_place_while_others_are_loading(broken):
    slow = broken.with_name("slow")
    slow.touch()
    front_end = FrontEnds(ServerSection(port=0, api_servers=2), "INFO", lambda *_: None)
    server = SchedulerServer(CpuScheduler(SchedulerConfig(port=0)))
    await server.start()
    await front_end.start()
    beginning = asyncio.create_task(front_end.begin("small", Path("/models/small"), server))
    try:
        async with asyncio.timeout(30), httpx.AsyncClient() as client:
            with pytest.raises(httpx.TransportError):  # these processes take no connections
                await _answer_other_than_503(client, f"{front_end.url}/health")
        assert not beginning.done()
        slow.unlink()
        await beginning
    finally:
        beginning.cancel()
        await front_end.stop()
        await server.stop()


async def test_one_that_dies_while_others_are_loading_is_started_again(monkeypatch, broken):
    monkeypatch.setattr(child_process, "FIRST_RESTART_S", 0.0001)
    slow = broken.with_name("slow")
    slow.touch()
    front_end = FrontEnds(ServerSection(port=0, api_servers=2), "INFO", lambda *_: None)
    server = SchedulerServer(CpuScheduler(SchedulerConfig(port=0)))
    await server.start()
    beginning = asyncio.create_task(front_end.begin("small", Path("/models/small"), server))
    try:
        await _until(lambda: "api-server-0" in server.siblings._remotes)
        first = present(front_end._processes).processes[0]
        killed = present(first.pid)
        os.kill(killed, signal.SIGKILL)
        await _until(lambda: "api-server-0" not in server.siblings._remotes)
        slow.unlink()
        await beginning
        await _until(lambda: first.pid != killed and "api-server-0" in server.siblings._remotes)
    finally:
        beginning.cancel()
        await front_end.stop()
        await server.stop()


async def test_a_unix_socket_is_bound_once_and_given_to_every_process_again_after_a_restart(
    monkeypatch, broken, tmp_path
):
    monkeypatch.setattr(child_process, "FIRST_RESTART_S", 0.0001)
    path = tmp_path / "socket"
    front_end = FrontEnds(ServerSection(uds=str(path), api_servers=2), "INFO", lambda *_: None)
    assert front_end.curl == f"curl --unix-socket {path} http://localhost"
    with (
        monkeypatch.context() as patch
    ):  # where keys are asked for, the line that is said at the start has a place for one
        patch.setenv("HBSERVE_API_KEY", "secret")
        assert front_end.curl == f"curl -H 'Authorization: Bearer KEY' --unix-socket {path} http://localhost"
    server = SchedulerServer(CpuScheduler(SchedulerConfig(port=0)))
    await server.start()
    await front_end.start()
    try:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
            assert (await client.get("http://here/health")).status_code == 503
        await front_end.begin("small", Path("/models/small"), server)
        processes, told = present(front_end._processes).processes, f"listens at {path}"
        await _until(lambda: all(told in each._last_lines for each in processes))
        killed = present(processes[0].pid)
        os.kill(killed, signal.SIGKILL)
        await _until(lambda: processes[0].pid != killed and told in processes[0]._last_lines)
        with pytest.raises(AddressInUse):  # who connects waits for one of them
            FrontEnd(ServerSection(uds=str(path)))
        await front_end.drain()
        assert path.is_socket(), "refusals of those that drain come by it"
    finally:
        await front_end.stop()
        await server.stop()
    assert not path.exists()


async def _answer_other_than_503(client: httpx.AsyncClient, url: str) -> httpx.Response:
    while (answer := await client.get(url)).status_code == 503:
        await asyncio.sleep(0.01)
    return answer


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
