"""The settings that a launcher gives each instance, such as its share of the host, and the processes that it starts."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hbserve.processes import child_process, host_cores
from hbserve.processes.launcher import (
    InstanceProcess,
    LocalInstances,
    instance_environment,
    instance_settings,
    launch_keys,
)
from hbserve_scheduler import InstanceFailed, convert
from hbserve_testing.waits import until


def settings(instances: list[dict[str, Any]], **sections: Any) -> list[dict[str, Any]]:
    """Return the settings of each instance. `instances` need only what differs from one prefill instance followed by
    decode instances."""
    entries = [
        {"instance_id": f"i{rank}", "instance_type": "decode" if rank else "prefill", "kv_rank": rank} | each
        for rank, each in enumerate(instances)
    ]
    config = convert({"gpu_instances": entries, **sections})
    return [instance_settings(config, each, Path("/model"), log_level="INFO") for each in config.gpu_instances]


def give_cores(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    """Give this machine so many cores, and no other limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
    monkeypatch.setattr(host_cores, "CGROUP", Path("/nowhere"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (7, 3), (64, 32)])
def test_instances_of_one_host_share_its_cores_and_others_do_not_count(monkeypatch, num_cores, num_threads):
    give_cores(monkeypatch, num_cores)
    here, also_here, elsewhere = settings([{}, {}, {"host": "10.0.0.2"}])
    assert here["num_threads"] == also_here["num_threads"] == num_threads
    assert elsewhere["num_threads"] == num_cores


def test_every_name_of_this_machine_is_one_machine_whose_devices_are_shared_out(monkeypatch):
    give_cores(monkeypatch, 8)
    hosts = ["127.0.0.1", "localhost", socket.gethostname(), "10.0.0.2", "nobody.invalid"]
    found = settings([{"host": host} for host in hosts])
    assert [each["num_local_instances"] for each in found] == [3, 3, 3, 1, 1]
    assert [each["num_threads"] for each in found] == [2, 2, 2, 8, 8]


def test_a_number_of_threads_that_is_configured_is_taken_as_it_is():
    assert [each["num_threads"] for each in settings([{}, {}], engine={"num_threads": 5})] == [5, 5]


def test_each_instance_has_a_kv_port_of_its_own_on_its_own_host_unless_kv_ip_says_otherwise():
    # Known elsewhere: vLLM #27083, dynamo #2706.
    instances = [{"host": "10.0.0.1"}, {"host": "10.0.0.2"}]
    own = [each["kv_transfer"] for each in settings(instances, kv_transfer={"port": 7000})]
    assert [(each["host"], each["port"]) for each in own] == [("10.0.0.1", 7000), ("10.0.0.2", 7001)]
    given = [each["kv_transfer"] for each in settings(instances, kv_transfer={"ip": "10.1.0.1"})]
    assert [(each["host"], each["port"]) for each in given] == [("10.1.0.1", 0), ("10.1.0.1", 0)]


def control_group(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".", 1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content + "\n")
    return folder


LIMITED = [
    ({"cpu_max": "250000 100000"}, "", 2),
    ({"cpu_max": "50000 100000"}, "", 1),
    ({"cpu_max": "max 100000"}, "", 64),
    ({"cpu__cpu_cfs_quota_us": "400000", "cpu__cpu_cfs_period_us": "100000"}, "", 4),
    ({"cpu__cpu_cfs_quota_us": "-1", "cpu__cpu_cfs_period_us": "100000"}, "", 64),
    ({}, "3", 3),
    ({}, " 6,2", 6),
    ({}, "0", 64),
    ({}, "many", 64),
    ({"cpu_max": "800000 100000"}, "100", 8),
    ({}, "", 64),
]


@pytest.mark.parametrize(("files", "variable", "expected"), LIMITED)
def test_no_more_threads_than_the_host_the_container_or_the_user_gives(
    files, variable, expected, tmp_path, monkeypatch
):
    # Known elsewhere: ollama #17916, vLLM #34462.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(host_cores, "CGROUP", control_group(tmp_path, **files))
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert host_cores.num_cores() == expected


