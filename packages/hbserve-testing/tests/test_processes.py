"""Tools for tests that look at processes, and stop them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from hbserve_testing.processes import freeze

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
child.kill()
child.communicate()
"""
THREADS = """
import threading
def work():
    while True:
        pass
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
print(flush=True)
work()
"""


def states(pid: int) -> list[str]:
    stats = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [each.rpartition(")")[2].split()[0] for each in stats]


def test_a_frozen_process_has_no_thread_that_runs_even_if_it_is_another_process_s_child():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        freeze(pid)
        assert states(pid) == ["T"] * 4
        os.kill(pid, signal.SIGCONT)
        parent.communicate(timeout=60)


def test_a_process_that_has_ended_is_as_good_as_frozen():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        freeze(process.pid)
