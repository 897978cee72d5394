"""A process of HBServe's own, whatever it was started with."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hbserve_rpc import own_process

DEADLINE_S = 30
REPORT = """
import json, os, resource, signal, sys
from hbserve_rpc import own_process
own_process.set_up()
sys.stderr.write("to nowhere")
found = {
    "open": [os.path.exists(f"/proc/self/fd/{fd}") for fd in range(3)],
    "inherited": [os.get_inheritable(fd) for fd in range(3)],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "children": signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "ending": [each.name for each in own_process.ending_signals()],
}
with open(sys.argv[1], "w") as file: json.dump(found, file)
"""


def report(folder: Path, prepare: Callable[[], object]) -> dict[str, Any]:
    """What a process says that was started after `prepare` has run in it."""
    path = folder / "report"
    command = [sys.executable, "-c", REPORT, str(path)]
    subprocess.run(command, preexec_fn=prepare, timeout=DEADLINE_S, check=True, close_fds=False)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_closed_streams_blocked_signals_and_few_files_are_mended_at_the_start(tmp_path):
    # Known elsewhere: vLLM #7920.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def prepare() -> None:
        for fd in range(3):
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

    found = report(tmp_path, prepare)
    assert found["open"] == found["inherited"] == [True, True, True]
    assert (found["blocked"], found["children"]) == ([], True)
    assert found["files"] == [65536 if hard == resource.RLIM_INFINITY else min(hard, 65536), hard]


def test_a_limit_that_cannot_be_raised_stays(tmp_path):
    found = report(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert found["files"] == [64, 64]


def test_signals_of_the_terminal_that_were_ignored_do_not_end_it_and_sigterm_always_does(tmp_path):
    def default() -> None:
        """Whatever these tests inherit: under `nohup`, SIGHUP is ignored."""
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    assert report(tmp_path, default)["ending"] == ["SIGTERM", "SIGINT", "SIGHUP"]

    def ignore() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    assert report(tmp_path, ignore)["ending"] == ["SIGTERM"]


ENDING = """
import asyncio, os, signal
from hbserve_rpc import own_process

own_process.end_at_once_by_ctrl_c()

async def closed_late():
    try:
        await asyncio.Event().wait()
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("still there")

async def serve():
    closing = asyncio.create_task(closed_late())
    told = asyncio.Queue()
    with own_process.on_ending_signals(told.put_nowait):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
            print((await told.get()).name, flush=True)

asyncio.run(serve())
"""


def test_signals_are_told_while_it_serves_and_ctrl_c_is_no_traceback_while_the_loop_closes():
    def default() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    command = [sys.executable, "-c", ENDING]
    done = subprocess.run(command, preexec_fn=default, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.stdout.split() == ["SIGINT", "SIGTERM", "SIGHUP", "SIGINT"]
    assert (done.stderr, done.returncode) == ("", -signal.SIGINT)


SERVES = """
import gc
from hbserve_rpc import own_process
own_process.freeze_heap()
full = []
gc.callbacks.append(lambda phase, info: phase == "start" and info["generation"] == 2 and full.append(info))
waiting = [[] for _ in range(400_000)]
print(len(full))
"""


def test_a_server_whose_requests_wait_is_seldom_stopped_by_full_collections():
    done = subprocess.run(
        [sys.executable, "-c", SERVES], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert int(done.stdout) == 0


async def test_a_signal_that_another_thread_gets_wakes_the_event_loop():
    """As one does that comes between the last look at signals and the wait: it interrupts no wait."""
    told: asyncio.Queue[signal.Signals] = asyncio.Queue()

    def signalled_here() -> None:
        time.sleep(0.02)  # the event loop waits by then; what is tested is true before, too
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    with own_process.on_ending_signals(told.put_nowait):
        for _ in range(3):
            thread = threading.Thread(target=signalled_here)
            thread.start()
            async with asyncio.timeout(DEADLINE_S):
                assert await told.get() is signal.SIGTERM
            thread.join()
    assert signal.set_wakeup_fd(-1) == -1


async def test_what_a_signal_ends_has_its_way_to_end():
    found = []

    async def job() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            found.append("closed")

    with pytest.raises(own_process.Signalled, match="SIGTERM"):
        await own_process.until_signalled(job())
    assert found == ["closed"]


IGNORED = """
import gc, os, signal, weakref
from hbserve_rpc import own_process

class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
with own_process.keeping_interrupts():
    try:
        Interrupted()
        print("ignored", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("raised")
"""


def test_an_interrupt_that_python_ignores_is_raised_again():
    done = subprocess.run([sys.executable, "-c", IGNORED], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.stdout, done.stderr) == ("ignored\nraised\n", "")


TELLS = """
import sys
from hbserve_rpc import own_process
own_process.set_up()
sys.stderr.write("nobody reads this\\n" * 1000)
print("goes on", sys.stderr.isatty(), file=sys.stderr)
print(sys.stderr.fileno(), sys.stderr.errors)
"""


@pytest.mark.parametrize("where", ["a pipe that nobody reads", "a full disk"])
def test_what_stderr_does_not_take_is_lost_and_ends_nothing(where):
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full, open(writing, "wb", buffering=0) as unread:
        stderr = full if where == "a full disk" else unread
        done = subprocess.run([sys.executable, "-c", TELLS], stdout=subprocess.PIPE, stderr=stderr, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (0, b"2 backslashreplace\n")
