"""Properties of this host on which a deployment depends: clock, limits, shared memory, GPUs, and how NCCL reaches other
hosts.

Nothing here imports torch or makes a CUDA context, so a check beside a running deployment takes nothing from it.
"""

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hbserve.check.finding import Finding
from hbserve.processes.launcher import local_instances, num_ranks
from hbserve_rpc import own_process
from hbserve_rpc.address import is_here
from hbserve_scheduler import DeploymentConfig, InstanceSection

FEW_FILES = 4096
UNSYNCHRONISED = 5
"""TIME_ERROR of adjtimex(2)."""
WANTED_CLOCK_ERROR_US = 10_000
"""A timeline of several hosts shows hand-overs, which take only a few milliseconds."""
SMALL_SHM_BYTES = 1 << 30
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")
QUERY = ["nvidia-smi", "--query-gpu=index,name,memory.free,memory.total", "--format=csv,noheader,nounits"]
QUERY_TIMEOUT_S = 20.0


def check_host(config: DeploymentConfig) -> Iterator[Finding]:
    """Findings about this host. Shared memory, GPUs and NCCL are included only if instances of the file are here."""
    yield _clock()
    yield from _limits()
    instances = local_instances(config)
    if not instances:
        return
    yield _shared_memory(config)
    gpus = list_gpus()
    yield from _gpu_memory(config, instances, gpus)
    if config.kv_transfer.backend in ("nccl", "auto") or max(num_ranks(config, each) for each in instances) > 1:
        yield _nccl_path(config, bool(gpus))


class _Timex(ctypes.Structure):
    """The beginning of struct timex of adjtimex(2), with room for the rest."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("rest", ctypes.c_char * 512),
    ]


def _clock() -> Finding:
    """Whether the clock is synchronised. Deadlines use the monotonic clock, but timelines and logs of several hosts use
    each host's own clock."""
    timex = _Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    if state < 0:
        return Finding("note", "clock", f"not known whether it is synchronised: {os.strerror(ctypes.get_errno())}")
    if state == UNSYNCHRONISED or timex.maxerror > 10**6 * 16:
        text = "not synchronised (chrony, ntpd): logs and timelines of several hosts will not fit together"
        return Finding("note", "clock", text)
    error_ms = timex.maxerror / 1000
    text = f"synchronised to within {error_ms:.1f} ms"
    if timex.maxerror > WANTED_CLOCK_ERROR_US:
        return Finding("note", "clock", f"{text}: timelines of several hosts are no better than that")
    return Finding("ok", "clock", text)


def _limits() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = own_process.MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, own_process.MOST_FILES)
    text = f"{number}, one for each client and peer"
    yield Finding("note" if number < FEW_FILES else "ok", "open files", text + (": few" if number < FEW_FILES else ""))
    if INFINIBAND.is_dir():
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        unlimited = soft == resource.RLIM_INFINITY
        text = "unlimited" if unlimited else f"{soft >> 20} MiB: RDMA locks whole pools; set `ulimit -l unlimited`"
        yield Finding("ok" if unlimited else "note", "locked memory", text)


def _shared_memory(config: DeploymentConfig) -> Finding:
    """Room in shared memory, which holds the pools of `ipc` on a CPU and the messages between ranks of one host."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        return Finding("note", "shared memory", f"{SHARED_MEMORY}: {error.strerror}")
    text = f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}"
    if free < SMALL_SHM_BYTES:
        text += "; a container has 64 MiB unless it is given more: docker run --shm-size, or a volume in memory"
        return Finding("note", "shared memory", text)
    return Finding("ok", "shared memory", text)


@dataclass(frozen=True)
class Gpu:
    """One GPU of this host, as the driver reports it."""

    index: int
    name: str
    free_bytes: int
    total_bytes: int


def list_gpus() -> list[Gpu]:
    """All GPUs that the driver knows; none if there is no driver."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in done.stdout.splitlines():
        index, name, free, total = (word.strip() for word in line.split(","))
        if free.isdecimal() and total.isdecimal():  # parts of a divided card report "[N/A]"
            gpus.append(Gpu(int(index), name, int(free) << 20, int(total) << 20))
    return gpus


def _gpu_memory(config: DeploymentConfig, instances: list[InstanceSection], gpus: list[Gpu]) -> Iterator[Finding]:
    settings = config.engine_settings()
    if settings.device == "cpu" or (settings.device == "auto" and not gpus):
        text = "none is used" if gpus else "nvidia-smi shows none"
        yield Finding("ok", "GPU", f"{text}: instances compute on the CPU")
        return
    share = settings.gpu_memory_utilization
    for gpu in gpus:
        free = f"{gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free"
        is_short = gpu.free_bytes < gpu.total_bytes * share
        subject = f"GPU {gpu.index}"
        users = [each.instance_id for each in instances if _may_use(config, each, gpu.index)]
        if not users:
            yield Finding("ok", subject, f"{gpu.name}, {free}; not used by this deployment")
        elif is_short:
            text = f"{gpu.name}, {free}; {', '.join(users)} would take {share:.0%}: other programs on it must end, "
            yield Finding("FAIL", subject, text + "or engine.gpu_memory_utilization be lower")
        else:
            yield Finding("ok", subject, f"{gpu.name}, {free}, for {', '.join(users)}")
    for each in instances:
        last = (each.gpu_id or 0) + num_ranks(config, each) - 1
        if last >= len(gpus):
            yield Finding("FAIL", each.instance_id, f"needs GPU {last}; this host has {len(gpus)}")


def _may_use(config: DeploymentConfig, instance: InstanceSection, index: int) -> bool:
    """Whether an instance may use a GPU. Without `gpu_id` it may be any."""
    first = instance.gpu_id
    return first is None or first <= index < first + num_ranks(config, instance)


def _nccl_path(config: DeploymentConfig, on_gpu: bool) -> Finding:
    """Say what carries KV between hosts with the backend nccl, by NCCL's own choice."""
    if not on_gpu:
        return Finding("ok", "NCCL", "not used: without GPUs the backend nccl is Gloo, over TCP")
    if all(is_here(each.host) for each in config.gpu_instances):
        return Finding("ok", "NCCL", "all instances are on this host: NVLink or PCIe (nvidia-smi topo -m shows which)")
    chosen = os.environ.get("NCCL_SOCKET_IFNAME")
    over_tcp = (
        f"TCP over {chosen}"
        if chosen
        else "TCP over the interface of kv_transfer.ip (NCCL_SOCKET_IFNAME names another)"
    )
    if os.environ.get("NCCL_IB_DISABLE") == "1":
        return Finding("note", "NCCL", f"{over_tcp}: NCCL_IB_DISABLE=1")
    ports = active_infiniband_ports()
    if not ports:
        return Finding("note", "NCCL", f"{over_tcp}: no active InfiniBand or RoCE port here")
    direct = Path("/sys/module/nvidia_peermem").is_dir()
    text = f"RDMA over {', '.join(ports)}, {'straight from GPU memory' if direct else 'through the host'}"
    return Finding(
        "ok" if direct else "note", "NCCL", text if direct else f"{text}: the module nvidia_peermem is not loaded"
    )


def active_infiniband_ports() -> list[str]:
    """Ports of InfiniBand or RoCE cards that have a link, such as mlx5_0:1."""
    states = sorted(INFINIBAND.glob("*/ports/*/state"))
    return [f"{path.parts[-4]}:{path.parts[-2]}" for path in states if "ACTIVE" in path.read_text(encoding="ascii")]
