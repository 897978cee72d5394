"""Instances behind a headless Service, whose name the system's resolver looks up at a name server of its network."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hbserve_testing.narrowing import present

DEADLINE_S = 60
PODS = Path(__file__).parent / "hbserve_pods.py"
NAME_SERVER = "10.77.0.2"
RESOLV_CONF = f"nameserver {NAME_SERVER}\nsearch default.svc.cluster.local svc.cluster.local\noptions ndots:5\n"
"""As Kubernetes gives it to a pod."""
FILE = """
scheduler: {host: 10.77.0.1, port: 5550}
security: {allow_insecure: true}
gpu_instances: [{instance_type: hybrid, discover: "dns:hbserve-decode:5600"}]
"""
SCHEDULER = (
    "from hbserve_scheduler import discovery, membership; discovery.INTERVAL_S = membership.LOOK_S = 0.05; "
    "from hbserve_scheduler.__main__ import main; main()"
)
"""The command, which looks more often here."""


class Log:
    """Lines of a process, as they come."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.lines: list[str] = []
        self._begin = 0
        self._more = threading.Condition()
        self._reading = threading.Thread(target=self._read, args=[process])
        self._reading.start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify()

    def until(self, *patterns: str) -> None:
        """Each is in some line that has come since the last one that was waited for."""
        with self._more:
            for pattern in patterns:
                found = self._more.wait_for(partial(self._find, pattern), DEADLINE_S)
                assert found, f"{pattern}: {''.join(self.lines)}"
            self._begin = len(self.lines)

    def _find(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines[self._begin :])

    def join(self) -> None:
        self._reading.join(DEADLINE_S)


@contextmanager
def running(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.netns
def test_pods_behind_a_headless_service_join_and_leave_as_its_name_says_so(
    make_network: Callable[..., Any], tmp_path: Path
) -> None:
    network = make_network({"scheduler": "10.77.0.1", "pods": NAME_SERVER})
    network.resolve_names("scheduler", RESOLV_CONF)
    pods = [f"10.77.0.{number}" for number in (11, 12, 13)]
    for each in pods:
        network.add_address("pods", each)
    config = tmp_path / "deployment.yaml"
    config.write_text(FILE)

    def elsewhere(host: str, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", network.namespace(host), sys.executable, *arguments]

    name = "hbserve-decode.default.svc.cluster.local"
    with (
        running(elsewhere("pods", str(PODS), name, NAME_SERVER, "5600", *pods)) as cluster,
        running(elsewhere("scheduler", "-c", SCHEDULER, "--config", str(config))) as scheduler,
    ):
        log = Log(scheduler)

        def say(*words: str) -> None:
            assert cluster.stdin is not None
            assert cluster.stdout is not None
            cluster.stdin.write(" ".join(words) + "\n")
            cluster.stdin.flush()
            assert cluster.stdout.readline() == "said\n"

        assert present(cluster.stdout).readline() == "ready\n", present(cluster.stderr).read()
        log.until("hbserve-decode cannot be looked up; still trying, and no instance leaves because of that")
        say(*pods[:2])
        log.until(r"pod-1 at 10\.77\.0\.11:5600 joins", r"pod-2 at 10\.77\.0\.12:5600 joins")
        say("SERVFAIL")
        log.until("hbserve-decode cannot be looked up")
        say(*pods[1:])
        log.until(r"pod-3 at 10\.77\.0\.13:5600 joins", "pod-1 has left")
        say("NXDOMAIN")  # as of a Service without endpoints: pods that answer are not sent away for that
        log.until("hbserve-decode cannot be looked up")
        say(pods[2])
        log.until("pod-2 has left")
        scheduler.terminate()
        assert scheduler.wait(DEADLINE_S) == 0
        log.join()
        told = [re.search(r"pod-\d (at \S+ joins|has left)", line) for line in log.lines]
        assert sorted(each[0].partition(" at ")[0] for each in told if each) == [
            "pod-1", "pod-1 has left", "pod-2", "pod-2 has left", "pod-3"
        ]  # fmt: skip
