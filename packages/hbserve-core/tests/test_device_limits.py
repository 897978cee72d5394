"""What a device's limits are counted from."""

from itertools import count

import torch

from hbserve_core.bench import device_limits
from hbserve_core.bench.device_limits import DeviceLimits, measure_limits


def test_a_limit_is_what_was_read_copied_or_multiplied_by_the_time_of_one_call(monkeypatch):
    monkeypatch.setattr(device_limits, "perf_counter", count().__next__)  # whatever is timed takes a second
    limits = measure_limits(torch.device("cpu"), torch.float32)
    four_reads_of_all_memory = 4 * (1 << 28)
    half_is_read_and_half_is_written = 1 << 28
    assert limits == DeviceLimits(four_reads_of_all_memory, half_is_read_and_half_is_written, 2 * 1024**3)
    assert str(limits) == "reads 1.074 GB/s, copies 0.2684 GB/s (read and written), products 0.00215 TFLOP/s"
    two_ranks = measure_limits(torch.device("cpu"), torch.float32, 2)
    assert two_ranks == limits, "ranks on a CPU share its limits"


def test_a_cpu_really_is_measured():
    limits = measure_limits(torch.device("cpu"), torch.float32)
    assert 1e8 < limits.read_bytes_per_s < 1e13
    assert 1e8 < limits.copy_bytes_per_s < 1e13
