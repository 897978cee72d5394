"""Layouts of blocks that are bytes, for tests to which it does not matter where these lie."""

from typing import TypedDict

from hbserve_kv.memory.layout import HeadRange, Layout, Plane, Side


def layout_of(num_blocks: int = 64, head_bytes: int = 8, num_heads: int = 1) -> Layout:
    block = head_bytes * num_heads
    return Layout(
        num_blocks, 1, num_heads, 1, [Plane(0, 0, block, block, head_bytes, head_bytes)], [num_blocks * block], True
    )


class Sides(TypedDict):
    mine: Side
    peer: Side


def whole_blocks(num_blocks: int = 64, head_bytes: int = 8, heads: HeadRange | None = None) -> Sides:
    """Of a link, for `Link(**…)`."""
    heads = heads or HeadRange()
    side = Side(layout_of(num_blocks, head_bytes, heads.count), 0, heads.count)
    return {"mine": side, "peer": side}