def test_an_instance_has_the_callers_environment_its_own_threads_and_no_warnings_that_nobody_asked_for(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("OF_THE_CALLER", "kept")
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    environment = instance_environment(3)
    assert (environment["OMP_NUM_THREADS"], environment["OF_THE_CALLER"]) == ("3", "kept")
    assert environment["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert instance_environment(3)["TORCH_CPP_LOG_LEVEL"] == "INFO"


class Closed:
    def write(self, text: str) -> None:
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stderr", [None, Closed()])
async def test_what_an_instance_logs_is_read_although_there_is_no_stderr_to_show_it_on(stderr, monkeypatch):
    """If it was not read, the instance would block on a full pipe, in the middle of a request."""
    process = InstanceProcess(settings([{}, {}])[0], lambda *_: None)
    child = "import sys; sys.stderr.write(('x' * 99 + chr(10)) * 2000 + 'last' + chr(10))"
    process._process = await asyncio.create_subprocess_exec(sys.executable, "-c", child, stderr=asyncio.subprocess.PIPE)
    monkeypatch.setattr(child_process.sys, "stderr", stderr)
    async with asyncio.timeout(30):
        await process._pass_stderr_on()
        assert await process._process.wait() == 0
    assert process._last_lines[-1] == "last"


async def test_lines_of_a_log_go_through_this_process_others_to_stderr_and_the_reason_of_an_end_to_whoever_hears_of_it(
    caplog, capsys
):
    caplog.set_level("DEBUG")
    process = InstanceProcess(settings([{}, {}])[0], lambda *_: None)
    lines = ["2026-01-01 00:00:00,000 WARNING a.module: i0: careful", "Traceback", "i0: why it ends"]
    mooncake = "WARNING: Logging before InitGoogleLogging() is written to STDERR"
    child = f"import sys; sys.stderr.write(chr(10).join({[*lines[:2], mooncake, lines[2]]}))"
    process._process = await asyncio.create_subprocess_exec(sys.executable, "-c", child, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(30):
        await process._pass_stderr_on()
        assert await process._process.wait() == 0
    logged = [(each.name, each.levelname, each.getMessage()) for each in caplog.records if "[i0]" in each.getMessage()]
    assert logged == [
        ("a.module", "WARNING", "[i0] careful"),
        (child_process.__name__, "DEBUG", f"[i0] {mooncake}"),
    ]
    assert capsys.readouterr().err == "[i0] Traceback\n"
    assert process._why(1) == "exit status 1: i0: why it ends"


# ---- deaths ------------------------------------------------------------------------------------------------------

CHILD = """
import json, signal, sys
settings = json.loads(sys.stdin.readline())
if settings["log_level"] == "DEBUG":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if settings["log_level"] == "CRITICAL" and settings["port"]:
    sys.exit("it cannot be started again")
print(json.dumps({"address": f"127.0.0.1:{settings['port'] or 4711}"}), flush=True)
sys.stdin.read()
"""
"""Program that replaces an instance, and serves nothing."""


class Local:
    """One instance that a test starts, with the deaths that are reported of it."""

    def __init__(self, log_level: str = "INFO") -> None:
        entry = {"instance_id": "d0", "instance_type": "hybrid"}
        self.deaths: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.given_up: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.instances = LocalInstances(
            convert({"gpu_instances": [entry]}), Path("/model"), log_level=log_level,
            on_death=lambda *what: self.deaths.put_nowait(what),
        )  # fmt: skip
        (self.process,) = self.instances.processes

    def restart_the_dead(self) -> None:
        self.instances.restart_the_dead(lambda *what: self.given_up.put_nowait(what))

    def kill(self, number: int = signal.SIGKILL) -> int:
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, number)
        return pid


@pytest.fixture
async def local(monkeypatch):
    execute = asyncio.create_subprocess_exec

    async def start_child(*_: str, **options: Any) -> asyncio.subprocess.Process:
        return await execute(sys.executable, "-c", CHILD, **options)

    monkeypatch.setattr(child_process.asyncio, "create_subprocess_exec", start_child)
    monkeypatch.setattr(child_process, "FIRST_RESTART_S", 0.001)
    made: list[Local] = []

    async def start(**settings: Any) -> Local:
        made.append(Local(**settings))
        await made[-1].instances.start()
        return made[-1]

    async with asyncio.timeout(60):
        yield start
        for each in made:
            await each.instances.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_instance_that_dies_is_started_again_at_its_address_and_that_is_said(local, caplog):
    here = await local()
    here.restart_the_dead()
    address, before = here.process.address, here.kill()
    assert await here.deaths.get() == (
        "d0", "its process has ended (signal SIGKILL, from somebody or from the system when memory ran out)"
    )  # fmt: skip
    await until(lambda: "d0 was started again" in caplog.text)
    assert here.process.pid != before
    assert here.process.address == address == "127.0.0.1:4711"
    assert (
        "signal SIGKILL, from somebody or from the system when memory ran out); restart 1 of at most 5" in caplog.text
    )
    here.kill()
    await here.deaths.get()
    await until(lambda: caplog.text.count("d0 was started again") == 2)
    assert here.given_up.empty()


async def test_an_instance_that_cannot_be_started_again_is_given_up_with_its_own_words(local):
    here = await local(log_level="CRITICAL")
    here.restart_the_dead()
    here.kill()
    await here.deaths.get()
    name, why = await here.given_up.get()
    assert name == "d0"
    assert why == (
        "d0 did not start: exit status 1: it cannot be started again; it was started 5 times again, and is given up"
    )
    assert here.deaths.empty(), "one death, of which there is no more to say"


async def test_where_the_system_makes_no_process_a_restart_is_tried_again_and_given_up_with_the_reason(local):
    here = await local()
    here.restart_the_dead()
    too_long = {"TOO_LONG": "x" * (1 << 20)}  # refused as if there were no memory, or too many processes
    here.process._environment = here.process._environment | too_long
    here.kill()
    await here.deaths.get()
    name, why = await here.given_up.get()
    assert name == "d0"
    assert why.startswith("d0 did not start: [Errno 7] Argument list too long")
    assert why.endswith("it was started 5 times again, and is given up")


async def test_a_death_by_a_signal_that_python_has_no_name_for_is_told(local):
    here = await local()
    here.kill(signal.SIGRTMIN + 3)  # by which systemd ends containers
    assert await here.deaths.get() == ("d0", "its process has ended (signal SIGRTMIN+3)")


@pytest.mark.parametrize("line", ["4711", "no JSON", "{}"])
async def test_one_that_says_something_else_than_its_address_is_ended(local, line, monkeypatch):
    child = f"import sys; print({line!r}, flush=True); sys.stdin.readline(); sys.stdin.read()"
    monkeypatch.setattr(sys.modules[__name__], "CHILD", child)
    with pytest.raises(InstanceFailed, match=rf"d0 began with b'{line}\\n' instead of its address"):
        await local()


async def test_a_death_before_all_were_ready_is_told_and_no_more(local):
    here = await local()
    here.kill()
    await here.deaths.get()
    assert not here.instances._restarting


async def test_one_that_is_drained_ends_by_itself_and_that_is_no_death(local):
    here = await local()
    here.restart_the_dead()
    await here.instances.drain()
    assert here.process._process.returncode == -signal.SIGTERM
    await asyncio.gather(*here.process._tasks)
    assert here.deaths.empty()


async def test_one_that_does_not_hear_sigterm_ends_with_its_stdin(local, caplog):
    here = await local(log_level="DEBUG")
    await here.instances.stop()
    assert "killed" not in caplog.text


class Dying:
    """A process that dies by itself when it is told to end."""

    name, address, waits_for, pid = "d0", "", "", None

    def __init__(self, died: Callable[[str, str], None]) -> None:
        self.restarts = child_process.Restarts()
        self._died = died

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        self._died(self.name, "by itself")

    drain = stop

    def kill(self) -> None:
        pass


@pytest.mark.parametrize("how", ["stop", "drain"])
async def test_one_that_dies_while_all_are_told_to_end_is_not_started_again(how):
    deaths: list[str] = []
    processes = child_process.ChildProcesses([Dying], lambda name, _: deaths.append(name))
    await processes.start()
    processes.restart_the_dead(lambda *_: None)
    await getattr(processes, how)()
    assert deaths == ["d0"]
    assert not processes._restarting


async def test_an_end_in_the_pause_before_a_restart_starts_nothing(local, monkeypatch):
    monkeypatch.setattr(child_process, "FIRST_RESTART_S", 3600.0)
    here = await local()
    here.restart_the_dead()
    here.kill()
    await here.deaths.get()
    assert len(here.instances._restarting) == 1
    await here.instances.stop()
    assert not here.instances._restarting
    assert here.given_up.empty()


def test_restarts_are_ever_rarer_and_bounded_until_a_life_was_long(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(child_process.time, "monotonic", lambda: now_s)
    restarts = child_process.Restarts()
    for _ in range(2):
        pauses_s = []
        while (pause_s := restarts.pause_s()) is not None:
            pauses_s.append(pause_s)
            now_s += 10
            restarts.began()
        assert pauses_s == [0.5, 1.0, 2.0, 4.0, 8.0]
        now_s += child_process.STEADY_S


def test_no_keys_are_made_up_where_instances_are_found_that_others_have_started():
    pair = [
        {"instance_id": "p", "instance_type": "prefill"},
        {"instance_id": "d", "instance_type": "decode", "kv_rank": 1},
    ]
    found = [{"instance_type": role, "discover": f"dns:{role}.example:5600"} for role in ("prefill", "decode")]
    assert launch_keys(convert({"gpu_instances": pair})).keys() == {"scheduler", "instance", "client"}
    assert launch_keys(convert({"gpu_instances": found})) == {}
