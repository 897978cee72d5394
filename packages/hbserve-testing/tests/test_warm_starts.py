"""A program that is a fork of the forkserver is what the same command would be elsewhere, but for its imports."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hbserve_testing.processes import alive, children_of, command_of

pytestmark = [pytest.mark.warm, pytest.mark.skipif(sys.platform != "linux", reason="there is no forkserver")]

SELF = """
import json, os, sys
print(json.dumps({
    "torch": "torch" in sys.modules, "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0),
    "arguments": sys.argv[1:], "path": sys.path[0], "folder": os.getcwd(), "variables": dict(os.environ),
    "name": __name__, "input": sys.stdin.read(), "files": len(os.listdir("/proc/self/fd")),
}))
"""


def test_it_is_a_child_with_the_arguments_folder_environment_streams_and_session_that_it_was_given(tmp_path):
    environment = os.environ | {"OF_THE_CALLER": "caf\udce9"}
    with subprocess.Popen(
        [sys.executable, "-c", SELF, "a", "b c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path,
        env=environment, start_new_session=True,
    ) as popen:  # fmt: skip
        out, _ = popen.communicate(b"input", timeout=60)
    said = json.loads(out)
    assert said["torch"], "it was cold"
    assert (said["pid"], said["parent"], said["session"]) == (popen.pid, os.getpid(), popen.pid)
    assert (said["arguments"], said["path"], said["folder"]) == (["a", "b c"], "", str(tmp_path))
    assert said["variables"] == environment
    assert (said["name"], said["input"], popen.returncode) == ("__main__", "input", 0)
    assert said["files"] <= 5, "the three streams, its forkserver, and the listing itself"


@pytest.mark.parametrize("how", [["-m", "of_the_folder"], ["of_the_folder.py"], ["-P", "of_the_folder.py"]])
def test_a_module_and_a_file_run_too_and_their_exit_status_is_that_of_the_program(tmp_path, how):
    (tmp_path / "of_the_folder.py").write_text("import sys\nassert 'torch' in sys.modules\nsys.exit(__name__[2:6])")
    done = subprocess.run([sys.executable, *how], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"main\n")


def test_it_ends_as_any_other_but_for_the_destructors_of_libraries():
    """What has been printed, by C too, is written; exit handlers and objects' ends are called; the status is kept."""
    code = """
import atexit, ctypes, sys, weakref
class Object:
    def __del__(self, write=sys.stdout.write):
        write("object ")
held = Object()
atexit.register(print, "handler", end=" ")
weakref.finalize(Object, print, "finalizer", end=" ")
libc = ctypes.CDLL(None)
libc.printf(b"from C ")
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
    assert sorted(done.stdout.split()) == sorted(["from", "C", "handler", "finalizer", "object"])


def test_finalizers_of_what_all_share_are_not_called_when_it_ends():
    """torch has thousands, which took a fork longer than all else."""
    code = "import sys, weakref; print(sum(each.atexit for each in weakref.finalize._registry), 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "0 True\n"


def test_what_it_prints_is_there_at_once_if_it_is_told_to_hold_nothing_back():
    code = "import os, signal; print('caf\u00e9', end=''); os.kill(os.getpid(), signal.SIGKILL)"
    for options, expected in (([], b""), (["-u"], "caf\u00e9".encode()), (["-P", "-u"], "caf\u00e9".encode())):
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, timeout=60)
        assert (done.returncode, done.stdout) == (-signal.SIGKILL, expected)


def test_it_knows_how_it_starts_others_as_a_worker_of_pytest_must_that_is_one_itself():
    code = """
import subprocess, sys
from hbserve_testing.warm_starts import WarmStarts
warm_starts = WarmStarts.of_this_process()
warm_starts.install()
for is_on in (False, True):
    warm_starts.switch(is_on)
    subprocess.run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], check=True)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "False\nTrue\n"


