"""Layouts of pools: every block arrives as it was, whatever lies where on both sides."""

import mmap
import os
import random
from itertools import product

import pytest
import torch

from hbserve_kv import BackendUnavailable, FingerprintMismatch, HeadRange, Outcome, PoolLayout
from hbserve_kv.memory.layout import CopyPlan, Layout, Plane, sides
from hbserve_kv.memory.memory import Memory
from hbserve_kv.memory.shared_memory import copy
from hbserve_kv.transports.ipc import IpcTransport

SIZES = {"blocks": 5, "layers": 3, "kv": 2, "tokens": 4, "heads": 4, "dim": 2}


class Pool:
    """A pool of some layout, and what it holds in one order for all: (blocks, layers, kv, tokens, heads, dim)."""

    def __init__(self, kind: str, axes: str, /, first_value: float = 0.0, **sizes: int) -> None:
        """kind: "one" tensor, one for each of the "layers", or two, "apart". `axes` are those of a tensor."""
        size = SIZES | sizes
        names = axes.replace("key+value", "kv dim").split()
        self.canonical = torch.arange(first_value, first_value + _product(size.values())).view(*size.values())
        whole = [self.canonical] if kind == "one" else list(self.canonical.unbind(1))
        missing = [name for name in size if name not in names]
        made = []
        for part in whole:
            left = [name for name in size if kind == "one" or name != "layers"]
            for each in part.unbind(left.index("kv")) if kind == "apart" else [part]:
                axes_left = [name for name in left if kind != "apart" or name != "kv"]
                made.append(each.permute(*(axes_left.index(name) for name in names)).contiguous())
        assert set(missing) <= {"layers", "kv"}
        self.tensors = made
        given = [each.flatten(-2) for each in made] if "key+value" in axes else made
        pairs = list(zip(made[::2], made[1::2], strict=True)) if kind == "apart" else given
        self.pool = PoolLayout(pairs if kind != "one" else made[0], axes)
        self._names, self._kind, self._size = names, kind, size

    def read(self) -> torch.Tensor:
        order = [name for name in self._size if name in self._names]
        found = [each.permute(*(self._names.index(name) for name in order)) for each in self.tensors]
        if self._kind == "one":
            return found[0]
        if self._kind == "apart":
            found = [torch.stack(pair, 1) for pair in zip(found[::2], found[1::2], strict=True)]
        return torch.stack(found, 1)

    def addresses(self) -> list[int]:
        return [extent.address for extent in self.pool.extents]


def _product(sizes):
    found = 1
    for size in sizes:
        found *= size
    return found


LAYOUTS = {
    "block-major": ("one", "blocks layers kv tokens heads dim"),
    "layer-major": ("layers", "kv blocks tokens heads dim"),
    "keys and values in turn": ("layers", "blocks kv tokens heads dim"),
    "heads before tokens": ("layers", "blocks kv heads tokens dim"),
    "apart": ("apart", "blocks tokens heads dim"),
    "apart, heads first": ("apart", "heads blocks tokens dim"),
    "a value behind each key": ("layers", "blocks heads tokens key+value"),
    "blocks last": ("one", "kv layers heads tokens blocks dim"),
}


def moved(source: Pool, source_units, source_heads, target: Pool, target_units, target_heads) -> CopyPlan:
    mine, theirs = sides(source.pool.layout, source_heads, target.pool.layout, target_heads)
    plan = CopyPlan(mine, source.addresses(), theirs, target.addresses())
    for here, there, length in plan.moves(source_units, target_units):
        copy(target.addresses()[0] + there, source.addresses()[0] + here, length)
    return plan


@pytest.mark.parametrize(("one", "other"), list(product(LAYOUTS, LAYOUTS)))
def test_blocks_of_every_layout_become_blocks_of_every_other(one, other):
    source, target = Pool(*LAYOUTS[one]), Pool(*LAYOUTS[other], first_value=1e6, blocks=7)
    all_heads = HeadRange(0, 4, 4)
    moved(source, [4, 0, 1], all_heads, target, [2, 5, 6], all_heads)
    expected = target.canonical.clone()
    expected[[2, 5, 6]] = source.canonical[[4, 0, 1]]
    assert torch.equal(target.read(), expected)


