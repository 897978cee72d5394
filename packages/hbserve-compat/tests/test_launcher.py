"""What a launcher tells each instance: its share of the host, and its own addresses."""

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from hbserve import host_cores
from hbserve.launcher import InstanceProcess, instance_environment, instance_settings
from hbserve_scheduler import convert


def settings(instances: list[dict[str, Any]], **sections: Any) -> list[dict[str, Any]]:
    """Of each instance; `instances` need only what differs from one prefill and then decode instances."""
    entries = [
        {"instance_id": f"i{rank}", "instance_type": "decode" if rank else "prefill", "kv_rank": rank} | each
        for rank, each in enumerate(instances)
    ]
    config = convert({"gpu_instances": entries, **sections})
    return [instance_settings(config, each, Path("/model"), log_level="INFO") for each in config.gpu_instances]


def give_cores(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    """And no other limit than this machine's number of cores."""
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
    """Else it blocks when the pipe is full, in the middle of a request."""
    process = InstanceProcess(settings([{}, {}])[0], lambda *_: None)
    child = "import sys; sys.stderr.write(('x' * 99 + chr(10)) * 2000 + 'last' + chr(10))"
    process._process = await asyncio.create_subprocess_exec(sys.executable, "-c", child, stderr=asyncio.subprocess.PIPE)
    monkeypatch.setattr(sys, "stderr", stderr)
    async with asyncio.timeout(30):
        await process._pass_stderr_on()
        assert await process._process.wait() == 0
    assert process._last_lines[-1] == "last"