def test_it_and_what_it_starts_find_modules_where_they_are_told_to_look(tmp_path):
    (tmp_path / "told.py").write_text("found = True")
    code = """
import os, subprocess, sys, told
assert "torch" in sys.modules and told.found
elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
for environment in (None, elsewhere):
    code = "import sys; assert 'torch' in sys.modules; import told"
    print(subprocess.run([sys.executable, "-c", code], env=environment, stderr=-3).returncode)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, timeout=60) == "0\n1\n"


OF_MULTIPROCESSING = """
import multiprocessing, os, sys, time
def say(pipe):
    pipe.send(("torch" in sys.modules, os.getppid(), multiprocessing.current_process().name, pipe.recv()))
def sleep():
    time.sleep(60)
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe()
    process = context.Process(target=say, args=(theirs,), name="its name")
    process.start()
    theirs.close()
    ours.send("sent")
    warm, parent, *rest = ours.recv()
    process.join(30)
    is_child = parent == os.getpid()
    sleeper = context.Process(target=sleep)
    sleeper.start()
    sleeper.kill()
    sleeper.join(30)
    print(warm, is_child, *rest, process.exitcode, sleeper.exitcode)
"""


@pytest.mark.parametrize(("how", "is_child"), [("spawn", True), ("forkserver", False)])
def test_processes_of_multiprocessing_are_forks_too_with_the_files_that_they_are_passed(tmp_path, how, is_child):
    (tmp_path / "program.py").write_text(OF_MULTIPROCESSING)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", how], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"True {is_child} its name sent 0 -9\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_and_what_it_has_started_is_its_own_child(number):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import sys, time; assert 'torch' in sys.modules; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as popen:
        assert popen.stdout is not None
        child = int(popen.stdout.readline())
        try:
            assert children_of(popen.pid) == [child]
            assert command_of(popen.pid)[1:] == ["-c", code]
            popen.send_signal(number)
            assert popen.wait(60) == -number
            assert alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_asyncio_waits_for_it_as_for_any_other():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "print(int(input()) + 1); raise SystemExit(5)", stdin=-1, stdout=-1
    )
    assert await process.communicate(b"41\n") == (b"42\n", None)
    assert process.returncode == 5


def test_whether_kernels_are_interpreted_is_not_known_before_it_runs():
    code = "import os, sys; print('torch' in sys.modules, 'triton' in sys.modules, os.environ['TRITON_INTERPRET'])"
    for chosen in "01":
        environment = os.environ | {"TRITON_INTERPRET": chosen}
        said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, timeout=60)
        assert said == f"True False {chosen}\n"


@pytest.mark.parametrize("options", [{"env": os.environ | {"PYTHONHASHSEED": "1"}}, {"preexec_fn": lambda: None}])
def test_what_a_fork_cannot_be_starts_cold(options):
    code = "import sys; print('torch' in sys.modules)"
    for expected, given in (("True\n", {}), ("False\n", options)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **given)
        assert done.stdout == expected


@pytest.mark.netns
def test_a_program_of_another_network_has_the_files_of_etc_that_are_for_it_and_nobody_else_has(make_network):
    network = make_network({"there": "10.78.0.1"})
    network.resolve_names("there", "10.78.0.9 somebody\n", "hosts")
    code = "import socket, sys; print(socket.gethostbyname('somebody'), 'torch' in sys.modules)"
    command = ["ip", "netns", "exec", network.namespace("there"), sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True, timeout=60) == "10.78.0.9 True\n"
    assert "somebody" not in Path("/etc/hosts").read_text()


@pytest.mark.netns
def test_a_program_of_another_network_is_there_and_what_it_starts_too(make_network):
    namespace = make_network({"there": "10.78.0.1"}).namespace("there")
    code = """
import os, subprocess, sys
code = "import os, sys; print(os.stat('/proc/self/ns/net').st_ino, 'torch' in sys.modules)"
print(os.stat("/proc/self/ns/net").st_ino, subprocess.check_output([sys.executable, "-c", code], text=True), end="")
"""
    command = [sys.executable, "-c", code]
    for before, file in ((["ip", "netns", "exec", namespace], f"/run/netns/{namespace}"), ([], "/proc/self/ns/net")):
        there = os.stat(file).st_ino
        assert subprocess.check_output([*before, *command], text=True, timeout=60) == f"{there} {there} True\n"


@pytest.mark.cold
def test_a_test_that_is_marked_cold_starts_cold():
    code = "import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "False\n"
