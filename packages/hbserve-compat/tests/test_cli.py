"""The command line as a user runs it, with real processes, of which nothing may be left."""

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

from hbserve.commands import generate
from hbserve.commands.generate import counted, why_ended
from hbserve.commands.running import HERE
from hbserve_rpc import PeerDied
from hbserve_rpc.messages import FinishReason
from hbserve_scheduler import SchedulerConfig
from hbserve_testing.processes import alive, children_of

pytestmark = pytest.mark.warm

DEADLINE_S = 90
CUT = "cut at the longest sequence that is served"


def hbserve(*arguments: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hbserve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, **settings)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_prompt_is_streamed_and_ends_with_one_summary(config):
    done = hbserve("generate", "Hello", "--config", config(), "--max-tokens", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    (summary,) = [line for line in done.stderr.splitlines() if "TTFT" in line]
    for part in ["TPOT", "hand-off", "12 tokens", "KV moved", "MiB", "transfer", "GB/s", "| cut at --max-tokens"]:
        assert part in summary


def test_an_answer_that_is_cut_at_the_longest_sequence_says_so(config):
    # Known elsewhere: vLLM #655, #1312.
    done = hbserve("generate", "x" * 500, "--config", config(), "--max-tokens", 400)
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().endswith(f"| {CUT}")


def test_the_ends_of_several_answers_are_counted():
    ends: list[tuple[FinishReason, int]] = [("stop", 3), ("length", 9), ("length", 7), ("stop", 9)]
    reasons = [why_ended(reason, num_tokens, 9) for reason, num_tokens in ends]
    assert counted(reasons) == f"2 stopped, 1 cut at --max-tokens, 1 {CUT}"
    assert counted(reasons[:1]) == "stopped"


def test_several_prompts_are_answered_in_order(config):
    done = hbserve("generate", "one", "two", "--config", config(), "--max-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("> ")] == ["> one", "> two"]
    assert "Generating: 100%" in done.stderr


def test_of_several_prompts_the_one_that_is_too_long_is_named(config):
    done = hbserve("generate", "one", "x" * 600, "--config", config())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: prompts[1]: prompt: 600 tokens; the instances take at most 511\n"


@pytest.mark.cold
def test_bytes_that_are_no_text_are_named_before_anything_starts(config):
    # Known elsewhere: simonw/llm #768.
    done = hbserve("generate", "fine", os.fsdecode(b"caf\xe9"), "--config", config())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: prompts[1]: prompt: character 3 is '\\udce9', half of a surrogate pair")
    assert len(done.stderr.splitlines()) == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a typo in a section": ({"modle": {"path": "x"}}, "modle: unknown key; did you mean 'model'?"),
    "a typo in a key": ({"engine": {"num_block": 3}}, "engine.num_block: unknown key; did you mean 'num_blocks'?"),
    "a wrong type": ({"chunked_prefill": {"chunk_size": "big"}}, "chunked_prefill.chunk_size='big': expected `int`"),
    "no decode instance": (
        {"gpu_instances": [{"instance_id": "p", "instance_type": "prefill"}]},
        "there is no decode instance",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_is_one_line_that_names_the_key_before_anything_starts(config, case):
    changes, message = WRONG[case]
    done = hbserve("generate", "Hello", "--config", config(**changes))
    (line,) = done.stderr.strip().splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert message in line


def test_a_model_folder_that_is_not_there_is_one_line(tmp_path):
    done = hbserve("generate", "Hello", "--model", tmp_path / "nowhere")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert "nowhere' does not exist" in line


@pytest.mark.cold
def test_bad_parameters_are_one_line(config):
    done = hbserve("generate", "Hello", "--config", config(), "--temperature", "-1")
    (line,) = done.stderr.strip().splitlines()
    assert (done.returncode, line) == (2, "error: temperature=-1.0: expected a number >= 0")


def test_a_port_in_use_is_named(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        instances = [
            {"instance_id": "prefill-0", "instance_type": "prefill", "kv_rank": 0, "port": port},
            {"instance_id": "decode-0", "instance_type": "decode", "kv_rank": 1},
        ]
        done = hbserve("generate", "Hello", "--config", config(gpu_instances=instances))
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert f"127.0.0.1:{port} is in use" in error
    assert "prefill-0" in error


def test_an_unknown_backend_lists_those_that_there_are(config):
    done = hbserve("generate", "Hello", "--config", config(), "--kv-transfer-backend", "nixl")
    assert done.returncode == 1
    message = "kv_transfer.backend='nixl': there are ['auto', 'ipc', 'mooncake', 'nccl']"
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


EXPECTED = "expected HOST:PORT, or [HOST]:PORT for IPv6, with a port from 1 to 65535"


def test_commands_about_a_running_deployment_ask_the_port_that_it_has_unless_told_otherwise():
    assert f"127.0.0.1:{SchedulerConfig().port}" == HERE


@pytest.mark.parametrize(
    "address", ["", "5550", ":5550", "127.0.0.1:0", "127.0.0.1:99999", "host:http", "host:²", "http://host:80"]
)
def test_a_wrong_address_to_connect_to_is_refused_at_once(address):
    done = hbserve("generate", "Hello", "--connect", address)
    assert done.returncode == 2
    assert done.stderr == f"error: --connect={address!r}: {EXPECTED}\n"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("::1:5550", "brackets are for an IPv6 host, which needs them: [::1]:5550"),
        ("0.0.0.0:5550", "0.0.0.0 is an address to listen on, not to connect to; on the same machine"),
        ("my host:5550", "its host is 'my host': expected an IP address or a name; a name has ASCII letters, digits"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_connected_to_is_refused_with_the_cure(address, words):
    done = hbserve("generate", "Hello", "--connect", address)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --connect={address!r}: {words}")


def test_a_deployment_of_the_demo_model_is_asked_with_that_ones_tokenizer(tmp_path, free_ports):
    """As in examples/two_hosts.yaml. A file without a model may belong to a deployment of another model, so the command
    says which tokenizer it takes."""
    instances = [
        f"{{instance_id: {role}, instance_type: {role}, port: {port}, kv_rank: {rank}}}"
        for rank, (role, port) in enumerate(zip(("prefill", "decode"), free_ports(2), strict=True))
    ]
    (port,) = free_ports(1)
    deployment = f"scheduler: {{port: {port}, instance_wait_s: 1}}\ngpu_instances: [{', '.join(instances)}]\n"
    (tmp_path / "deployment.yaml").write_text(deployment)
    command = [sys.executable, "-m", "hbserve", "scheduler", "--config", tmp_path / "deployment.yaml"]
    scheduler = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        done = hbserve("generate", "Hello", "--connect", f"127.0.0.1:{port}")
    finally:
        scheduler.terminate()
        scheduler.wait(timeout=DEADLINE_S)
    said = "the scheduler names no model; the demo model's tokenizer is taken, --model takes another\n"
    assert said in done.stderr
    assert "no tokenizer" not in done.stderr
    assert "no instance" in done.stderr


@pytest.mark.cold
def test_connect_to_nobody_says_what_it_waits_for():
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
    command = [sys.executable, "-m", "hbserve", "generate", "Hello", "--connect", address]
    client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert client.stderr is not None
    assert client.stderr.readline() == f"waiting for a scheduler at {address}, up to 30 s\n"
    client.send_signal(signal.SIGINT)
    _, rest = client.communicate(timeout=DEADLINE_S)
    assert (client.returncode, rest) == (130, "")


async def test_an_error_after_the_first_words_of_an_answer_is_told_in_a_line_of_its_own(capsys):
    async def broken() -> Any:
        yield {"text": "Once", "timings": None, "finish_reason": None}
        raise PeerDied("127.0.0.1:5550 has ended")

    with pytest.raises(PeerDied):
        await generate._stream(broken())
    assert capsys.readouterr().out == "Once\n"


def start_generating(config: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A client in the middle of a long answer, and the instances that it has started."""
    command = [sys.executable, "-m", "hbserve", "generate", "Hello", "--config", str(config), "--max-tokens", "100000"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.read(1)
    return client, children_of(client.pid)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_neither_ctrl_c_nor_a_kill_leaves_a_process_or_shared_memory(config, number, status):
    before = set(os.listdir("/dev/shm"))
    # The slow model of this test is slow by its number of tokens: it goes on until its length.
    client, instances = start_generating(config())
    assert len(instances) == 2
    client.send_signal(number)
    client.communicate(timeout=DEADLINE_S)
    assert client.returncode == status
    wait_until(lambda: not any(alive(pid) for pid in instances))
    assert set(os.listdir("/dev/shm")) <= before
