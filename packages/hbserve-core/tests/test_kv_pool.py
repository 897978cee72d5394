"""The pool: block-major, sized as told or from free memory."""

import pytest
import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import InvalidInstanceConfig, NotEnoughMemory
from hbserve_core.model.kv_pool import BlockShape, allocate_pool, choose_num_blocks

CPU = torch.device("cpu")
BLOCK = BlockShape(num_layers=3, block_size=16, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)


def config(**changes):
    return InstanceConfig(model_path="unused", **changes)


def test_one_block_is_one_contiguous_piece_with_all_layers():
    # Known elsewhere: vLLM #50913, #55434, #23780.
    pool = allocate_pool(5, BLOCK, CPU)
    assert pool.shape == (5, 3, 2, 16, 2, 8)
    assert all(pool[i].is_contiguous() for i in range(5))
    assert BLOCK.block_bytes == 3 * 2 * 16 * 2 * 8 * 2
    assert pool[1].data_ptr() - pool[0].data_ptr() == BLOCK.block_bytes == pool[0].nbytes


def test_an_explicit_number_of_blocks_wins():
    assert choose_num_blocks(config(num_blocks=7), BLOCK, 10**9, CPU) == 7


def test_no_more_blocks_than_the_engine_can_ever_use():
    assert choose_num_blocks(config(max_num_seqs=4, block_size=16), BLOCK, 33, CPU) == 4 * 3


def test_the_default_size_on_a_cpu_is_modest():
    num_blocks = choose_num_blocks(config(), BLOCK, 1 << 20, CPU)
    assert 0 < num_blocks * BLOCK.block_bytes <= 4 << 30


def test_a_block_larger_than_memory_is_refused_with_the_remedy():
    huge = BlockShape(num_layers=1 << 20, block_size=16, num_kv_heads=64, head_dim=256, dtype=torch.float32)
    with pytest.raises(NotEnoughMemory, match=r"one block takes .* MiB; free memory"):
        choose_num_blocks(config(), huge, 4096, CPU)


def test_a_pool_that_cannot_be_had_is_refused_with_its_size():
    with pytest.raises(NotEnoughMemory, match=r"num_blocks=1000000000000000: a KV pool of .* GiB does not fit on cpu"):
        allocate_pool(10**15, BLOCK, CPU)


@pytest.mark.parametrize("num_blocks", [0, -3])
def test_a_number_of_blocks_below_one_is_refused(num_blocks):
    with pytest.raises(InvalidInstanceConfig, match=f"num_blocks={num_blocks}: expected"):
        choose_num_blocks(config(num_blocks=num_blocks), BLOCK, 64, CPU)
