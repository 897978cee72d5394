"""The pool: block-major, sized as told or from free memory."""

from dataclasses import replace

import pytest
import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import InvalidInstanceConfig, NotEnoughMemory
from hbserve_core.model import kv_pool
from hbserve_core.model.kv_pool import BlockShape, allocate_pool, choose_num_blocks, kv_dtype
from hbserve_kv import KVTransferConfig

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


@pytest.mark.parametrize(
    ("available", "num_ranks", "budget"), [(8 << 30, 1, 1 << 30), (8 << 30, 2, 1 << 29), (1 << 40, 1, 4 << 30)]
)
def test_ranks_share_an_eighth_of_what_is_free_on_a_cpu_and_no_more_than_4_gib(
    monkeypatch, available, num_ranks, budget
):
    monkeypatch.setattr(kv_pool, "available_memory", lambda: available)
    num_blocks = choose_num_blocks(config(tensor_parallel_size=num_ranks), BLOCK, 1 << 20, CPU)
    assert num_blocks == budget // BLOCK.block_bytes


def test_a_pool_of_one_block_is_one_and_of_less_than_the_longest_sequence_is_warned_of(caplog):
    settings = config(max_num_seqs=1, block_size=16)
    assert choose_num_blocks(settings, BLOCK, 16, CPU) == 1
    assert "max_model_len" not in caplog.text
    num_blocks = choose_num_blocks(settings, BLOCK, 1 << 40, CPU)
    assert f"holds {num_blocks * 16} tokens, fewer than max_model_len={1 << 40}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, 72 - 10),
        ({"role": "prefill", "kv_transfer": KVTransferConfig(buffer_size=3 << 30)}, 72 - 10 - 3),
        ({"kv_transfer": KVTransferConfig(buffer_size=3 << 30)}, 72 - 10),
        ({"num_on_gpu": 2}, 36 - 4 - 1),
        ({"num_on_gpu": 2, "role": "decode", "kv_transfer": KVTransferConfig(buffer_size=3 << 30)}, 36 - 4 - 1 - 3),
        ({"num_local_instances": 2}, 72 - 10),
        ({"num_local_instances": 3}, 36 - 4 - 1),
        ({"num_local_instances": 2, "tensor_parallel_size": 2}, 36 - 4 - 1),
        ({"num_local_instances": 3, "num_on_gpu": 1}, 72 - 10),
    ],
)
def test_instances_of_one_gpu_share_it_and_leave_room_for_the_forward_pass(monkeypatch, changes, taken):
    """On a host with two GPUs of 80 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = config(gpu_memory_utilization=0.9, **changes)
    num_blocks = choose_num_blocks(settings, BLOCK, 1 << 40, torch.device("cuda"), reserved_bytes=2 << 30)
    assert num_blocks == ((taken - 2) << 30) // BLOCK.block_bytes


@pytest.mark.parametrize(("capability", "has_them"), [((8, 9), True), ((9, 0), True), ((8, 6), False), ((7, 5), False)])
def test_a_gpu_without_8_bit_floats_is_named_where_they_are_wanted(monkeypatch, capability, has_them):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    device = torch.device("cuda")
    assert kv_dtype(config(), torch.bfloat16, device) == torch.bfloat16
    narrow = config(kv_cache_dtype="fp8")
    assert kv_dtype(narrow, torch.bfloat16, CPU) == torch.float8_e4m3fn
    if has_them:
        assert kv_dtype(narrow, torch.bfloat16, device) == torch.float8_e4m3fn
    else:
        major, minor = capability
        with pytest.raises(InvalidInstanceConfig, match=rf"Some GPU has compute capability {major}\.{minor}, .* 8\.9"):
            kv_dtype(narrow, torch.bfloat16, device)


def test_a_block_larger_than_memory_is_refused_with_the_remedy():
    huge = BlockShape(num_layers=1 << 20, block_size=16, num_kv_heads=64, head_dim=256, dtype=torch.float32)
    with pytest.raises(NotEnoughMemory, match=r"one block takes .* MiB; free memory"):
        choose_num_blocks(config(), huge, 4096, CPU)


@pytest.mark.parametrize(
    ("free", "left"), [pytest.param(75 << 20, 1, id="less than a block"), pytest.param(70 << 20, 0, id="nothing")]
)
def test_what_is_left_for_a_block_is_said(monkeypatch, free, left):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 << 20))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    block = replace(BLOCK, num_layers=3 << 9)
    with pytest.raises(NotEnoughMemory, match=rf"on cuda: {left} MiB are left and one block takes 1\.5 MiB"):
        choose_num_blocks(config(gpu_memory_utilization=0.95), block, 64, torch.device("cuda"), reserved_bytes=70 << 20)


def test_a_pool_that_cannot_be_had_is_refused_with_its_size():
    size = r"num_blocks=1000000000000000: a KV pool of 2861022949\.2 GiB does not fit on cpu \(this host has .* GiB\);"
    with pytest.raises(NotEnoughMemory, match=size):
        allocate_pool(10**15, BLOCK, CPU)


@pytest.mark.parametrize("num_blocks", [0, -3])
def test_a_number_of_blocks_below_one_is_refused(num_blocks):
    with pytest.raises(InvalidInstanceConfig, match=f"num_blocks={num_blocks}: expected"):
        choose_num_blocks(config(num_blocks=num_blocks), BLOCK, 64, CPU)
