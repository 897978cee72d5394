"""For every test of the workspace: models, small random ones made here and the demo model; ports and networks; the end
of a load."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from hbserve_testing.small_models import write_small_model
from hbserve_testing.warm_starts import WarmStarts

# Models here are too small for a second thread, which would only take the processor from other processes. Inherited.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where nothing may be kept of what is compiled, as in many containers, every process that a test starts compiles the
# sources of torch and transformers anew, which takes longer than all else that it does. Here it may. Inherited.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Started in the background of a script, or by something that ignores SIGINT, pytest would ignore it too, and so would
# every process that a test starts: tests of Ctrl-C would wait for nothing. So it is as if started from a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine takes long over an example, and over making one; that says nothing of what is tested. Examples are the
# same in every run, so that who changes one thing hears of no other; --hypothesis-profile default looks for new ones.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize=True, database=None
)
hypothesis.settings.load_profile("busy")


class Mishaps(logging.Handler):
    """What asyncio says of exceptions that callbacks of an event loop, or a protocol, have raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(("Exception in callback", "Fatal")):
            self.told.append(self.format(record))


@pytest.fixture(autouse=True)
def no_exception_in_a_callback() -> Iterator[None]:
    """asyncio only logs it: a message that is lost by one would often be missed by no test."""
    mishaps, logger = Mishaps(), logging.getLogger("asyncio")
    logger.addHandler(mishaps)
    yield
    logger.removeHandler(mishaps)
    assert not mishaps.told, "\n".join(mishaps.told)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random float32 model by architecture: qwen3, qwen2, llama, gemma3 or qwen3-moe. Token 2 ends a
    sequence."""

    @cache
    def folder(architecture: str) -> Path:
        path = tmp_path_factory.mktemp(architecture)
        write_small_model(path, architecture)
        assert json.loads((path / "config.json").read_text())["architectures"]
        return path

    return folder


@pytest.fixture(scope="session")
def model_with_a_nan(small_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the llama model, but token 100 is a NaN to it: what follows that has no logits."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(small_model("llama"), tmp_path_factory.mktemp("nan") / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][100] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """So many ports that nobody listens at, and that the system gives to nobody who asks for any.

    Linux takes those from 32768 on, Mooncake its own from 15000 to 17000.
    """

    def find(count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            with socket.socket() as trying, contextlib.suppress(OSError):
                port = random.SystemRandom().randrange(18000, 32000)
                trying.bind(("127.0.0.1", port))
                found += [port] if port not in found else []
        return found

    return find


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


class Network:
    """Hosts that see each other and nothing else: network namespaces, joined by a bridge in one of their own."""

    def __init__(self, addresses: Mapping[str, str], stack: contextlib.ExitStack) -> None:
        self._prefix = f"hb{os.getpid()}"
        self._stack = stack
        self._ports = {host: f"port{number}" for number, host in enumerate(addresses)}
        for host in ("switch", *addresses):
            _ip("netns", "add", self.namespace(host))
            stack.callback(_ip, "netns", "del", self.namespace(host))
        switch = self.namespace("switch")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host, address in addresses.items():
            name, port = self.namespace(host), self._ports[host]
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            self.mend(host)

    def namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def add_address(self, host: str, address: str) -> None:
        _ip("-n", self.namespace(host), "addr", "add", f"{address}/24", "dev", "eth0")

    def resolve_names(self, host: str, lines: str, file: str = "resolv.conf") -> None:
        """What `ip netns exec` starts on this host has these lines as its /etc/resolv.conf, or as its /etc/hosts; the
        test is skipped where that cannot be."""
        folder = Path("/etc/netns") / self.namespace(host)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            pytest.skip(f"no resolv.conf of a namespace's own here: {error}")
        self._stack.callback(self._forget_names, folder)
        (folder / file).write_text(lines)

    @staticmethod
    def _forget_names(folder: Path) -> None:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # of others too
            folder.parent.rmdir()

    def slow_down(self, host: str, kbit_per_s: int) -> None:
        """What is sent to it comes no faster than this; the test is skipped where that cannot be."""
        place = ("-n", self.namespace("switch"), "qdisc", "replace", "dev", self._ports[host], "root")
        try:
            _run("tc", *place, "tbf", "rate", f"{kbit_per_s}kbit", "burst", "4kb", "latency", "30s")
        except FileNotFoundError:
            pytest.skip("the `tc` command is missing (apt-get install iproute2)")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no link can be slowed down here: {error.stderr.strip()}")

    def cut(self, host: str) -> None:
        """What it sends and what is sent to it is lost from now on, and nobody is told."""
        _ip("-n", self.namespace("switch"), "link", "set", self._ports[host], "nomaster")

    def mend(self, host: str) -> None:
        _ip("-n", self.namespace("switch"), "link", "set", self._ports[host], "master", "bridge")


def _why_no_namespaces() -> str:
    """Empty if this machine lets us make network namespaces."""
    probe = f"hb{os.getpid()}probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except FileNotFoundError:
        return "the `ip` command is missing (apt-get install iproute2)"
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


@pytest.fixture
def make_network() -> Iterator[Callable[[Mapping[str, str]], Network]]:
    """A network of hosts by name and address, all in one /24; the test is skipped where there can be none."""
    if reason := _why_no_namespaces():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield lambda addresses: Network(addresses, stack)


Stats = dict[str, Any]


def _leftovers(stats: Stats) -> dict[str, int]:
    """What is not zero although nothing runs, by gauge and instance."""
    scheduler = stats["cpu_scheduler"]
    found = {gauge: scheduler[gauge] for gauge in ("waiting_requests", "running_requests")}
    for instance_id, instance in stats["gpu_instances"].items():
        found[f"{instance_id}: blocks held"] = instance["num_blocks"] - instance["free_blocks"]
        for gauge in ("active_requests", "active_transfers", "buffered_bytes", "quarantined_blocks"):
            found[f"{instance_id}: {gauge}"] = instance[gauge]
    return {name: value for name, value in found.items() if value}


@pytest.fixture(scope="session")
def until_empty() -> Callable[[Any], Awaitable[Stats]]:
    """Wait until all instances of a DisaggregatedLLM answer and hold nothing; returns its stats then.

    A wait, because an instance says the last token of a request before it gives the blocks back.
    """

    async def wait(llm: Any) -> Stats:
        stats: Stats = await llm.refresh_system_stats()
        try:
            async with asyncio.timeout(60):
                while _leftovers(stats) or any(i["status"] != "ready" for i in stats["gpu_instances"].values()):
                    await asyncio.sleep(0.05)
                    stats = await llm.refresh_system_stats()
        except TimeoutError:
            pytest.fail(f"not empty: {_leftovers(stats)}")
        return stats

    return wait


WARM_STARTS = WarmStarts.of_this_process()


def pytest_configure() -> None:
    WARM_STARTS.install()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Workers of all tests are warm, too: each would import torch, and again for a forkserver of its own. Of a few, it
    is not known that they need it."""
    WARM_STARTS.switch(config.args_source is pytest.Config.ArgsSource.TESTPATHS)


