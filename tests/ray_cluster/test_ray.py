"""`hbserve serve --ray` on a cluster of two nodes: answers over HTTP, while actors and nodes are lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ray = pytest.importorskip("ray", reason="Ray is not installed: make ray")

DEADLINE_S = 120
AGAIN = "was started again"
NODE = {"object_store_memory": 80 << 20, "include_dashboard": False}

# Ray gives its workers, and so our instances, niceness 15: all else that computes here would go before them.
os.environ.update(RAY_worker_niceness="0")


@pytest.fixture(scope="module")
def model(small_model: Any) -> Iterator["Future[Path]"]:
    """Folder of a model, which is written while the cluster starts, because that is mostly a wait."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(small_model, "qwen3")


@pytest.fixture(scope="module")
def cluster(model: "Future[Path]") -> Iterator[Any]:
    """Cluster of two nodes with one core each, so that two instances are on different nodes."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **NODE})
    found.second = found.add_node(num_cpus=1, **NODE)
    found.third = None
    yield found
    found.shutdown()


def require_third_node(cluster: Any) -> None:
    """Add a third node, unless there is one. It has two cores, which is room for two more instances."""
    if cluster.third is None:
        cluster.third = cluster.add_node(num_cpus=2, **NODE)


class Served:
    """A process of `hbserve serve --ray`, and its log."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.client = httpx.Client(timeout=DEADLINE_S)
        self.lines: list[str] = []
        self.reading = threading.Thread(target=self._read)
        self.reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def wait_for(self, text: str, number: int = 1) -> list[str]:
        """Wait until so many lines of the log have this text, and return them."""
        deadline = time.monotonic() + DEADLINE_S
        while len(found := [line for line in list(self.lines) if text in line]) < number:
            assert time.monotonic() < deadline, "".join(self.lines)
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        return found

    @property
    def url(self) -> str:
        (line,) = self.wait_for("OpenAI's API at ")
        return line.split()[3].rstrip(",")

    def answer(self) -> dict[str, Any]:
        """Return a greedy answer, so that all are the same. Waits while instances are placed anew."""
        body = {"prompt": "Where?", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        done = self.client.post(f"{self.url}/completions", json=body)
        assert done.status_code == 200, done.text
        return dict(done.json())


@contextlib.contextmanager
def serving(cluster: Any, model: Path, folder: Path, *roles: str) -> Iterator[Served]:
    """Run `hbserve serve --ray` with one instance of each role."""
    content = {
        "model": {"path": str(model)},
        "engine": {"num_blocks": 64, "device": "cpu"},
        "scheduler": {"port": 0, "instance_wait_s": DEADLINE_S},
        "server": {"port": 0},
        "gpu_instances": [
            {"instance_id": f"{role}-0", "instance_type": role, "kv_rank": rank} for rank, role in enumerate(roles)
        ],
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "hbserve", "serve", "--config", str(config), "--ray", cluster.address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = Served(process)
        try:
            yield found
        finally:
            process.terminate()
            found.reading.join(DEADLINE_S)
            found.client.close()


@pytest.fixture(scope="module")
def served(cluster: Any, model: "Future[Path]", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The deployment of all tests except the last."""
    with serving(cluster, model.result(), tmp_path_factory.mktemp("served"), "prefill", "decode") as found:
        yield found


def scale(served: Served, number: str) -> "subprocess.Popen[str]":
    (line,) = [each for each in served.lines if "RPC at " in each]
    command = [sys.executable, "-m", "hbserve", "scale", number, "--connect", line.split("RPC at ")[1].strip()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def instance_processes() -> list[int]:
    """Return the pids of the processes that an actor of this test has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = Path(f"/proc/{parent}/cmdline").read_bytes()
            if b"hbserve_core" in command and title.startswith(b"ray::InstanceActor"):
                found.append(int(folder.name))
    return found


def test_decode_instances_are_one_then_three_then_one_under_load_and_a_lack_of_room_is_said(cluster, served):
    tokens = served.answer()["choices"][0]["token_ids"]
    answers: list[dict[str, Any]] = []
    ended, pause_s = threading.Event(), 0.4  # which leaves the processors to what starts meanwhile

    def ask_on() -> None:
        while not ended.wait(pause_s):
            answers.append(served.answer())

    asking = [threading.Thread(target=ask_on) for _ in range(2)]
    try:
        for each in asking:
            each.start()
        scaling = scale(served, "decode=3")
        served.wait_for("no node has room for {'CPU': 1.0} yet; waiting", 2)
        require_third_node(cluster)  # as an autoscaler would
        said, _ = scaling.communicate(timeout=DEADLINE_S)
        assert {"decode-1 takes requests", "decode-2 takes requests", "prefill=1 decode=3"} <= set(said.splitlines())
        assert "no node has room for {'CPU': 1.0} yet; waiting" in said
        assert len(instance_processes()) == 4
        pause_s = 0.0
        said, _ = scale(served, "decode=1").communicate(timeout=DEADLINE_S)
        assert {"decode-1 has left", "decode-2 has left", "prefill=1 decode=1"} <= set(said.splitlines())
        assert len(instance_processes()) == 2
    finally:
        ended.set()
        for each in asking:
            each.join()
    assert len(answers) > 2
    assert all(each["choices"][0]["token_ids"] == tokens for each in answers)
    assert {each["metrics"]["num_attempts"] for each in answers} == {1}


def test_answers_go_on_while_an_instance_an_actor_and_a_node_are_lost(cluster, served):
    first = served.answer()
    usage = json.dumps(first["usage"])
    assert first["usage"]["completion_tokens"] == 24, usage
    tokens = first["choices"][0]["token_ids"]
    pids = instance_processes()
    assert len(pids) == 2

    actor = int(Path(f"/proc/{pids[1]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pids[0], signal.SIGKILL)  # an instance's own process: its actor says so
    os.kill(actor, signal.SIGKILL)  # of the other one: its instance hears that from its stdin
    served.wait_for("its process has ended (signal SIGKILL")
    served.wait_for("its Ray actor has ended (ActorDiedError")
    served.wait_for(AGAIN, 2)
    assert served.answer()["choices"][0]["token_ids"] == tokens

    require_third_node(cluster)
    cluster.remove_node(cluster.second)
    served.wait_for("its Ray actor has ended (", 2)
    served.wait_for(AGAIN, 3)
    assert served.answer()["choices"][0]["token_ids"] == tokens

    served.process.terminate()
    assert served.process.wait(DEADLINE_S) == 0
    assert instance_processes() == []


def test_nothing_is_left_when_the_driver_is_killed(cluster, model, tmp_path):
    with serving(cluster, model.result(), tmp_path, "hybrid") as served:
        served.wait_for("OpenAI's API at ")
        assert len(instance_processes()) == 1
        served.process.kill()
        served.process.wait()
    deadline = time.monotonic() + DEADLINE_S
    while instance_processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
