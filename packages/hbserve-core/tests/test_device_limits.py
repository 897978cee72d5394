"""What a device's limits are counted from."""

from itertools import count

import pytest
import torch

from hbserve_core.bench import device_limits
from hbserve_core.bench.device_limits import DeviceLimits, measure_limits

MEMORY_BYTES, SIZE = 1 << 22, 128


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch):
    """The sizes that a device is measured with are many times its cache's, and take ten seconds of a busy core."""
    monkeypatch.setitem(device_limits._MEMORY_BYTES, "cpu", MEMORY_BYTES)
    monkeypatch.setitem(device_limits._MATRIX_SIZE, "cpu", SIZE)


def test_a_limit_is_what_was_read_copied_or_multiplied_by_the_time_of_one_call(monkeypatch):
    monkeypatch.setattr(device_limits, "perf_counter", count().__next__)  # whatever is timed takes a second
    limits = measure_limits(torch.device("cpu"), torch.float32)
    four_reads_of_all_memory = 4 * MEMORY_BYTES
    half_is_read_and_half_is_written = MEMORY_BYTES
    assert limits == DeviceLimits(four_reads_of_all_memory, half_is_read_and_half_is_written, 2 * SIZE**3)
    assert str(limits) == "reads 0.01678 GB/s, copies 0.004194 GB/s (read and written), products 4.19e-06 TFLOP/s"
    two_ranks = measure_limits(torch.device("cpu"), torch.float32, 2)
    assert two_ranks == limits, "ranks on a CPU share its limits"


def test_a_cpu_really_is_measured():
    limits = measure_limits(torch.device("cpu"), torch.float32)
    assert 1e8 < limits.read_bytes_per_s < 1e13
    assert 1e8 < limits.copy_bytes_per_s < 1e13