def pytest_unconfigure() -> None:
    WARM_STARTS.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why a test was run again, and what it printed: pytest-rerunfailures tells only its name if it then passed."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"run again: {report.nodeid}, {report.when}")
        for text in (report.longreprtext, report.caplog, report.capstdout, report.capstderr):
            terminalreporter.line(text)


def pytest_collection_finish() -> None:
    """A million objects of imported modules stay: the garbage collector need not look through them again each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """With it, what its fixtures start: those of a module are set up in its first test."""
    WARM_STARTS.switch("warm" in item.keywords and "cold" not in item.keywords)
    return (yield)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as trying:
            trying.bind(("::1", 0))
    except OSError:
        return False
    return True


LONGEST = (
    "test_peer_deaths.py", "test_surroundings.py", "test_kernels.py", "test_vanishing_hosts.py", "test_triton_path.py",
    "test_pd_instances.py", "test_pd_deaths.py", "test_chunk_sizes.py", "test_pd_tokens.py", "test_vllm_deaths.py",
    "test_benchmarks.py", "test_processes.py", "test_hosts.py", "test_serve_http.py",
)  # fmt: skip
"""Files of over 17 s, the longest first: one that a worker began last would leave the others idle. Those that wait, for
hosts and processes, stand between those that compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first. Tests that need what this machine lacks are skipped, and say so; nobody looks for what
    no test needs."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for marker, is_there, lacking in (("gpu", _has_gpu, "no CUDA device"), ("ipv6", _has_ipv6, "no IPv6")):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=lacking))
