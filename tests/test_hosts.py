"""Deployments whose prefill, decode and scheduler have a host each, and hosts that vanish and come back."""

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.warm

START_DEADLINE_S = 180
LOAD = Path(__file__).parent / "hbserve_load.py"
AT_ONCE, ANSWERS = 4, 4
"""Number of requests that run at a time, and of answers that each lane must get, after a cut, until it is known that
the cut has hit none of them."""


def addresses(*instances: str) -> dict[str, str]:
    return {host: f"10.77.0.{number}" for number, host in enumerate(["scheduler", *instances], 1)}


class Hosts:
    """A network with one process on each host."""

    def __init__(self, network: Any, hosts: dict[str, str], log: Path) -> None:
        self.network = network
        self.scheduler = f"{hosts['scheduler']}:5550"
        self.log = log

    def command(self, host: str, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.network.namespace(host), sys.executable, *arguments]

    def hbserve(self, *arguments: str) -> str:
        """Run a client's command on the scheduler's host, and return its output."""
        command = self.command("scheduler", "-m", "hbserve", *arguments, "--connect", self.scheduler)
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_DEADLINE_S)
        assert done.returncode == 0, f"{done.stderr}\n{self.log.read_text()}"
        return done.stdout if "--json" in arguments else done.stdout + done.stderr


@contextlib.contextmanager
def running(make_network: Any, instances: list[str], folder: Path, model: Path, **sections: Any) -> Iterator[Hosts]:
    """Start a deployment with one process on each host. At the end, all must end when they are told to."""
    hosts = addresses(*instances)
    entries = [
        {
            "instance_id": name,
            "instance_type": name.split("-")[0],
            "gpu_id": 0,
            "host": hosts[name],
            "port": 5600,
            "kv_rank": rank,
        }
        for rank, name in enumerate(instances)
    ]
    content = {
        "model": {"path": str(model)},
        "gpu_instances": entries,
        "engine": {"num_blocks": 64, "num_threads": 1},
        **sections,
        "kv_transfer": {"port": 5700, **sections["kv_transfer"]},
        "scheduler": {"host": hosts["scheduler"], "port": 5550, **sections.get("scheduler", {})},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    made = Hosts(make_network(hosts), hosts, folder / "log")
    with made.log.open("w") as log:
        processes = []
        for host in [*reversed(instances), "scheduler"]:
            what = ["scheduler"] if host == "scheduler" else ["instance", "--instance-id", host]
            command = made.command(host, "-m", "hbserve", *what, "--config", str(config))
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        try:
            yield made
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                assert process.wait(timeout=60) == 0, made.log.read_text()


@pytest.mark.netns
@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
def test_prefill_decode_and_scheduler_on_three_hosts_answer_together_and_a_slow_link_is_named(
    make_network, backend, small_model, tmp_path
):
    if backend == "mooncake":
        pytest.importorskip(
            "mooncake.engine", reason="Mooncake or its system libraries are missing", exc_type=ImportError
        )
    instances, kv_transfer = ["prefill-0", "decode-0"], {"backend": backend}
    with running(make_network, instances, tmp_path, small_model("qwen3"), kv_transfer=kv_transfer) as hosts:
        assert "TTFT" in hosts.hbserve("generate", "w1 w2 w3 " * 20, "--max-tokens", "8")
        if backend == "nccl":
            slow_down_and_look(hosts)


def slow_down_and_look(hosts: Hosts) -> None:
    """Slow the link to the decode instance down, and check that log, waterfall and a metric name what waited for it."""
    hosts.network.slow_down("decode-0", 400)
    hosts.hbserve("generate", "slow " * 30, "--max-tokens", "4")  # about 90 KB of KV: two seconds
    view = json.loads(hosts.hbserve("top", "--once", "--json"))
    newest, *_ = view["requests"]
    why = r"waited [0-9]+ ms for its KV from prefill-0 to decode-0"
    assert re.fullmatch(why, newest["held_up"])
    assert re.search(f"request {newest['request_id']}: .*: length; {why}\n", hosts.log.read_text())
    lengths = {each["name"]: each["end_s"] - each["begin_s"] for each in newest["segments"]}
    assert max(lengths, key=lengths.__getitem__) == "kv"
    assert view["delayed"]["transfer"] >= 1


class Load:
    """A continuous load of requests. None may fail, and each prompt must get the same answer every time."""

    def __init__(self, hosts: Hosts) -> None:
        command = hosts.command("scheduler", str(LOAD), hosts.scheduler, str(AT_ONCE))
        self._client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._hosts = hosts
        self._tokens: dict[int, list[int]] = {}

    def _next(self) -> dict[str, Any]:
        assert self._client.stdout is not None
        line = self._client.stdout.readline()
        assert line, self._hosts.log.read_text()
        said: dict[str, Any] = json.loads(line)
        assert "error" not in said, f"{said}\n{self._hosts.log.read_text()}"
        return said

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            answer = self._next()
            assert answer["tokens"] == self._tokens.setdefault(answer["lane"], answer["tokens"])
            if condition(answer):
                return answer

    def until_used(self, instance: str) -> None:
        self.until(lambda answer: instance in answer["instances"])

    def is_tried_again_without(self, instance: str) -> bool:
        """Whether a request was hit by the end of this instance, and so tried again. If none was, its requests had just
        been answered, and the scheduler noticed its silence before sending it another one."""
        num_answers: Counter[int] = Counter()

        def is_tried_again(answer: dict[str, Any]) -> bool:
            return answer["attempts"] > 1 and instance not in answer["instances"]

        def is_decided(answer: dict[str, Any]) -> bool:
            num_answers[answer["lane"]] += 1
            have_all = len(num_answers) == AT_ONCE and min(num_answers.values()) >= ANSWERS
            return is_tried_again(answer) or have_all

        return is_tried_again(self.until(is_decided))

    def end(self) -> dict[str, int]:
        """End the load, and return what is then left in the deployment."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.close()
        with self._client.stdout:
            while "leftovers" not in (said := self._next()):
                pass
            assert self._client.wait(timeout=60) == 0
        left: dict[str, int] = said["leftovers"]
        return left


@pytest.mark.netns
def test_no_request_fails_by_a_host_that_vanishes_and_it_is_used_again_when_it_is_back(
    make_network, small_model, tmp_path
):
    instances = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    sections = {
        "kv_transfer": {"backend": "nccl", "timeout_s": 3},
        "scheduler": {"heartbeat_interval_s": 0.5, "heartbeat_timeout_s": 3},
    }
    with running(make_network, instances, tmp_path, small_model("qwen3"), **sections) as hosts:
        load = Load(hosts)
        for victim in ["decode-1", "prefill-1"]:
            is_met = False
            while not is_met:
                load.until_used(victim)
                hosts.network.cut(victim)
                is_met = load.is_tried_again_without(victim)
                hosts.network.mend(victim)
            load.until_used(victim)
        assert load.end() == {}, hosts.log.read_text()
