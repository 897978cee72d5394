"""Scheduler and instances as separate processes, as an operator runs them."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hbserve_rpc import format_address

pytestmark = pytest.mark.warm

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 120


class Deployment:
    """A configuration file, the processes that were started from it, and their log."""

    def __init__(
        self, folder: Path, model: Path, instances: list[str], ports: list[int], at: str, **scheduler: Any
    ) -> None:
        self.log = folder / "log"
        self.config = folder / "config.yaml"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, *ports = ports
        self.address = format_address(at, self.port)
        config = {
            "model": {"path": str(model)},
            "kv_transfer": {"backend": "nccl"},
            "gpu_instances": [
                {
                    "instance_id": name,
                    "instance_type": name.split("-")[0],
                    "gpu_id": 0,
                    "host": at,
                    "port": port,
                    "kv_rank": rank,
                }
                for rank, (name, port) in enumerate(zip(instances, ports, strict=True))
            ],
            "engine": {"num_blocks": 64, "num_threads": 1},
            "server": {"port": 0},
            "scheduler": {"port": self.port, "heartbeat_interval_s": 0.5, "heartbeat_timeout_s": 5} | scheduler,
        }
        self.config.write_text(yaml.safe_dump(config))

    def start(self, name: str) -> None:
        script = "start_cpu_scheduler.py" if name == "scheduler" else "start_pd_disagg.py"
        which = [] if name == "scheduler" else ["--instance-id", name]
        command: list[str | Path] = [sys.executable, ROOT / "scripts" / script, "--config", self.config, *which]
        with self.log.open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def generate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "hbserve",
            "generate",
            *arguments,
            "--connect",
            self.address,
            "--temperature",
            "0",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)

    def generate_until_it_works(self) -> None:
        """Run `hbserve generate` again and again until it succeeds: instances may load longer than requests wait."""
        deadline = time.monotonic() + DEADLINE_S
        while (answer := self.generate("Hello", "--max-tokens", "4")).returncode != 0:
            assert time.monotonic() < deadline, answer.stderr + self.log.read_text()

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes.pop(name).wait(timeout=30)

    def stop(self) -> dict[str, int]:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        return {name: process.wait(timeout=60) for name, process in self.processes.items()}


@pytest.fixture
def deploy(
    tmp_path: Path, small_model: Callable[[str], Path], free_ports: Callable[[int], list[int]]
) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def deploy(instances: list[str], at: str = "127.0.0.1", **scheduler: Any) -> Deployment:
        ports = free_ports(1 + len(instances))
        # Else a decode instance that is ready first computes the prompt, and nothing is moved.
        scheduler = {"local_prefill_fallback": False} | scheduler
        made.append(Deployment(tmp_path, small_model("qwen3"), instances, ports, at, **scheduler))
        return made[-1]

    yield deploy
    for deployment in made:
        exits = deployment.stop()
        assert set(exits.values()) <= {0}, f"{exits}\n{deployment.log.read_text()}"


ORDERS = [["scheduler", "prefill-0", "decode-0"], ["decode-0", "prefill-0", "scheduler"]]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_processes_started_in_any_order_find_each_other(order, deploy):
    # Known elsewhere: SGLang #19288, #6413, #10001, #33740, Mooncake #1207.
    deployment = deploy(["prefill-0", "decode-0"])
    for name in order:
        deployment.start(name)
    answer = deployment.generate("Hello, who are you?", "--max-tokens", "8")
    assert answer.returncode == 0, answer.stderr + deployment.log.read_text()
    assert "TTFT" in answer.stdout + answer.stderr


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_everything_works_over_ipv6_and_the_scheduler_may_listen_on_every_address(deploy):
    # Known elsewhere: vLLM #42149, LMCache #5043, SGLang #7858.
    answers = []
    for host, wildcard in [("::1", "::"), ("127.0.0.1", "0.0.0.0")]:
        deployment = deploy(["prefill-0", "decode-0"], host, host=wildcard)
        for name in ["scheduler", "prefill-0", "decode-0"]:
            deployment.start(name)
        answer = deployment.generate("Hello, who are you?", "--max-tokens", "8")
        assert answer.returncode == 0, answer.stderr + deployment.log.read_text()
        answers.append(answer.stdout)
        deployment.stop()
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("fallback", [False, True])
def test_a_killed_instance_is_named_or_done_without_and_its_restart_serves_again(deploy, fallback):
    # Known elsewhere: vLLM #58063, #49238, SGLang #28596, #27039.
    deployment = deploy(["prefill-0", "decode-0"], instance_wait_s=3, local_prefill_fallback=fallback)
    for name in ["scheduler", "prefill-0", "decode-0"]:
        deployment.start(name)
    deployment.generate_until_it_works()
    victim = "prefill-0" if fallback else "decode-0"
    deployment.kill(victim)
    answer = deployment.generate("two", "--max-tokens", "4")
    if fallback:
        assert "KV moved 0.00 MiB" in answer.stderr, answer.stderr
        return
    assert answer.returncode != 0
    assert victim in answer.stderr, answer.stderr
    deployment.start(victim)
    deployment.generate_until_it_works()


def test_one_of_two_decode_instances_killed_in_mid_stream_is_not_noticed_by_the_client(deploy):
    deployment = deploy(["prefill-0", "decode-0", "decode-1"])
    for name in ["scheduler", "prefill-0", "decode-0", "decode-1"]:
        deployment.start(name)
    prompts = ["a", "bb", "ccc", "dddd"]
    expected = deployment.generate(*prompts, "--max-tokens", "200")
    assert expected.returncode == 0, expected.stderr

    command = [sys.executable, "-m", "hbserve", "generate", *prompts, "--connect", f"127.0.0.1:{deployment.port}"]
    client = subprocess.Popen(
        [*command, "--max-tokens", "200", "--temperature", "0"], stdout=subprocess.PIPE, text=True
    )
    deployment.kill("decode-1")
    out, _ = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 0, deployment.log.read_text()

    def answers(text: str) -> list[str]:
        return re.findall(r"\S+", text.split("TTFT")[0])

    assert answers(out) == answers(expected.stdout)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.cold)])
def test_serve_runs_the_whole_deployment_and_ends_it_in_order(deploy, number):
    deployment = deploy(["prefill-0", "decode-0"])
    command = [sys.executable, "-m", "hbserve", "serve", "--config", deployment.config]
    with deployment.log.open("ab") as log:
        served = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        answer = deployment.generate("Hello", "--max-tokens", "4")
        assert answer.returncode == 0, answer.stderr + deployment.log.read_text()
    finally:
        served.send_signal(number)
        assert served.wait(timeout=60) == 0, deployment.log.read_text()
    if number == signal.SIGTERM:  # there cold processes are what is looked at
        return
    # The instances' ports are free again: a second deployment on the same file can start.
    for name in ["scheduler", "prefill-0", "decode-0"]:
        deployment.start(name)
    assert deployment.generate("Hello", "--max-tokens", "4").returncode == 0
