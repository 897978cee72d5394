"""Memory that is no pool is refused by what is wrong with it, before a byte can land where it does not belong."""

import random
from itertools import product

import pytest
import torch

from hbserve_kv import PoolLayout
from hbserve_kv.memory.arrays import as_array, have_common_bytes

np = pytest.importorskip("numpy", reason="torch needs no numpy")

MEMORY = torch.zeros(4096)


def strided(shape, strides, offset=0):
    return torch.as_strided(MEMORY, shape, strides, offset)


class Described:
    """What only has `__dlpack__`."""

    def __init__(self, make):
        self.__dlpack__ = make


@pytest.mark.parametrize(
    ("tensors", "axes", "problem"),
    [
        (strided((4, 4, 4), (2, 4, 1)), "blocks tokens dim", "each number in a place of its own"),
        (strided((8, 16), (1, 1)), "blocks dim", "each number in a place of its own"),
        ([strided((4, 8), (8, 1))] * 2, "blocks dim", "lies in the same place as another one"),
        ([strided((4, 64), (64, 1)), strided((4, 64), (64, 1), 128)], "blocks dim", "in the same place as another"),
        ([strided((4, 8), (16, 1)), strided((4, 8), (16, 1), 7)], "blocks dim", "in the same place as another one"),
        (torch.empty(4, 8, device="meta"), "blocks dim", "memory of the CPU or of a CUDA device, got one on meta"),
        (torch.zeros(4, 8).to_sparse(), "blocks dim", "expected dense tensors, got one of torch.sparse_coo"),
        (np.array([[object()] * 4] * 4), "blocks dim", "expected numbers, got references to objects"),
        (np.zeros((4, 4), dtype=[("a", "f4"), ("b", "O")]), "blocks dim", "expected numbers, got references"),
        (np.zeros((4, 4), dtype="M8[s]"), "blocks dim", "ndarray cannot be exported by __dlpack__"),
        (Described(lambda: None), "blocks dim", "Described cannot be exported by __dlpack__"),
        (Described(lambda: 1 / 0), "blocks dim", "cannot be exported by __dlpack__: division by zero"),
        ([[]], "blocks dim", r"layers of \[0\] tensors: expected as many for each, one at least"),
        ([[torch.zeros(4, 8)], list(torch.zeros(3, 4, 8))], "blocks dim", r"layers of \[1, 3\] tensors"),
        (torch.zeros(4, 8), None, "axes=None: expected names in one string"),
        (torch.zeros(4, 2, 8), "blocks kv key+value", "'kv' or in 'key.value', not in both"),
    ],
)
def test_memory_that_is_no_pool_is_named(tensors, axes, problem):
    with pytest.raises((TypeError, ValueError), match=problem):
        PoolLayout(tensors, axes)


def test_tensors_may_take_turns_in_the_same_memory():
    whole = torch.zeros(5, 3, 2, 4, 8)  # blocks layers kv tokens dim
    layers = list(whole.unbind(1))
    assert len(PoolLayout(layers, "blocks kv tokens dim").extents) == 1
    assert len(PoolLayout([list(each.unbind(1)) for each in layers], "blocks tokens dim").extents) == 1
    turned = whole.permute(3, 1, 2, 0, 4).contiguous()  # tokens layers kv blocks dim
    assert len(PoolLayout(list(turned.unbind(1)), "tokens kv blocks dim").extents) == 1


def places(tensor):
    size = tensor.element_size()
    starts = (
        tensor.data_ptr() + size * sum(map(int.__mul__, at, tensor.stride()))
        for at in product(*(range(n) for n in tensor.shape))
    )
    return [start + byte for start in starts for byte in range(size)]


def test_whether_tensors_overlap_is_what_their_bytes_say():
    rng, seen = random.Random(5), set()
    for _ in range(3000):
        both = []
        for _ in range(2):
            shape = [rng.choice([1, 2, 3, 4]) for _ in range(3)]
            strides = rng.sample([1, 2, 3, 4, 8, 12, 16, 24, 32, 48], 3)
            both.append(strided(shape, strides, rng.randrange(60)))
        if any(len(set(places(each))) < len(places(each)) for each in both):
            continue
        arrays = []
        for each in both:
            try:
                arrays.append(as_array(each))
            except ValueError:  # in places of their own, but not one dimension inside the other
                break
        if len(arrays) == 2:
            expected = bool(set(places(both[0])) & set(places(both[1])))
            assert have_common_bytes(*arrays) == have_common_bytes(*reversed(arrays)) == expected
            seen.add(expected)
    assert seen == {True, False}
