"""`python -m hbserve_core`: its line to the launcher, its ends, its exit status and the one line that explains it."""

import asyncio
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hbserve_core.instance.process import main
from hbserve_rpc import RpcClient
from hbserve_rpc.messages import DESCRIBE, Empty
from hbserve_testing.narrowing import present

DEADLINE_S = 60


class Process:
    def __init__(self, first_line: bytes) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "hbserve_core"]
        self.popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        assert self.popen.stdin is not None
        self.popen.stdin.write(first_line + b"\n")
        self.popen.stdin.flush()

    def address(self) -> str:
        line = json.loads(present(self.popen.stdout).readline())
        assert line["pid"] == self.popen.pid
        return line["address"]

    def end(self) -> tuple[int, list[str]]:
        """Exit status, and the lines on stderr that are not log lines."""
        _, errors = self.popen.communicate(timeout=DEADLINE_S)
        return self.popen.returncode, [line for line in errors.decode().splitlines() if line[:2] != "20"]


@pytest.fixture
def launch(model_folder: Callable[[str], Any]) -> Iterator[Callable[..., Process]]:
    launched = []

    def launch(**settings: Any) -> Process:
        defaults = {"model_path": str(model_folder("qwen3")), "device": "cpu", "num_blocks": 50, "num_threads": 1}
        launched.append(Process(json.dumps(defaults | settings).encode()))
        return launched[-1]

    yield launch
    for process in launched:
        process.popen.kill()
        with contextlib.suppress(ValueError):  # its pipes are closed already
            process.popen.communicate(timeout=DEADLINE_S)


async def status_of(address: str, wanted: str) -> str:
    async with RpcClient(address) as client, asyncio.timeout(DEADLINE_S):
        while (info := await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)).status != wanted:
            pass
        return info.error


@pytest.mark.warm
async def test_it_ends_when_its_launcher_is_gone(launch):
    process = launch()
    await status_of(process.address(), "ready")
    assert process.end() == (0, []), "communicate() closes stdin first"


@pytest.mark.warm
@pytest.mark.parametrize("wait_for", ["ready", "starting"])
async def test_it_ends_when_told_to(launch, wait_for):
    process = launch()
    address = process.address()
    if wait_for == "ready":
        await status_of(address, "ready")
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(timeout=DEADLINE_S) == 0


INSTANCE_THAT_SHOWS_ITS_PROCESS = """
import asyncio, gc, os, signal, sys, threading
from tqdm import tqdm
from hbserve_core.instance import process

class Instance:
    def __init__(self, config, *, before_ready):
        self.config, self.address, self.before_ready = config, "", before_ready

    async def start(self): ...

    async def wait_failed(self):
        gc.unfreeze()  # what the process may have been forked with
        self.before_ready()
        assert gc.get_freeze_count()
        assert type(tqdm.get_lock()) is type(threading.RLock()), "the end leaves no semaphore"
        print(sys.getswitchinterval(), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    async def stop(self): ...

process.GpuInstance = Instance
process.main()
"""


