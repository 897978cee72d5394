"""`--api-servers N`: several processes on one port, of which each may end, and which end together."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
import msgspec
import pytest
from hbserve_served import PAIR, Served, served, until

from hbserve.server import front_ends
from hbserve.server.front_end import FrontEnd
from hbserve.server.front_ends import FrontEnds
from hbserve_rpc import AddressInUse
from hbserve_scheduler import ConfigError, CpuScheduler, InstanceFailed, SchedulerConfig, SchedulerServer, convert
from hbserve_scheduler.config import ServerSection

BODY = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
NO_HEARTBEATS = {"port": 0, "heartbeat_timeout_s": 600}
"""Whoever notices that a process has ended notices it in another way."""


def processes(server: Served) -> set[int]:
    """Pids of the processes that serve HTTP."""
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
    sections = {"model": {"path": str(small_model("qwen3"))}, "scheduler": NO_HEARTBEATS}
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
        server.found(r"(SIGKILL.*it is started again in 0\.5 s)")
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
            until(lambda count=count: _count(server, "ending: SIGINT") >= min(count, 2))
        server.process.wait(timeout=60)
        for stream in streams:
            stream.wait()
        assert not any(Path(f"/proc/{pid}").exists() for pid in group)
        assert "Traceback" not in server.log.read_text()


def _count(server: Served, text: str) -> int:
    return server.log.read_text().count(text)


def test_more_than_one_cannot_share_a_unix_socket():
    with pytest.raises(ConfigError, match=r"^server\.api_servers=2: expected 1 with server\.uds"):
        convert({"server": {"uds": "/socket", "api_servers": 2}, "gpu_instances": PAIR})


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


class FakeProcess:
    """A process that ends whenever a test says so, and starts if it may."""

    started: ClassVar[list["FakeProcess"]] = []
    may_start = True

    def __init__(self, name: str, *given: Any, **_: Any) -> None:
        self.name = name
        self.settings = msgspec.json.decode(given[1], type=front_ends.FrontEndSettings)
        self.die = lambda: given[3](name, "it was killed")
        self.address = "127.0.0.1:1"

    async def start(self) -> None:
        self.started.append(self)
        if not self.may_start:
            raise InstanceFailed(f"{self.name} did not start: mishap")

    async def stop(self) -> None:
        pass


async def test_one_that_ends_again_and_again_is_started_ever_later_and_at_last_no_more(monkeypatch, caplog):
    monkeypatch.setattr(front_ends, "ChildProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "started", [])
    monkeypatch.setattr(front_ends, "FIRST_PAUSE_S", 0.0001)
    monkeypatch.setattr(front_ends, "LONGEST_PAUSE_S", 0.01)
    deaths: list[str] = []
    found = FrontEnds(ServerSection(port=0, api_servers=2), "INFO", lambda name, why: deaths.append(f"{name}: {why}"))
    server = SchedulerServer(CpuScheduler(SchedulerConfig(port=0, max_queue_size=9)))
    await server.start()
    await server.scheduler.add_instance("h0", "hybrid", "127.0.0.1:2")
    monkeypatch.setattr(server.scheduler, "wait_ready", lambda _: asyncio.sleep(0))
    await found.begin("small", Path("/models/small"), server)
    first, second = FakeProcess.started
    assert first.settings.instances == [("h0", "hybrid", "127.0.0.1:2")]
    assert (first.settings.scheduler.max_queue_size, first.settings.parent) == (5, server.address)
    FakeProcess.may_start = False
    try:
        first.die()
        await _until(lambda: "not started again" in caplog.text)
        names = [each.name for each in FakeProcess.started[2:]]
        assert names == [first.name] * front_ends.MOST_FAILURES
        assert not deaths, "the other one serves"
        second.die()
        await _until(lambda: bool(deaths))
        assert deaths == [f"{second.name}: {second.name} did not start: mishap"]
    finally:
        FakeProcess.may_start = True
        await found.stop()
        await server.stop()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
