"""Rates at which a device reads memory, copies it and multiplies, measured on the device itself."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

_REPEATS = 5
_MEMORY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
"""Bytes of memory to read and copy: many times the size of a device's cache."""
_READS_AT_ONCE = {"cuda": 4, "cpu": 1}
"""Number of reads that are queued together, so that no launch is counted; a CPU has none."""
_MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class DeviceLimits:
    """Rates of all devices among which a model is split, together."""

    read_bytes_per_s: float
    """Rate of a reduction, which reads, and writes next to nothing."""
    copy_bytes_per_s: float
    """Rate of a copy, bytes read and bytes written together."""
    flops_per_s: float
    """Rate of a large product of matrices of the model's dtype."""

    def __str__(self) -> str:
        return (
            f"reads {self.read_bytes_per_s / 1e9:.4g} GB/s, copies {self.copy_bytes_per_s / 1e9:.4g} GB/s (read and "
            f"written), products {self.flops_per_s / 1e12:.3g} TFLOP/s"
        )


def measure_limits(device: torch.device, dtype: torch.dtype, num_ranks: int = 1) -> DeviceLimits:
    """Measure the best of several reads, copies and products on `device`, which nothing else should use meanwhile.

    Each rank has a GPU of its own, so the limits are `num_ranks` times as high. On a CPU they share the one there is.
    """
    memory = torch.ones(_MEMORY_BYTES[device.type], dtype=torch.uint8, device=device)
    reading = min(_time_of(read, device, _READS_AT_ONCE[device.type]) for read in _ways_to_read(memory))
    target, source = memory.chunk(2)
    copying = _time_of(lambda: target.copy_(source), device)
    size = _MATRIX_SIZE[device.type]
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    multiplying = _time_of(lambda: matrix @ matrix, device)
    num_devices = num_ranks if device.type == "cuda" else 1
    return DeviceLimits(
        read_bytes_per_s=num_devices * len(memory) / reading,
        copy_bytes_per_s=num_devices * len(memory) / copying,
        flops_per_s=num_devices * 2 * size**3 / multiplying,
    )


def _ways_to_read(memory: torch.Tensor) -> list[Callable[[], object]]:
    """Return reductions of all of `memory`. Which of them is the fastest depends on the device and on torch's version,
    and some are far from what the device can do."""
    numbers = memory.view(torch.float32)
    rows = numbers.view(-1, 4096)
    vector = torch.ones(4096, device=memory.device)
    return [
        numbers.sum,
        numbers.amax,
        memory.view(torch.int32).amax,
        lambda: rows.sum(dim=1),
        lambda: rows.amax(dim=1),
        lambda: rows @ vector,
    ]


def _time_of(work: Callable[[], object], device: torch.device, at_once: int = 1) -> float:
    """Measure the seconds of one call: the best of several times, of `at_once` calls each."""

    def once() -> float:
        _wait_for(device)
        begin = perf_counter()
        for _ in range(at_once):
            work()
        _wait_for(device)
        return (perf_counter() - begin) / at_once

    return min(once() for _ in range(_REPEATS))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
