"""Pools that nobody means: refused by what is wrong with them, in one line; and pools of very small blocks."""

import ctypes
import tracemalloc

import pytest
import torch

from hbserve_kv import PoolLayout
from hbserve_kv.memory.memory import Memory

AXES = "blocks tokens heads dim"


BLOCKS = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("tensors", "axes", "message"),
    [
        (torch.zeros(200).as_strided((2, 5, 1, 4), (50, 2, 4, 1)), AXES, "each number in a place of its own"),
        (BLOCKS[:1].expand(4, 3, 4, 5), AXES, "each number in a place of its own"),
        (memoryview(bytearray(8))[::-1], "blocks", "in order"),
        (BLOCKS[:0], AXES, "not empty"),
        (memoryview(bytes(8)), "blocks", "read-only memoryview"),
        ((ctypes.py_object * 8)(), "blocks", "expected numbers, got references to objects"),
        ([[BLOCKS], []], AXES, r"layers of \[1, 0\] tensors"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_by_what_is_wrong(tensors, axes, message):
    with pytest.raises((TypeError, ValueError), match=message) as refusal:
        PoolLayout(tensors, axes)
    assert "\n" not in str(refusal.value)


def test_tensors_of_other_numbers_of_keys_and_values_are_refused():
    with pytest.raises(ValueError, match="tensors of 2 and of 1 kv"):
        PoolLayout([torch.zeros(2, 8, 4), torch.zeros(1, 8, 4)], "kv blocks dim")


@pytest.mark.parametrize("axes", ["blocks tokens heads dim", "blocks heads tokens dim"])
def test_any_order_of_dimensions_and_steps_between_them_are_no_overlap(axes):
    whole = torch.zeros(6, 4, 8, 16, dtype=torch.float16)
    assert PoolLayout(whole[::2, 1:3, ::4], axes).layout.num_blocks == 3
    assert PoolLayout(whole.permute(2, 0, 1, 3), axes).layout.num_blocks == 8


def test_a_lookup_buffer_of_a_billion_blocks_costs_what_is_used_of_it():
    tracemalloc.start()
    memory = Memory(memoryview(bytearray(64)).cast("B", (64, 1)), 1 << 30)
    taken = memory.allocate(3)
    memory.free(taken[:2])
    assert sorted(memory.allocate(3)) == [0, 1, 3]
    assert (memory.num_free, memory.buffered_bytes) == ((1 << 30) - 4, 4)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    memory.release()
    tracemalloc.stop()
