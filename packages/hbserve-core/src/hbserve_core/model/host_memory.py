"""Memory of this host: how much there is, how much a process can still get, and how much weights take. Does not import
torch."""

import resource
from math import prod
from pathlib import Path

from hbserve_core.errors import NotEnoughMemory
from hbserve_core.model.checkpoint_shapes import checkpoint_shapes
from hbserve_core.model.model_config import ModelConfig

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
_UNLIMITED = 1 << 60


def require_room(model: ModelConfig, dtype: str, num_copies: int) -> None:
    """Check that the host has memory for `num_copies` of the weights, one for each instance that computes on its CPU.

    Raises:
        NotEnoughMemory: the message says how much they need, and how much is available.
    """
    needed, available = num_copies * weight_bytes(model, dtype), available_memory()
    if needed <= available:
        return
    of_whom = f"{num_copies} times its weights, one for each instance, need" if num_copies > 1 else "its weights need"
    raise NotEnoughMemory(
        f"{model.path}: {of_whom} {needed / 2**30:.1f} GiB of this host's memory, of which {available / 2**30:.1f} GiB "
        "are available; take a smaller model" + (", or fewer instances" if num_copies > 1 else "")
    )


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Return the bytes of the weights on the CPU, where quantised weights are widened. dtype: as in the settings,
    "auto" included."""
    name = model.dtype_name if dtype == "auto" else dtype
    return (4 if name == "float32" else 2) * sum(map(prod, checkpoint_shapes(model).values()))


def total_memory() -> int:
    """Return the bytes of memory that the host has, including swap, or that its control group allows, if that is
    less."""
    return min(_meminfo("MemTotal") + _meminfo("SwapTotal"), _limit_of_group())


def available_memory() -> int:
    """Return the bytes that can still be allocated, by the limits of the host, the control group and this process's
    address space."""
    found = [_meminfo("MemAvailable") + _meminfo("SwapFree"), max(0, _limit_of_group() - _used_by_group())]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        pages = int(_read(Path("/proc/self/statm")).split()[0])
        found.append(max(0, most - pages * resource.getpagesize()))
    return min(found)


def _meminfo(name: str) -> int:
    for line in _read(MEMINFO).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _of_group(of_version_2: str, of_version_1: str) -> str:
    """Return the content of a control group's file, at the place where a container sees it."""
    return (_read(CGROUP / of_version_2) or _read(CGROUP / "memory" / of_version_1)).strip()


def _limit_of_group() -> int:
    limit = _of_group("memory.max", "memory.limit_in_bytes")
    return int(limit) if limit.isdecimal() else _UNLIMITED


def _used_by_group() -> int:
    used = _of_group("memory.current", "memory.usage_in_bytes")
    # Pages of files count as used, but are freed when memory is needed.
    lines = [line.split() for line in _of_group("memory.stat", "memory.stat").splitlines()]
    reclaimable = [int(words[1]) for words in lines if words[0] in ("inactive_file", "active_file")]
    return (int(used) if used.isdecimal() else 0) - sum(reclaimable)


def _read(path: Path) -> str:
    """Return the content of a file that only some systems have, or "" elsewhere."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
