"""What a device's limits are counted from."""

from itertools import count

import pytest
import torch

from hbserve_core.bench import device_limits
from hbserve_core.bench.device_limits import DeviceLimits, measure_limits

pytestmark = pytest.mark.usefixtures("little_to_measure")


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_limit_is_what_was_read_copied_or_multiplied_by_the_time_of_one_call(at_once, monkeypatch):
    monkeypatch.setitem(device_limits._READS_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(device_limits, "perf_counter", count().__next__)  # whatever is timed takes a second
    limits = measure_limits(torch.device("cpu"), torch.float32)
    memory_bytes, size = device_limits._MEMORY_BYTES["cpu"], device_limits._MATRIX_SIZE["cpu"]
    reads_of_all_memory = at_once * memory_bytes
    half_is_read_and_half_is_written = memory_bytes
    assert limits == DeviceLimits(reads_of_all_memory, half_is_read_and_half_is_written, 2 * size**3)
    read = {1: "0.004194", 4: "0.01678"}[at_once]
    assert str(limits) == f"reads {read} GB/s, copies 0.004194 GB/s (read and written), products 4.19e-06 TFLOP/s"
    two_ranks = measure_limits(torch.device("cpu"), torch.float32, 2)
    assert two_ranks == limits, "ranks on a CPU share its limits"


def test_a_cpu_really_is_measured():
    limits = measure_limits(torch.device("cpu"), torch.float32)
    assert 1e8 < limits.read_bytes_per_s < 1e13
    assert 1e8 < limits.copy_bytes_per_s < 1e13
