"""A server from which Python programs are forked. It has imported torch, which otherwise takes each program 4 s.

    test ──Popen──▶ forkserver ──fork──▶ a process that ends at once ──fork──▶ the program
      ▲                                                                            │
      └──────────── is its parent from then on, being the nearest subreaper ───────┘

So a program is a child of whoever started it, like any other: Popen, asyncio, os.waitid, signals and pidfds know it by
its pid. It has the folder, environment, streams, session and network that it was given, and a forkserver of its own for
the programs that it starts itself. Two things are not tested in this way, and need a cold interpreter: what it does
when it starts, and how it takes apart, when it ends, the modules that all forks share.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.util
import io
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import types
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from hbserve_testing.namespaces import enter, mount_files

PRELOADED = (
    "torch",
    "encodings.idna",
    "llguidance",
    "hbserve_core",
    "hbserve_core.instance.process",
    "hbserve_core.ranks.distributed_group",
    "hbserve_core.transfers.rank_transfers",
    "hbserve_kv.transports.ipc",
    "hbserve_kv.transports.nccl",
    "hbserve_testing.warm_starts",
    "hbserve.backends.disaggregated",
    "hbserve.commands.generate",
    "hbserve.backends.hybrid",
    "hbserve.monitoring.live_view",
    "hbserve.commands.serve",
    "hbserve.server.front_end",
    "typer._adapters",
    "uvicorn",
)
LOADED_AGAIN = ("hbserve.__main__", "typer.rich_utils")
"""Modules that each program loads itself, because it runs them or they read variables. What they import is loaded."""
TITLE = "hbserve-forkserver"
HUGE_PAGE, MADV_COLLAPSE = 1 << 21, 25  # Linux 6.1 or newer; without huge pages, nothing changes
_LONGEST_TITLE = 4096
_LONGEST_REQUEST = 1 << 20
_MOST_FILES = 64
NUM_THREADS, SEARCHED = "OMP_NUM_THREADS", "PYTHONPATH"
UNBUFFERED, SAFE_PATH = "-u", "-P"
"""Options of the interpreter that a fork can apply."""


@dataclass(frozen=True)
class Program:
    """A Python program that is to be started, and how."""

    options: list[str]
    """Options of the interpreter."""
    arguments: list[str]
    """Command line without the interpreter and its options."""
    folder: str
    environment: Mapping[str, str]
    new_session: bool
    namespace: str
    """Name of its network namespace; "": that of the process that starts it."""
    passed: list[int]
    """File descriptors that it gets besides its standard streams, under these numbers."""


def server_command(connection: int) -> list[str]:
    """Return the command line of a forkserver, which says over this descriptor when it is ready."""
    return [sys.executable, "-P", "-m", "hbserve_testing.forkserver", str(connection), "-" * _LONGEST_TITLE]


def ask(connection: socket.socket, program: Program, streams: list[int]) -> int:
    """Have a forkserver start a program with these standard streams, and return its pid."""
    socket.send_fds(connection, [json.dumps(asdict(program)).encode()], [*streams, *program.passed])
    if not (answer := connection.recv(64)):
        raise OSError(f"the forkserver has ended; it should have started {program.arguments}")
    return int(answer)


def _serve(connection: socket.socket) -> tuple[Program, list[int]]:
    """Fork for each request. This returns in each fork, with its program, and the files for its streams and for what it
    is passed. The forkserver itself ends with the process that it serves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is not meant for the forkserver
    while True:
        request, files, _, _ = socket.recv_fds(connection, _LONGEST_REQUEST, _MOST_FILES)
        if not request:
            os._exit(0)
        read, write = os.pipe()
        if (between := os.fork()) == 0:
            between = os.getpid()
            if os.fork() != 0:
                os._exit(0)
            while os.getppid() == between:  # until it has its final parent, for which it may ask
                time.sleep(0.0005)
            program = Program(**json.loads(request))
            _set_title([sys.executable, *program.options, *program.arguments])
            os.write(write, str(os.getpid()).encode())
            for fd in (read, write, connection.detach()):
                os.close(fd)
            return program, files
        os.waitpid(between, 0)
        for fd in (write, *files):
            os.close(fd)
        connection.send(os.read(read, 64))
        os.close(read)


def _become(program: Program, files: list[int]) -> None:
    """Turn a fork into what a new process of this program would be."""
    if program.new_session:
        os.setsid()
    if program.namespace:
        enter(program.namespace)
        mount_files(program.namespace)
    os.chdir(program.folder)
    _look_in(program.environment.get(SEARCHED, ""))
    os.environ.clear()
    os.environ.update(program.environment)
    _number(files, [0, 1, 2, *program.passed])
    _fork_a_forkserver(program.passed)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for own, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _open(own, name, UNBUFFERED in program.options)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if (threads := program.environment.get(NUM_THREADS, "")).isdigit():
        import torch

        torch.set_num_threads(int(threads))
    _leave_libraries_as_they_are()


