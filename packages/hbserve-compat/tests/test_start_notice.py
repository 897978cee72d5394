"""Notices of a start while it waits, and the logs of processes that it has started."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hbserve.pd_disagg.disaggregated_llm import level_of_application
from hbserve.processes import start_notice
from hbserve.processes.child_process import ChildProcess
from hbserve.processes.start_notice import missing, telling
from hbserve_scheduler import CpuScheduler, SchedulerConfig


async def test_a_start_says_what_it_waits_for_when_that_changes_and_now_and_then(monkeypatch):
    monkeypatch.setattr(start_notice, "FIRST_S", 0.01)
    monkeypatch.setattr(start_notice, "LOOK_S", 0.001)
    said: asyncio.Queue[str] = asyncio.Queue()
    wanted, num_looks = ["p0: its process starts", "d0: its process starts"], 0

    def look() -> list[str]:
        nonlocal num_looks
        num_looks += 1
        return wanted

    async with asyncio.timeout(30), telling(look, said.put_nowait):
        assert await said.get() == "waiting for p0: its process starts; d0: its process starts"
        wanted.pop()
        assert await said.get() == "waiting for p0: its process starts"
        monkeypatch.setattr(start_notice, "AGAIN_S", 0.0)
        assert await said.get() == "waiting for p0: its process starts"
        wanted.pop()
        num_looks = 0
        while num_looks < 3:
            await asyncio.sleep(0.001)
        while not said.empty():
            assert await said.get() == "waiting for p0: its process starts"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_start_that_is_quick_says_nothing():
    said: list[str] = []
    async with telling(lambda: ["p0"], said.append):
        await asyncio.sleep(0)
    assert said == []


async def test_what_is_missing_is_processes_first_and_then_models():
    processes: list[Any] = [
        SimpleNamespace(name=name, address=address, waits_for="its process starts")
        for name, address in (("p0", ""), ("d0", "127.0.0.1:1"))
    ]
    scheduler = CpuScheduler(SchedulerConfig())
    assert missing(processes, scheduler) == ["p0: its process starts"]
    processes[0].address = "127.0.0.1:9"
    assert missing(processes, scheduler) == []
    await scheduler.add_instance("p0", "prefill", "127.0.0.1:9")
    (found,) = missing(processes, scheduler)
    assert found.startswith("p0 (prefill) at 127.0.0.1:9: ")


def test_lines_of_a_childs_log_are_logged_here_once_and_what_is_none_is_passed_on(caplog, capsys):
    caplog.set_level(logging.INFO)
    child = ChildProcess("p0", "module", lambda: b"", {}, lambda *_: None)
    child._tell("2026-11-26 14:40:32,884 INFO hbserve_kv.sending.peers: link to 127.0.0.1:46313: nccl, Gloo")
    child._tell("2026-11-26 14:40:32,885 DEBUG hbserve_kv.sending.peers: not wanted here")
    child._tell("2026-11-26 14:40:32,886 WARNING hbserve_core: p0: 100 % of it %s")
    child._tell("E1126 20:37:25.995488 20256 transfer_metadata.cpp:1098] Local segment descriptor not found")
    child._tell("E1126 20:37:25.996470 20256 tcp_transport.cpp:77] cannot listen")
    child._tell("Traceback (most recent call last):")
    found = [(each.name, each.levelname, each.getMessage()) for each in caplog.records]
    assert found == [
        ("hbserve_kv.sending.peers", "INFO", "[p0] link to 127.0.0.1:46313: nccl, Gloo"),
        ("hbserve_core", "WARNING", "[p0] 100 % of it %s"),
    ]
    assert capsys.readouterr().err.splitlines() == [
        "[p0] E1126 20:37:25.996470 20256 tcp_transport.cpp:77] cannot listen",
        "[p0] Traceback (most recent call last):",
    ]


@pytest.mark.parametrize(
    ("level", "name"), [(10, "DEBUG"), (15, "DEBUG"), (30, "WARNING"), (5, "DEBUG"), (99, "CRITICAL")]
)
def test_instances_get_the_level_of_the_application(level, name):
    logger = logging.getLogger("hbserve")
    before = logger.level
    logger.setLevel(level)
    try:
        assert level_of_application() == name
    finally:
        logger.setLevel(before)