@pytest.mark.warm
def test_neither_a_thread_of_an_instance_nor_the_garbage_collector_stops_it_for_as_long_as_a_step():
    done = subprocess.run(
        [sys.executable, "-c", INSTANCE_THAT_SHOWS_ITS_PROCESS],
        input=json.dumps({"model_path": ""}),
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert float(done.stdout.splitlines()[-1]) <= 0.0005, done.stderr


@pytest.mark.warm
def test_a_port_in_use_is_one_line(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, errors = launch(port=port).end()
    assert status == 1
    assert len(errors) == 1
    assert f"hybrid-0: 127.0.0.1:{port} is in use" in errors[0]


@pytest.mark.warm
def test_an_address_for_kv_that_this_machine_does_not_have_is_one_line(launch):
    """Before the model is loaded; 192.0.2.0/24 is nobody's, by RFC 5737."""
    status, errors = launch(role="decode", kv_transfer={"host": "192.0.2.1"}).end()
    assert status == 1
    assert len(errors) == 1
    assert "hybrid-0: kv_transfer.ip='192.0.2.1': this machine does not have it; use an address of" in errors[0]


BAD_CONFIGURATIONS = {
    b"": 'there is none; expected one line of JSON, such as {"instance_id": ',
    b"{}": "model_path: missing",
    b"[]": "all of it=[]: expected a mapping, got a list",
    b'{"model_path": 3}': "model_path=3: expected `str`, got `int`",
    b'{"model_path": "m", "role": "prefil"}': "role='prefil': expected one of prefill, decode, hybrid",
    b'{"model_path": "m", "chunk_sise": 3}': "chunk_sise: unknown key; did you mean 'chunk_size'? expected one of ",
    b'{"model_path": "m", "schedulers": [3]}': "schedulers[0]=3: expected `str`, got `int`",
    b'{"model_path": "m", "kv_transfer": {"bakend": "ipc"}}': "kv_transfer.bakend: unknown key; did you mean 'backend'",
    b'{"model_path": "m", "chunk_size": 0}': "chunk_size=0: expected at least 1",
    b'{"model_path": "m", "num_blocks": 0}': "num_blocks=0: expected at least 1",
    b'{"model_path": "m", "gpu_memory_utilization": 1.5}': "gpu_memory_utilization=1.5: expected 0.01 to 1",
    b'{"model_path": "m", "port": 65536}': "port=65536: expected 0 to 65535",
    b'{"model_path": "m", "kv_rank": -1}': "kv_rank=-1: expected at least 0",
    b'{"model_path": "m", "host": "0.0.0.0"}': "host='0.0.0.0': means every address of a machine, so peers cannot",
    b'{"model_path": "m", "host": "[::1]"}': "host='[::1]': expected it without brackets, '::1'",
    b'{"model_path": "m", "log_level": "LOUD"}': "log_level='LOUD': expected one of DEBUG",
    b'{"model_path": "m", "kv_transfer": {"options": {"a": ' + b"[" * 5000: "maximum recursion depth",
    b"\xff\xfe": "JSON is malformed",
}


@pytest.mark.parametrize("line", BAD_CONFIGURATIONS)
def test_a_configuration_that_cannot_be_is_one_line(line, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line + b"\n")))
    # Of a configuration that it takes, `main` ends the process: this one, as if all its tests had passed.
    monkeypatch.setattr("os._exit", lambda status: pytest.fail(f"it was taken; exit status {status}"))
    assert main() == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert BAD_CONFIGURATIONS[line] in error


def test_arguments_are_refused_and_not_ignored_while_it_waits_for_stdin(capsys):
    assert main(["--help"]) == 2
    assert "--help: python -m hbserve_core takes no arguments; expected on stdin: one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("closed", "status", "said"),
    [
        ("<&-", 2, "configuration on stdin: there is none; expected one line of JSON, such as"),
        (">&-", 1, "stdout is closed: the address has nowhere to go"),
    ],
)
def test_a_stream_that_is_closed_is_told_in_a_line(closed, status, said):
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-m", "hbserve_core"],
        input=b'{"model_path": "m"}\n', stderr=subprocess.PIPE, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == status
    (line,) = done.stderr.decode().splitlines()
    assert said in line


def test_a_process_with_such_a_configuration_ends_with_that_status_and_line():
    status, errors = Process(b'{"model_path": "m", "chunk_sise": 3}').end()
    assert status == 2
    assert len(errors) == 1
    assert "chunk_sise: unknown key; did you mean 'chunk_size'" in errors[0]


@pytest.mark.warm
async def test_a_model_that_is_not_there_is_told_to_those_who_ask_and_then_in_one_line(launch, tmp_path):
    process = launch(model_path=str(tmp_path / "nothing"))
    error = await status_of(process.address(), "failed")
    assert "ModelFilesMissing" in error
    status, errors = process.end()
    assert status == 1
    assert errors == [f"hybrid-0: {error}"]
