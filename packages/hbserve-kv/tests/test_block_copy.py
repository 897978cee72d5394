"""The kernel that copies blocks on a GPU, beside plain indexing; without a GPU in Triton's interpreter."""

import pytest
import torch

from hbserve_kv.memory.memory import HeadSlice, head_view

pytest.importorskip("triton", reason="torch has Triton on Linux only")
from hbserve_kv.memory.block_copy import copy_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_rows(num_blocks: int, block_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_blocks, block_bytes), dtype=torch.uint8, generator=generator).to(DEVICE)


@pytest.mark.parametrize("block_bytes", [8, 24, 4096 * 8, 4096 * 8 + 8, 3001], ids=str)
def test_blocks_land_where_they_should_and_no_other_byte_changes(block_bytes):
    source, target = random_rows(7, block_bytes, 0), random_rows(9, block_bytes, 1)
    expected = target.clone()
    expected[[8, 0, 3]] = source[[2, 6, 5]]
    copy_blocks(source, [2, 6, 5], target, [8, 0, 3])
    assert torch.equal(target, expected)


PLACES, HEAD_BYTES = 6, 16


@pytest.mark.parametrize(
    ("mine", "num_heads", "theirs", "peer_num_heads"),
    [
        (HeadSlice(1, 2), 4, None, 2),
        (None, 2, HeadSlice(2, 2), 4),
        (HeadSlice(1, 1), 2, HeadSlice(3, 1), 4),
    ],
    ids=["some-to-all", "all-to-some", "some-to-some"],
)
def test_some_heads_land_where_they_should_and_no_other_byte_changes(mine, num_heads, theirs, peer_num_heads):
    source = random_rows(5, PLACES * num_heads * HEAD_BYTES, 2)
    target = random_rows(5, PLACES * peer_num_heads * HEAD_BYTES, 3)
    expected = target.clone()
    view = head_view(expected, theirs or HeadSlice(0, peer_num_heads), peer_num_heads, HEAD_BYTES)
    view[[4, 1]] = head_view(source, mine or HeadSlice(0, num_heads), num_heads, HEAD_BYTES)[[0, 3]]
    mine_view = head_view(source, mine, num_heads, HEAD_BYTES)
    copy_blocks(mine_view, [0, 3], head_view(target, theirs, peer_num_heads, HEAD_BYTES), [4, 1])
    assert torch.equal(target, expected)