@pytest.mark.parametrize(("one", "other"), list(product(["block-major", "apart, heads first"], LAYOUTS)))
def test_heads_and_smaller_blocks_land_where_they_belong(one, other):
    source, target = Pool(*LAYOUTS[one]), Pool(*LAYOUTS[other], first_value=1e6, blocks=6, tokens=2, heads=2)
    moved(source, [7, 6, 1], HeadRange(0, 4, 8), target, [0, 1, 4], HeadRange(2, 2, 8))
    expected = target.canonical.clone()
    units = source.canonical.unflatten(3, (2, 2)).movedim(3, 1).flatten(0, 1)  # (2 x blocks, …), half as many tokens
    expected[[0, 1, 4]] = units[[7, 6, 1]][..., 2:4, :]
    assert torch.equal(target.read(), expected)
    back = Pool(*LAYOUTS[one], first_value=2e6)
    moved(target, [4, 0], HeadRange(2, 2, 8), back, [3, 2], HeadRange(0, 4, 8))
    units = back.canonical.unflatten(3, (2, 2)).movedim(3, 1).clone()
    units[[1, 1], [1, 0], ..., 2:4, :] = expected[[4, 0]]
    assert torch.equal(back.read().unflatten(3, (2, 2)).movedim(3, 1), units)


def test_neighbours_are_one_piece():
    """A block of one tensor is one piece, of a layer's one or two; blocks that are neighbours on both sides are one."""
    whole, layers = Pool(*LAYOUTS["block-major"]), Pool(*LAYOUTS["layer-major"])
    turns, latents = Pool(*LAYOUTS["keys and values in turn"]), Pool(*LAYOUTS["heads before tokens"])
    heads = HeadRange(0, 4, 4)

    def pieces(source, target):
        mine, theirs = sides(source.pool.layout, heads, target.pool.layout, heads)
        return CopyPlan(mine, source.addresses(), theirs, target.addresses())

    assert len(pieces(whole, whole).pieces) == 1
    assert pieces(whole, whole).whole is not None
    assert len(pieces(turns, turns).pieces) == 3
    assert len(pieces(layers, layers).pieces) == len(pieces(layers, whole).pieces) == 6
    assert len(pieces(latents, latents).pieces) == 3
    assert len(list(pieces(layers, layers).moves([1, 2, 3, 0], [0, 1, 2, 4]))) == 6 * 2
    assert len(list(pieces(whole, layers).moves([1, 2, 3, 0], [0, 1, 2, 4]))) == 6 * 4


def test_views_into_one_piece_of_memory_are_one_extent():
    """Also keys and values that are views of one tensor in which blocks have them in turn."""
    caches = [torch.zeros(5, 2, 4, 2, 8) for _ in range(2)]
    pool = PoolLayout([(cache[:, 0], cache[:, 1]) for cache in caches], "blocks tokens heads dim")
    assert pool.layout.extents == [cache.nbytes for cache in caches]
    assert {plane.extent for plane in pool.layout.planes} == {0, 1}
    assert pool.layout.block_bytes == 2 * 2 * 4 * 2 * 8 * 4
    flat = torch.zeros(2, 5, 64)
    assert len(PoolLayout([flat[0], flat[1]], "blocks dim").extents) == 2


def test_memory_with_the_buffer_protocol_or_dlpack_is_where_torch_says():
    tensor = torch.arange(3 * 4 * 6, dtype=torch.int32).view(3, 4, 6)[:, 1:3]

    class Exported:
        def __dlpack__(self):
            return tensor.__dlpack__()

    of_tensor, of_dlpack = (PoolLayout(each, "layers blocks dim") for each in (tensor, Exported()))
    assert of_tensor.layout == of_dlpack.layout
    assert of_tensor.extents[0].address == of_dlpack.extents[0].address == tensor.data_ptr()
    held = bytearray(96)
    of_buffer = PoolLayout(memoryview(held).cast("B", (2, 4, 12)), "layers blocks dim")
    assert of_buffer.layout.planes[1] == Plane(0, 48, 12, 0, 0, 12)
    assert torch.frombuffer(held, dtype=torch.uint8).data_ptr() == of_buffer.extents[0].address


