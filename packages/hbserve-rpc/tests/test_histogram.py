import random

import msgspec
import pytest

from hbserve_rpc.counts import Histogram


def test_a_value_counts_for_the_smallest_bound_that_it_does_not_exceed():
    histogram = Histogram.over([1, 2.5, 10])
    for value in (0, 1, 1.0001, 2.5, 10, 11, 1e9):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1, 2]
    assert histogram.total == pytest.approx(1e9 + 25.5001)


def test_many_values_at_once_count_as_one_after_the_other():
    one_by_one, at_once = Histogram.over([1, 2, 3, 5]), Histogram.over([1, 2, 3, 5])
    for size in (0, 1, 2, 300):
        values = [random.choice([0.5, 1, 1.5, 2, 4, 5, 6]) for _ in range(size)]
        for value in values:
            one_by_one.observe(value)
        at_once.observe_all(iter(values))
        assert (at_once.counts, at_once.total) == (one_by_one.counts, pytest.approx(one_by_one.total))


def test_a_sum_over_processes_is_what_one_process_would_have_counted():
    together, parts = Histogram.over([1, 2, 3]), [Histogram.over([1, 2, 3]) for _ in range(3)]
    for _ in range(1000):
        value = random.uniform(0, 4)
        together.observe(value)
        random.choice(parts).observe(value)
    crossed = [msgspec.msgpack.decode(msgspec.msgpack.encode(each), type=Histogram) for each in parts]
    summed = crossed[0] + crossed[1] + crossed[2]
    assert (summed.bounds, summed.counts) == (together.bounds, together.counts)
    assert summed.total == pytest.approx(together.total)
    with pytest.raises(ValueError, match=r"over \[1, 2, 3\] and over \[1, 2\]"):
        together + Histogram.over([1, 2])
