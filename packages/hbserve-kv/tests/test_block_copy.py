"""The kernel that copies blocks on a GPU, beside memmove on the host; without a GPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hbserve_kv import HeadRange, PoolLayout
from hbserve_kv.memory.layout import CopyPlan, sides
from hbserve_kv.memory.memory import tensor_at
from hbserve_kv.testing.rig import LAYOUTS, Rig, of_layers

pytest.importorskip("triton", reason="torch has Triton on Linux only")
from hbserve_kv.memory.block_copy import copy_pieces

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def copy(source: PoolLayout, target: PoolLayout, given, wanted, heads=None, target_heads=None) -> CopyPlan:
    heads = heads or HeadRange(0, source.layout.num_heads, source.layout.num_heads)
    mine, theirs = sides(source.layout, heads, target.layout, target_heads or heads)
    here, there = ([extent.address for extent in each.extents] for each in (source, target))
    plan = CopyPlan(mine, here, theirs, there)
    copy_pieces(plan, tensor_at(here[0], 8, DEVICE), given, tensor_at(there[0], 8, DEVICE), wanted)
    return plan


@pytest.mark.parametrize("block_bytes", [8, 24, 4096 * 8, 4096 * 8 + 8, 3001], ids=str)
def test_blocks_land_where_they_should_and_no_other_byte_changes(block_bytes):
    generator = torch.Generator().manual_seed(0)
    source, target = (
        torch.randint(256, (count, block_bytes), dtype=torch.uint8, generator=generator).to(DEVICE) for count in (7, 9)
    )
    expected = target.clone()
    expected[[8, 0, 3]] = source[[2, 6, 5]]
    copy(PoolLayout.of_blocks(source, None), PoolLayout.of_blocks(target, None), [2, 6, 5], [8, 0, 3])
    assert torch.equal(target, expected)


@pytest.mark.parametrize("layouts", [("layer-major", "block-major"), ("heads first", "blocks last")], ids=" to ".join)
def test_every_piece_of_other_layouts_heads_and_block_sizes_lands_where_it_should(layouts):
    assert set(layouts) <= set(LAYOUTS)
    rig = Rig("", None, DEVICE, layouts)
    source, target = rig.patterned(6, 8), rig.heads_of(rig.pool(8, 4), HeadRange(2, 2, 4), of_sender=False)
    expected = target.clone()
    units = source.unflatten(3, (2, 4)).movedim(3, 1).flatten(0, 1)  # half as many tokens each
    expected[[7, 0, 3]] = units[[11, 2, 5]][..., 2:4, :]
    pools = of_layers(source), of_layers(target)
    copy(*pools, [11, 2, 5], [7, 0, 3], HeadRange(0, 4, 4), HeadRange(2, 2, 4))
    assert torch.equal(target, expected)


def test_gathered_blocks_are_in_one_order_and_scattered_where_they_were():
    """As nccl sends them, of pieces that are not of eight bytes."""
    source = torch.arange(5 * 3 * 7 * 2, dtype=torch.uint8).view(3, 5, 7, 2).to(DEVICE)  # layers, blocks, …
    pool = PoolLayout(list(source.flatten(2)), "blocks dim")
    side, _ = sides(pool.layout, HeadRange(), pool.layout, HeadRange())
    addresses = [extent.address for extent in pool.extents]
    plan, rows = CopyPlan(side, addresses, side.in_rows(1), [0]), torch.zeros(2, 42, dtype=torch.uint8, device=DEVICE)
    copy_pieces(plan, source, [4, 1], rows, [0, 1])
    expected = source.clone()
    assert torch.equal(rows, source[:, [4, 1]].movedim(1, 0).reshape(2, 42))
    expected[:, [0, 2]] = source[:, [4, 1]]
    copy_pieces(plan.reversed, rows, [0, 1], source, [0, 2])
    assert torch.equal(source, expected)


def test_to_copy_nothing_changes_nothing():
    """How a link has the kernel compiled."""
    pool = torch.zeros(2, 64, device=DEVICE)
    plan = copy(PoolLayout.of_blocks(pool, None), PoolLayout.of_blocks(pool, None), [], [])
    assert plan.device_tables
    assert not pool.any()


def test_it_compiles_for_a_gpu_and_moves_sixteen_bytes_at_once_where_all_pieces_are_of_sixteen():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("hbserve_kv_compile_for_hopper.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled: 16 8 8\n"
