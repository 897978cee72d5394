"""The number of threads that make sense on this host. A container may see 64 cores, but get the time of only 2."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Return the least of: the cores that this process may run on, the processor time of its control group, rounded
    down, and OMP_NUM_THREADS. At least 1. With more threads than that, each waits for the others."""
    limits = [len(os.sched_getaffinity(0)), _quota(), _wanted()]
    return max(1, min(limit for limit in limits if limit is not None))


def _quota() -> int | None:
    """Return the number of cores whose time the control group (version 2 or 1) grants. None: it has no limit."""
    words = _read(CGROUP / "cpu.max").split()
    if not words:
        words = [_read(CGROUP / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = (int(word) if word.isdecimal() else 0 for word in words)  # "max" and "-1": no limit
    return quota // period if quota and period else None


def _wanted() -> int | None:
    """Return the first number of OMP_NUM_THREADS, which is for the outermost level. None: there is none."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and int(first) else None


def _read(path: Path) -> str:
    """Return the content of a file that only some systems have; empty elsewhere."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
