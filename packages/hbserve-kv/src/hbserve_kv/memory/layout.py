"""Layouts of pools: where each piece of a block lies, and how the blocks of one pool are copied to those of another.

A pool consists of planes: the keys, or the values, of one layer. In a plane, block b, token t and head h are `size`
bytes at `offset + b * block + t * token + h * head`. So a pool may be one tensor or several, with the block dimension
anywhere:

    block-major  (blocks, layers, kv, tokens, heads, dim)    one block is one piece
    layer-major  layers x (kv, blocks, tokens, heads, dim)   one block is 2 x layers pieces, which lie apart

Two pools fit if they have the same planes in this order: layer by layer, keys before values. A plane that has the key
and the value of each token side by side counts as two for a peer that has them apart. One side's blocks may have r
times as many tokens as the other's. Both sides then count *units*, which are the smaller blocks: with n tokens in a
unit, unit u of the side with the larger blocks is tokens [u % r * n, (u % r + 1) * n) of block u // r.

Under tensor parallelism each rank's blocks hold the KV heads [first, first + count) of `total`. A prefill and a decode
instance may be split differently: each prefill rank then sends to each decode rank the heads that both hold.

    P, 1 rank    |  0  1  2  3  |        D, 2 ranks   |  0  1  |  2  3  |
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from operator import index, mul
from typing import Annotated, Any, NamedTuple

import msgspec

NotNegative = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]


class HeadRange(msgspec.Struct, frozen=True, array_like=True):
    """The KV heads that one rank's blocks hold: [first, first + count) of a model's `total`."""

    first: int = 0
    count: int = 1
    total: int = 1

    def __post_init__(self) -> None:
        if not (self.first >= 0 and self.count >= 1 and self.end <= self.total):
            raise ValueError(
                f"heads [{self.first}, {self.end}) of {self.total}: expected a part of them that is not empty"
            )

    @property
    def end(self) -> int:
        return self.first + self.count

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, total: int) -> "HeadRange":
        """Return the heads of one rank in an equal split. Raises ValueError if `total` heads cannot be split into
        `num_ranks` equal parts."""
        if total % num_ranks:
            raise ValueError(f"{total} heads cannot be split into {num_ranks} equal parts")
        count = total // num_ranks
        return cls(rank * count, count, total)

    def common(self, other: "HeadRange") -> "HeadRange | None":
        """Return the heads that both hold; None if there are none."""
        first, end = max(self.first, other.first), min(self.end, other.end)
        return HeadRange(first, end - first, self.total) if first < end else None

    def heads(self) -> range:
        return range(self.first, self.end)


class Plane(msgspec.Struct, frozen=True, array_like=True):
    """Keys or values of one layer: see the formula above. Offset, strides and size are in bytes."""

    extent: NotNegative
    """Index of the extent (contiguous piece of the pool's memory) in which the plane lies."""
    offset: NotNegative
    block: NotNegative
    token: NotNegative
    head: NotNegative
    size: Positive


class Layout(msgspec.Struct, frozen=True):
    """Positions of a pool's blocks in memory, as peers are told."""

    num_blocks: NotNegative
    num_tokens: Positive
    """Tokens per block."""
    num_heads: Positive
    num_layers: Positive
    planes: Annotated[list[Plane], msgspec.Meta(min_length=1, max_length=1 << 14)]
    """All planes, layer by layer."""
    extents: list[NotNegative]
    """Length of each extent (contiguous piece of memory), in bytes."""
    is_opaque: bool = False
    """Whether nobody has said what a block consists of: `num_tokens` then counts places in it, and is no block size."""
    has_keys_beside_values: bool = False
    """Whether each plane has both keys and values of a layer: for each token and head its key, then its value."""

    def __post_init__(self) -> None:
        """Check the planes, also of a layout that a peer sent. Raises ValueError if one lies outside its memory."""
        if len(self.planes) % self.num_layers:
            raise ValueError(f"{len(self.planes)} planes are not as many for each of {self.num_layers} layers")
        for plane in self.planes:
            last = self.num_blocks - 1, self.num_tokens - 1, self.num_heads - 1
            begin = sum(map(mul, last, (plane.block, plane.token, plane.head)))
            is_there = plane.extent < len(self.extents)
            if not is_there or (self.num_blocks and plane.offset + begin + plane.size > self.extents[plane.extent]):
                raise ValueError(f"{plane} is outside its memory")

    @property
    def sizes(self) -> list[int]:
        """Bytes of one head of one token, in each plane."""
        return [plane.size for plane in self.planes]

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in a block."""
        return self.num_tokens * sum(self.sizes)

    @property
    def block_bytes(self) -> int:
        return self.num_heads * self.head_bytes

    def in_rows(self, num_blocks: int) -> "Layout":
        """Return the layout of `num_blocks` such blocks, each in one piece, one after another."""
        planes, offset = [], 0
        for size in self.sizes:
            planes.append(Plane(0, offset, self.block_bytes, self.num_heads * size, size, size))
            offset += self.num_tokens * self.num_heads * size
        extents = [num_blocks * self.block_bytes]
        return msgspec.structs.replace(self, num_blocks=num_blocks, planes=planes, extents=extents)

    def beside(self, theirs: "Layout") -> "Layout":
        """Return this layout, with keys and values in separate planes if the other side has them in separate ones."""
        if not self.has_keys_beside_values or theirs.has_keys_beside_values or any(size % 2 for size in self.sizes):
            return self
        planes = []
        for plane in self.planes:
            key = msgspec.structs.replace(plane, size=plane.size // 2)
            planes += [key, msgspec.structs.replace(key, offset=plane.offset + key.size)]
        return msgspec.structs.replace(self, planes=planes, has_keys_beside_values=False)

    def mismatch(self, theirs: "Layout") -> tuple[str, object, object] | None:
        """Return what differs and cannot be bridged: its name, their value, and this one's; None if the blocks fit."""
        both = theirs.beside(self), self.beside(theirs)
        if self.is_opaque or theirs.is_opaque:
            name = (
                "block_bytes" if all(each.num_tokens * each.num_heads == 1 for each in both) else "block_bytes_per_head"
            )
            compared = {name: "head_bytes", "places of a block": "num_tokens", "bytes of a head": "sizes"}
        else:
            compared = {"num_layers": "num_layers", "bytes of a head in each plane": "sizes"}
        for name, attribute in compared.items():
            their_value, my_value = (getattr(each, attribute) for each in both)
            if their_value != my_value:
                return name, their_value, my_value
        smaller, larger = sorted((self.num_tokens, theirs.num_tokens))
        return None if larger % smaller == 0 else ("block_size", theirs.num_tokens, self.num_tokens)


@dataclass(frozen=True, eq=False)
class Side:
    """What a link moves of one side's blocks: some of their heads, in units, of which a block has `ratio`."""

    layout: Layout
    first_head: int
    num_heads: int
    ratio: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether whole blocks with all heads go over the link."""
        return self.ratio == 1 and self.num_heads == self.layout.num_heads

    @property
    def num_units(self) -> int:
        """Number of units in the pool."""
        return self.layout.num_blocks * self.ratio

    @property
    def unit_tokens(self) -> int:
        return self.layout.num_tokens // self.ratio

    @property
    def unit_bytes(self) -> int:
        return self.num_heads * self.layout.head_bytes // self.ratio

    def units(self, block_ids: Sequence[int]) -> list[int]:
        if self.ratio == 1:
            return list(block_ids)
        return [block_id * self.ratio + unit for block_id in block_ids for unit in range(self.ratio)]

    def of_layers(self, layers: range | None) -> "Side":
        """Return this side with only these layers; None: all."""
        if layers is None:
            return self
        each = len(self.layout.planes) // self.layout.num_layers
        planes = self.layout.planes[layers.start * each : layers.stop * each]
        return replace(self, layout=msgspec.structs.replace(self.layout, planes=planes, num_layers=len(layers)))

    def in_rows(self, num_units: int) -> "Side":
        """Return a side whose units have the same content, each in one piece, one after another: as they are sent."""
        unit = msgspec.structs.replace(
            self.layout,
            num_blocks=0,
            num_tokens=self.unit_tokens,
            num_heads=self.num_heads,
        )
        return Side(unit.in_rows(num_units), 0, self.num_heads)


def agreement(mine: Side, peer: Side) -> str:
    """Describe, for people to read, what a link between two different pools moves; "" if they differ only in their
    numbers of blocks."""
    found, both = [], (mine, peer)
    if max(each.ratio for each in both) > 1:
        found.append(
            f"blocks of {mine.unit_tokens} tokens, of {mine.layout.num_tokens} here and {peer.layout.num_tokens} there"
        )
    if any(each.num_heads < each.layout.num_heads for each in both):
        found.append(f"{mine.num_heads} heads, of {mine.layout.num_heads} here and {peer.layout.num_heads} there")
    plan = CopyPlan(mine, [0] * len(mine.layout.extents), peer, [0] * len(peer.layout.extents))
    if len(plan.pieces) > 1:
        found.append(f"{len(plan.pieces)} pieces a block")
    return "; ".join(found)


def sides(mine: Layout, my_heads: HeadRange, theirs: Layout, their_heads: HeadRange) -> tuple[Side, Side]:
    """Return the two sides of a link, this one first, for layouts that fit and have heads in common."""
    common = my_heads.common(their_heads)
    assert common is not None
    unit_tokens = min(mine.num_tokens, theirs.num_tokens)
    one, other = (
        Side(layout, common.first - heads.first, common.count, layout.num_tokens // unit_tokens)
        for layout, heads in ((mine.beside(theirs), my_heads), (theirs.beside(mine), their_heads))
    )
    return one, other


class Piece(NamedTuple):
    """Bytes of a unit that are contiguous on both sides. On each side, those of unit u begin at `offset + u // ratio *
    block + u % ratio * unit`, counted from where that side's memory begins."""

    source: int
    source_block: int
    source_unit: int
    target: int
    target_block: int
    target_unit: int
    length: int


class CopyPlan:
    """Plan for copying units of one side to units of another. Computed once for a link, for all parts of its
    transfers."""

    def __init__(
        self, source: Side, source_addresses: Sequence[int], target: Side, target_addresses: Sequence[int]
    ) -> None:
        """The addresses are those of each side's extents. Positions are relative to the first of them."""
        self.source_ratio, self.target_ratio = source.ratio, target.ratio
        self.pieces: list[Piece] = []
        for mine, theirs in zip(source.layout.planes, target.layout.planes, strict=True):
            self._add_plane(
                (source_addresses[mine.extent] - source_addresses[0], mine, source),
                (target_addresses[theirs.extent] - target_addresses[0], theirs, target),
            )
        self.device_tables: dict[tuple[int, int], Any] = {}
        """The pieces on a GPU, by alignment of both sides' memory: see `hbserve_kv.memory.block_copy`."""

    def _add_plane(self, *both: tuple[int, Plane, Side]) -> None:
        (source, target), (mine, theirs) = ([each[0] + each[1].offset for each in both], [each[1] for each in both])
        source += both[0][2].first_head * mine.head
        target += both[1][2].first_head * theirs.head
        tokens, run = both[0][2].unit_tokens, mine.size
        units = tuple(plane.token * tokens if side.ratio > 1 else 0 for _, plane, side in both)
        apart = [(tokens, mine.token, theirs.token), (both[0][2].num_heads, mine.head, theirs.head)]
        while together := next((each for each in apart if each[0] == 1 or each[1] == each[2] == run), None):
            apart.remove(together)
            run *= together[0]
        for place in product(*(range(count) for count, _, _ in apart)):
            here = source + sum(at * step for at, (_, step, _) in zip(place, apart, strict=True))
            there = target + sum(at * step for at, (_, _, step) in zip(place, apart, strict=True))
            self._add(Piece(here, mine.block, units[0], there, theirs.block, units[1], run))

    def _add(self, piece: Piece) -> None:
        """Append a piece, or merge it with the one before if they are neighbours on both sides in every unit."""
        if self.pieces:
            last = self.pieces[-1]
            grown = last._replace(length=last.length + piece.length)
            if piece == grown._replace(
                source=last.source + last.length, target=last.target + last.length, length=piece.length
            ):
                self.pieces[-1] = grown
                return
        self.pieces.append(piece)

    @cached_property
    def reversed(self) -> "CopyPlan":
        """The plan for the opposite direction."""
        made = CopyPlan.__new__(CopyPlan)
        made.source_ratio, made.target_ratio, made.device_tables = self.target_ratio, self.source_ratio, {}
        made.pieces = [Piece(*piece[3:6], *piece[:3], piece.length) for piece in self.pieces]
        return made

    @cached_property
    def shortest(self) -> int:
        """Length of the shortest piece, in bytes."""
        return min(piece.length for piece in self.pieces)

    @property
    def whole(self) -> Piece | None:
        """The only piece, if a block is one piece on both sides and neither side's blocks are divided into units."""
        return self.pieces[0] if len(self.pieces) == self.source_ratio == self.target_ratio == 1 else None

    def moves(self, source_units: Sequence[int], target_units: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (source, target, length) of each run of bytes, relative to where both sides' memory begins. Units that
        are neighbours on both sides are one run."""
        runs: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        for piece in self.pieces:
            key = (piece.source_block, piece.source_unit, piece.target_block, piece.target_unit, piece.length)
            if key not in runs:
                sources = _offsets(source_units, self.source_ratio, piece.source_block, piece.source_unit)
                targets = _offsets(target_units, self.target_ratio, piece.target_block, piece.target_unit)
                runs[key] = list(runs_of(sources, targets, piece.length))
            for source, target, length in runs[key]:
                yield piece.source + source, piece.target + target, length


def _offsets(units: Sequence[int], ratio: int, block: int, unit: int) -> list[int]:
    if ratio == 1:
        return [each * block for each in units]
    return [each // ratio * block + each % ratio * unit for each in units]


def runs_of(sources: Sequence[int], targets: Sequence[int], length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (source, target, length) of each run of positions that are `length` apart in both lists."""
    start = 0
    for i in range(1, len(sources) + 1):
        is_end = i == len(sources)
        if is_end or sources[i] - sources[i - 1] != length or targets[i] - targets[i - 1] != length:
            yield sources[start], targets[start], (i - start) * length
            start = i


def checked_blocks(block_ids: Iterable[int], num_blocks: int) -> list[int]:
    """Return the block ids as Python integers: one-element tensors, for example, would all compare as different.

    Raises:
        TypeError: they are not integers.
        ValueError: one is outside the pool.
    """
    try:
        found = [index(each) for each in block_ids]
    except TypeError:
        raise TypeError(f"block_ids={block_ids!r}: expected whole numbers") from None
    if found and not 0 <= min(found) <= max(found) < num_blocks:
        raise ValueError(f"block_ids={found}: outside the pool: expected 0 to {num_blocks - 1}")
    return found


def checked_layers(layers: object, num_layers: int) -> None:
    """Check a range of layers; None is all of them. Raises TypeError if it is no range, and ValueError if the layers
    are not consecutive or do not exist."""
    if layers is None:
        return
    if not isinstance(layers, range):
        raise TypeError(f"layers={layers!r}: expected a range")
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= num_layers:
        raise ValueError(f"layers={layers}: expected neighbours, of {num_layers}")