@pytest.mark.parametrize(
    ("tensors", "axes", "message"),
    [
        (torch.zeros(2, 3), "blocks head", "axes='blocks head'"),
        (torch.zeros(2, 3), "tokens dim", "with 'blocks'"),
        (torch.zeros(2, 3), "blocks blocks", "different ones"),
        (torch.zeros(2, 3), "blocks", "axes='blocks' are 1"),
        (torch.zeros(2, 3).T, "blocks dim", "12 bytes apart"),
        (torch.zeros(2, 0), "blocks dim", "not empty"),
        (torch.zeros(1).expand(4, 3), "blocks dim", "a place of its own"),
        ([torch.zeros(2, 3), torch.zeros(4, 3)], "blocks dim", "tensors of 2 and of 4 blocks"),
        ([], "blocks dim", "at least one"),
        (b"abc", "blocks", "read-only bytes"),
        ("abc", "blocks", "got str"),
        ([torch.zeros(2, 3), torch.zeros(2, 3, device="meta")], "blocks dim", "one device"),
    ],
    ids=str,
)
def test_what_is_no_pool_is_refused_in_words(tensors, axes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PoolLayout(tensors, axes)


def test_what_cannot_be_bridged_is_named():
    mine = Pool(*LAYOUTS["block-major"]).pool.layout
    for sizes, named in [
        ({"layers": 2}, ("num_layers", 2, 3)),
        ({"dim": 4}, ("bytes of a head in each plane", [16] * 6, [8] * 6)),
        ({"tokens": 6}, ("block_size", 6, 4)),
        ({"tokens": 8}, None),
        ({"heads": 2, "blocks": 9}, None),
    ]:
        assert mine.mismatch(Pool(*LAYOUTS["layer-major"], **sizes).pool.layout) == named
    raw, other = (PoolLayout.of_blocks(torch.zeros(2, size), None).layout for size in (8, 6))
    assert raw.mismatch(other) == ("block_bytes", 24, 32)
    assert raw.mismatch(mine) == ("block_bytes_per_head", 192, 32)


async def test_what_was_agreed_is_told_and_what_cannot_be_bridged_is_refused_by_its_name(managers):
    sender = await managers(0, "ipc", Pool(*LAYOUTS["apart"], tokens=8).pool)
    receiver = await managers(1, "ipc", Pool(*LAYOUTS["layer-major"]).pool)
    await sender.open_link(receiver.endpoint)
    (link,) = sender.links()
    assert link.detail == "memory of this host; blocks of 4 tokens, of 8 here and 4 there; 6 pieces a block"
    (link,) = receiver.links()
    assert "of 4 here and 8 there" in link.detail
    for sizes, named in [
        ({"layers": 2}, "num_layers is 3 on rank 0"),
        ({"tokens": 3}, "block_size is 8"),
    ]:
        other = await managers(2, "ipc", Pool(*LAYOUTS["layer-major"], **sizes).pool)
        with pytest.raises(FingerprintMismatch, match=named):
            await sender.open_link(other.endpoint)


async def test_memory_that_has_no_name_is_refused_by_ipc_and_served_by_the_next_backend(managers, caplog):
    """An anonymous mapping stands for expandable segments of a GPU, and for memory that engines give back to sleep."""
    held = [mmap.mmap(-1, 4096) for _ in range(2)]
    pools = [PoolLayout(each, "blocks") for each in held]
    with pytest.raises(BackendUnavailable, match="not in shared memory"):
        await managers(0, "ipc", pools[0])
    caplog.set_level("INFO")
    sender, receiver = [await managers(rank, "auto", pool) for rank, pool in enumerate(pools)]
    assert "not ipc: kv_transfer.backend='ipc': the pool is not in shared memory" in caplog.text
    held[0][:4] = b"abcd"
    posted = receiver.post_receive("t", [7, 9])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1, 3], 0)
    assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED
    assert held[1][:10] == b"\0\0\0\0\0\0\0b\0d"
    assert sender.links()[0].transport == "nccl"


async def test_memory_of_which_ipc_could_move_only_some_is_found_by_the_next_backend(monkeypatch):
    """A container's /dev/shm is small, and an engine on the CPU has a tensor for each layer."""
    room = os.statvfs("/dev/shm")
    left = [room, os.statvfs_result((*room[:4], 0, *room[5:]))]
    monkeypatch.setattr(os, "statvfs", lambda _: left.pop(0))
    layers = [torch.zeros(4, 2, 8, 16) for _ in range(2)]
    memory = Memory(PoolLayout(layers, "blocks tokens heads dim"), 0)
    before = memory.addresses["pool"]
    with pytest.raises(BackendUnavailable, match="/dev/shm has no room for a pool of 4096 bytes"):
        await IpcTransport().start(memory)
    assert sorted(memory.addresses["pool"]) == sorted(layer.data_ptr() for layer in layers) != sorted(before)


def test_a_peer_whose_planes_are_outside_its_memory_is_refused():
    dice = random.Random(0)
    plane = Plane(0, 8, 64, 16, 8, 8)
    Layout(4, 4, 2, 1, [plane], [264])
    for number in range(20):
        grown = Plane(
            *(
                value + (dice.randint(1, 9) if i == number % 6 else 0)
                for i, value in enumerate(
                    (plane.extent, plane.offset, plane.block, plane.token, plane.head, plane.size)
                )
            )
        )
        with pytest.raises(ValueError, match="outside its memory"):
            Layout(4, 4, 2, 1, [grown], [264])