def _number(files: list[int], numbers: list[int]) -> None:
    """Give these files these numbers, even if others of them have such a number now."""
    beyond = 1 + max(numbers)
    elsewhere = [fcntl.fcntl(fd, fcntl.F_DUPFD, beyond) for fd in files]
    for fd in files:
        os.close(fd)
    for fd, number in zip(elsewhere, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def _open(own: int, name: str, unbuffered: bool) -> io.TextIOWrapper:
    """Open a standard stream as the interpreter does."""
    lines, errors = (1, "backslashreplace") if name == "stderr" else (-1, None)
    if unbuffered and own:
        return io.TextIOWrapper(io.FileIO(own, "w", closefd=False), errors=errors, write_through=True)
    return open(own, "w" if own else "r", lines, closefd=False, errors=errors)


def _look_in(folders: str) -> None:
    """Search modules in these folders, in place of those that PYTHONPATH had in this process."""
    before = _absolute(os.environ.get(SEARCHED, ""))
    sys.path[:] = _absolute(folders) + [each for each in sys.path if each not in before]


def _absolute(folders: str) -> list[str]:
    return [os.path.abspath(each) for each in folders.split(os.pathsep) if each]


def _leave_libraries_as_they_are() -> None:
    """Skip the destructors of libraries when the process ends. These, torch's above all, would have a hundred megabytes
    copied for each fork, which takes longer than the rest of a short program."""
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)  # gets the exit status; what was registered last is called first


def _fork_a_forkserver(passed: list[int]) -> None:
    """Fork a forkserver for the programs that this process starts. This returns in the process itself once the
    forkserver is ready; each fork of the forkserver runs its own program instead."""
    from hbserve_testing.warm_starts import WarmStarts

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() != 0:
        theirs.close()
        ours.recv(64)
        WarmStarts(ours).install()
        return
    ours.close()
    _set_title([TITLE])
    nowhere = os.open(os.devnull, os.O_RDWR)  # the forkserver must not hold files of its process open
    for own in range(3):
        os.dup2(nowhere, own)
    for fd in (nowhere, *passed):
        os.close(fd)
    theirs.send(b"ready")
    begin(*_serve(theirs))


def begin(program: Program, files: list[int]) -> NoReturn:
    _become(program, files)
    shared = set(sys.modules) - {"__main__"}
    _end(_status_of(program), shared)


def _status_of(program: Program) -> int:
    """Run the program, and return its exit status. A KeyboardInterrupt passes through, to end it as the interpreter
    does."""
    try:
        _run(program.arguments, SAFE_PATH in program.options)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _end(status: int, shared: set[str]) -> NoReturn:
    """End the process as an interpreter ends: threads, exit handlers, what modules of the program hold, streams. Only
    the shared modules stay as they are: taking them apart too would have their memory copied, and takes 0.1 to
    0.3 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for name in sys.modules.keys() - shared:
        del sys.modules[name]
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError as error:  # the stream's reader has gone, or the disk is full
            status = 120
            with contextlib.suppress(OSError):
                sys.stderr.write(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}\n")
    libc = ctypes.PyDLL(None)  # keeps the GIL, so that no other thread runs any more
    libc.fflush(None)
    libc.exit(status)
    raise AssertionError("it has ended")


def _set_title(arguments: list[str]) -> None:
    """Set the command line that `ps` and /proc/PID/cmdline show, cut to the room that there is."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    title = b"\0".join(map(os.fsencode, arguments))[: end - begin - 1]
    ctypes.memmove(begin, title.ljust(end - begin, b"\0"), end - begin)


def _run(arguments: list[str], is_safe: bool) -> None:
    """Run what the interpreter would run with these arguments."""
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        sys.path[:0] = [] if is_safe else [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[:0] = [] if is_safe else [""]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [what, *rest]
        sys.path[:0] = [] if is_safe else [str(Path(what).resolve().parent)]
        runpy.run_path(what, run_name="__main__")


def _preload() -> None:
    """Import the modules of PRELOADED that are installed: the environment of one package alone has neither the others
    nor transformers."""
    for module in PRELOADED:
        if importlib.util.find_spec(module.partition(".")[0]) and importlib.util.find_spec(module):
            importlib.import_module(module)
    for module in LOADED_AGAIN:
        package, _, name = module.rpartition(".")
        if importlib.util.find_spec(package):
            importlib.import_module(module)
            delattr(sys.modules[package], name)
            del sys.modules[module]
    if importlib.util.find_spec("transformers"):  # this attribute imports what commands need to read tokenizers
        _ = importlib.import_module("transformers").PreTrainedTokenizerFast


def _end_without_finalizers() -> None:
    """Switch off the finalizers of what has been loaded. torch has thousands: at the end of a fork they take three
    times as long as its beginning, and only take apart what all forks share."""
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        each.atexit = False


def _take_huge_pages() -> None:
    """Put what has been loaded into huge pages. Otherwise a fork copies the tables of 300 MB in 4 KB pages, and takes
    twice the time."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, access, _, _, inode, *_ = line.split()
        if access == "rw-p" and inode == "0":
            begin, end = (int(address, 16) // HUGE_PAGE * HUGE_PAGE for address in place.split("-"))
            for page in range(begin + HUGE_PAGE, end, HUGE_PAGE):
                libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE)


def main() -> NoReturn:
    """Run `python -m hbserve_testing.forkserver DESCRIPTOR TITLE`."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    _preload()
    _set_title([TITLE])
    gc.collect()
    _end_without_finalizers()
    _take_huge_pages()
    gc.freeze()  # otherwise each fork would copy all pages that its garbage collector looks through
    connection.send(b"ready")
    begin(*_serve(connection))


if __name__ == "__main__":
    from hbserve_testing import forkserver

    forkserver.main()
