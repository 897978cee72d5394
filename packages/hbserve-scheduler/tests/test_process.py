"""`python -m hbserve_scheduler` as a process."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hbserve_rpc import RpcServer
from hbserve_scheduler import RemoteScheduler
from hbserve_scheduler.__main__ import _told_to_clients

DEADLINE_S = 40


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    def write(port: int, instances: Any, extra: str = "") -> Path:
        lines = [
            f"  - {{instance_id: {each.instance_id}, instance_type: {each.role}, kv_rank: {rank}, "
            f"port: {each.address.rpartition(':')[2]}}}"
            for rank, each in enumerate(instances)
        ]
        path = tmp_path / "deployment.yaml"
        path.write_text(f"scheduler: {{port: {port}}}\n{extra}gpu_instances:\n" + "\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def free_port(free_ports: Callable[[int], list[int]]) -> int:
    return free_ports(1)[0]


async def run(*arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a process that ends by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hbserve_scheduler", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert out == b""
    return process.returncode or 0, err.decode()


def test_a_scheduler_node_imports_no_torch_and_no_engine() -> None:
    code = (
        "import sys, hbserve_scheduler.__main__\n"
        "print([name for name in ('torch', 'transformers', 'hbserve_kv', 'hbserve_core', 'hbserve', 'numpy') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_order_after_it_has_served(pair, write_config, free_port, ask, collect, number):
    path = write_config(free_port, pair)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "hbserve_scheduler", "--config", str(path))
    remote = RemoteScheduler(f"127.0.0.1:{free_port}")
    await remote.start()
    try:
        await remote.find(DEADLINE_S)
        tokens, _ = await collect(remote.submit(ask()))
        assert tokens == [100, 101, 102, 103]
        os.kill(process.pid, number)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
    finally:
        await remote.stop()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_under_nohup_it_outlives_its_terminal_and_sigterm_ends_it(pair, write_config, free_port):
    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    path = write_config(free_port, pair)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hbserve_scheduler", "--config", str(path), preexec_fn=ignore
    )
    remote = RemoteScheduler(f"127.0.0.1:{free_port}")
    await remote.start()
    try:
        await remote.find(DEADLINE_S)
        for number in (signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        await remote.find(DEADLINE_S)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
    finally:
        await remote.stop()
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_clients_are_told_a_model_path_that_means_the_same_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/m").mkdir(parents=True)
    assert _told_to_clients("models/m") == str(tmp_path / "models/m")
    assert [_told_to_clients(each) for each in ["~/m", "/m", None]] == ["~/m", "/m", ""]
    # no folder of this host: an id of Hugging Face's hub, which each client looks for in its own cache
    assert _told_to_clients("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ("modle: {}\n", "modle: unknown key; did you mean 'model'?"),
        ("model: {}\nmodel: {}\n", "line 3: 'model' is written twice"),
    ],
)
async def test_a_wrong_configuration_is_one_line_and_status_2(pair, write_config, free_port, extra, text):
    path = write_config(free_port, pair, extra)
    status, err = await run("--config", str(path))
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith(str(path))
    assert text in err


async def test_an_instance_without_a_port_is_refused_with_status_2(tmp_path):
    path = tmp_path / "deployment.yaml"
    path.write_text("gpu_instances: [{instance_id: h0, instance_type: hybrid}]\n")
    status, err = await run("--config", str(path))
    assert (status, err.count("\n")) == (2, 1), err
    assert "gpu_instances[0].port=0: expected 1 to 65535" in err


async def test_a_missing_configuration_is_one_line_and_status_2(tmp_path):
    status, err = await run("--config", str(tmp_path / "absent.yaml"))
    assert (status, err) == (2, f"{tmp_path}/absent.yaml: No such file or directory\n")


async def test_a_port_in_use_is_one_line_and_status_1(pair, write_config):
    taken = RpcServer()
    await taken.start()
    try:
        status, err = await run("--config", str(write_config(taken.port, pair)))
    finally:
        await taken.stop()
    assert (status, err.count("\n")) == (1, 1), err
    assert f"{taken.address} is in use" in err


async def test_an_unknown_log_level_is_a_usage_error(pair, write_config, free_port):
    status, err = await run("--config", str(write_config(free_port, pair)), "--log-level", "loud")
    assert status == 2
    assert "Traceback" not in err
    assert "--log-level" in err
