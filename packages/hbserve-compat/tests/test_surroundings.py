"""Commands and scripts with the folders, terminals, locales and signals that users have."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hbserve import LLM, SamplingParams
from hbserve.models.demo_model import find_model_folder
from hbserve.progress import progress_bar
from hbserve_testing.processes import alive, children_of, freeze

DEADLINE_S = 90
SHADOWS = ["torch", "random", "types", "json", "logging", "transformers", "hbserve", "zmq/__init__", "hbserve_core/a"]
OF_OTHERS = {
    "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii", "TMPDIR": "/nowhere",
    "TZ": "No/Where", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1",
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3",
    "GLOO_SOCKET_IFNAME": "none0", "SLURM_PROCID": "2", "CUDA_VISIBLE_DEVICES": "",
    "http_proxy": "http://192.0.2.1:1", "https_proxy": "http://192.0.2.1:1", "ALL_PROXY": "socks5://192.0.2.1:1",
}  # fmt: skip


def command(*arguments: Any) -> list[str]:
    """The installed script, which, unlike `python -m`, does not put the current folder before all libraries."""
    return [str(Path(sys.executable).parent / "hbserve"), *map(str, arguments)]


@pytest.fixture
def config(config: Callable[..., Path]) -> Path:
    return config()


@pytest.fixture(scope="module")
def answer(small_model: Callable[[str], Path]) -> Callable[[int], str]:
    def text(num_tokens: int) -> str:
        with LLM(small_model("qwen3"), num_kvcache_blocks=64) as llm:
            (each,) = llm.generate("Hello", SamplingParams(0, num_tokens), use_tqdm=False)
            decoded: str = llm.tokenizer.decode(each["token_ids"], skip_special_tokens=True)
        return decoded

    return text


def test_neither_files_of_the_users_folder_nor_his_environment_change_the_answer(config, answer, tmp_path):
    # Known elsewhere: vLLM #1367, #1719, simonw/llm #576.
    folder = tmp_path / "a folder\nof José's"
    for name in SHADOWS:
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"raise SystemExit('{name} of the current folder was imported')")
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | OF_OTHERS
    script = 'while read line; do "$@" </dev/stdin; echo "and $line"; done'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command("generate", "Hello", "--config", config, "--max-tokens", 12)],
        cwd=folder, env=environment, input=b"one\n", capture_output=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert b"current folder" not in done.stderr, done.stderr.decode()
    assert done.stdout == answer(12).encode("ascii", "backslashreplace") + b"\nand one\n", done.stderr.decode()


# Also where these tests run under `nohup`.
HEEDS_SIGHUP = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
BLOCKS_SIGTERM_AND_IGNORES_SIGCHLD = (
    "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
)


def start(config: Path, inherits: str = "", *, num_tokens: int = 100000) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a command, and wait until it is in the middle of an answer that lasts a second. Returns it and the pids of
    its instances. `inherits` is code that its process runs first, as if it had been inherited from the parent."""
    program = ["-c", f"import runpy, signal; {inherits}; runpy.run_module('hbserve', None, '__main__')"]
    client = subprocess.Popen(
        [sys.executable, "-P", *(program if inherits else ["-m", "hbserve"]), "generate", "Hello", "--config", config,
         f"--max-tokens={num_tokens}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert client.stdout is not None
    assert os.read(client.stdout.fileno(), 1)
    instances = children_of(client.pid)
    assert len(instances) == 2
    return client, instances


def wait_for_the_end_of(pids: list[int]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while any(map(alive, pids)):
        assert time.monotonic() < deadline_s, pids
        time.sleep(0.05)


ENDS = {
    "Ctrl-C for all, thrice": ("", [signal.SIGINT] * 3, 130),
    "the terminal closes": (HEEDS_SIGHUP, [signal.SIGHUP], 129),
    "SIGTERM, which was blocked": (BLOCKS_SIGTERM_AND_IGNORES_SIGCHLD, [signal.SIGTERM], 143),
}


@pytest.mark.warm
@pytest.mark.parametrize("name", ENDS)
def test_a_signal_ends_everything_in_order_and_without_a_word(config, name):
    # Known elsewhere: vLLM #7554.
    inherits, numbers, status = ENDS[name]
    client, instances = start(config, inherits)
    for number in numbers:
        for pid in [client.pid, *instances] if len(numbers) > 1 else [client.pid]:
            if alive(pid):
                os.kill(pid, number)
        time.sleep(0.03)
    _, errors = client.communicate(timeout=DEADLINE_S)
    assert (client.returncode, errors.decode()) == (status, ""), "an instance that had to be killed is logged"
    wait_for_the_end_of(instances)


@pytest.mark.warm
def test_a_command_that_is_stopped_for_longer_than_heartbeats_may_be_silent_goes_on_where_it_was(config, answer):
    content = yaml.safe_load(config.read_text())
    content["scheduler"] |= {"heartbeat_interval_s": 0.3, "heartbeat_timeout_s": 3}
    config.write_text(yaml.safe_dump(content))
    client, _ = start(config, num_tokens=400)
    freeze(client.pid)
    time.sleep(5)
    client.send_signal(signal.SIGCONT)
    out, errors = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 0, errors.decode()
    assert out == answer(400).encode()[1:] + b"\n"


FORKED = """
import json, os, signal, subprocess, sys
from hbserve import LLM, SamplingParams
model, report = sys.argv[1:]
llm = LLM(model, tensor_parallel_size=2, num_kvcache_blocks=64)
(answer,) = llm.generate("Hello", SamplingParams(0, 3), use_tqdm=True)
children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(os.getpid())]).split()
settings = {"model_path": model, "device": "cpu", "num_blocks": 50}
instance = subprocess.Popen([sys.executable, "-m", "hbserve_core"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
instance.stdin.write(json.dumps(settings).encode() + b"\\n")
instance.stdin.flush()
instance.stdout.readline()
if (holder := os.fork()) == 0:
    signal.pause()
ranks = [pid for pid in map(int, children) if os.path.exists(f"/proc/{pid}")]
with open(report, "w") as file:
    json.dump([answer["token_ids"], holder, [instance.pid, *ranks]], file)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_without_stderr_ranks_start_and_they_end_with_their_parent_though_a_fork_of_it_lives_on(small_model, tmp_path):
    # Known elsewhere: vLLM #55510, #34643, #43060.
    report = tmp_path / "report"
    arguments = [sys.executable, "-c", FORKED, str(small_model("qwen3")), str(report)]
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *arguments], timeout=DEADLINE_S)
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    token_ids, holder, pids = json.loads(report.read_text())
    try:
        assert len(token_ids) == 3
        assert len(pids) == 2, "an instance and a rank"
        wait_for_the_end_of(pids)
        assert alive(holder)
    finally:
        os.kill(holder, signal.SIGKILL)


def test_without_stdout_there_is_no_place_for_an_answer_and_that_is_said_at_once():
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command("generate", "Hello")], stderr=subprocess.PIPE, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (1, b"error: stdout is closed: the answers have nowhere to go\n")


def test_a_server_whose_stderr_nobody_reads_starts_all_the_same():
    """It ends only because its port is taken. Once, its first notice ended it, without a message."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as unread, socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        done = subprocess.run(command("serve", "--port", port), stderr=unread, timeout=DEADLINE_S)
    assert done.returncode == 1


def test_a_current_folder_that_was_deleted_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, str(tmp_path / "gone"), *command("generate", "Hello")],
        stderr=subprocess.PIPE, timeout=DEADLINE_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1, b"error: the current folder was deleted: change to one that exists\n",
    )  # fmt: skip


LIBRARY = """
import json, logging, os, resource, signal, sys
def state():
    root = logging.getLogger()
    return [
        len(root.handlers), root.level, logging.getLogger("of.the.caller").disabled, logging.root.manager.disable,
        [str(signal.getsignal(number)) for number in range(1, 32)], resource.getrlimit(resource.RLIMIT_NOFILE),
        sys.path, dict(os.environ), os.getcwd(), os.umask(os.umask(0o022)),
    ]
logging.getLogger("of.the.caller").setLevel("INFO")
before = json.dumps(state())
from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM
import hbserve_core, hbserve_kv, hbserve_scheduler
with LLM(sys.argv[1], num_kvcache_blocks=64) as llm:
    llm.generate("Hello", SamplingParams(0, 3), use_tqdm=False)
after = json.dumps(state())
assert before == after, (before, after)
"""


def test_as_a_library_it_changes_neither_logging_nor_signals_limits_or_paths_of_the_caller(small_model):
    # Known elsewhere: vLLM #5803.
    arguments = [sys.executable, "-c", LIBRARY, str(small_model("qwen3"))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_where_there_is_no_stderr_there_is_no_progress_bar_and_nothing_fails(monkeypatch):
    # Known elsewhere: tqdm #1593, #1654.
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(3) as bar:
        bar.update(2)
        bar.set_postfix({"Decode": "3tok/s"})


def test_a_relative_model_path_is_that_of_the_folder_in_which_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = asyncio.run(find_model_folder("model"))
    monkeypatch.chdir("/")
    assert folder == tmp_path / "model"
