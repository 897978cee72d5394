"""What a device needs to know of one step, in one piece of memory: one copy brings all of it there.

Layout, all int32; `StepShape` says how large each part is, and only the last part's size differs from step to step:
    header         1                 width of the tables
    tokens         (4, rows)         token id, source (kernels/embedding.py), position, slot (kernels/store_kv.py)
    sequences      (3, sequences)    first row, new tokens, context with them
    pieces         (6, pieces)       of the decodes; see `DecodePieces.cut`; row -1: none
    tiles          (2, tiles)        sequence (-1: none) and first new token; see kernels/prefill_attention.py
    samples        (7, samples)      row, and what kernels/sampling.py says of each
    tables         sequences * width block numbers of each sequence
Each part, and each of its rows, begins at a multiple of 16 bytes: kernels are compiled for that once, for all shapes.
Sequences stand in the order of their rows: decodes, which are chunks of one token, before longer chunks.
"""

import random
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hbserve_core.cuda_runner.split_kv import DecodePieces
from hbserve_core.engine.sequence import HOTTEST, UNREAD, ScheduledChunk, Sequence

_ALIGNMENT = 4


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many of each there is room for. Two steps of one shape differ by their tables' width only."""

    rows: int
    sequences: int
    pieces: int
    tiles: int
    samples: int

    def fits(self, other: "StepShape") -> bool:
        """Whether a step of this shape can be padded to the other."""
        return all(getattr(self, name) <= getattr(other, name) for name in self.__slots__)

    def parts(self) -> list[tuple[int, int]]:
        """(rows, columns) of each part before the tables."""
        columns = (self.rows, self.sequences, self.pieces, self.tiles, self.samples)
        return [(1, 1), *zip((4, 3, 6, 2, 7), columns, strict=True)]

    @property
    def fixed_size(self) -> int:
        """Numbers before the tables."""
        return sum(rows * _aligned(columns) for rows, columns in self.parts())


class StepView:
    """The parts of a step's memory, a flat int32 numpy array or torch tensor, as views."""

    def __init__(self, memory: Any, shape: StepShape) -> None:
        self.shape = shape
        parts, first = [], 0
        for rows, columns in shape.parts():
            end = first + rows * _aligned(columns)
            parts.append(memory[first:end].reshape(rows, _aligned(columns))[:, :columns])
            first = end
        self.header, self.tokens, self.sequences, self.pieces, self.tiles, self.samples = parts
        self.width = self.header[0]
        self.tables = memory[first:]

    def clear(self) -> None:
        """Make it a step of padding only. What an earlier step has left here could ask for anything."""
        for row, value in zip(self.tokens, (0, -1, 0, -1), strict=True):
            row[:] = value
        self.tiles[0] = self.pieces[0] = -1
        # Padding is sampled greedily, which costs least.
        self.samples[:] = self.header[:] = 0


def order_chunks(batch: Ids[ScheduledChunk]) -> list[int]:
    """Places in the batch, decodes first; among them long contexts first, so that the last to end are short ones."""
    return sorted(
        range(len(batch)), key=lambda i: (batch[i].num_new_tokens > 1, -batch[i].sequence.num_computed_tokens)
    )


def write_step(
    view: StepView, chunks: Ids[ScheduledChunk], sampling: Ids[int], sources: Mapping[Sequence, int],
    random: random.Random, *, block_size: int, tile_tokens: int, pieces: DecodePieces,
) -> int:  # fmt: skip
    """Fill a numpy view in; returns how many numbers of its memory are in use.

    chunks: in the order of `order_chunks`. sampling: places of those to sample for. sources: where the step before has
    put each sequence's unread token. random: for requests without a seed. tile_tokens: new tokens of one tile. pieces:
    how decodes are cut.
    """
    num_decodes = sum(chunk.num_new_tokens == 1 for chunk in chunks)
    width = max(-(-(chunk.first + chunk.num_new_tokens) // block_size) for chunk in chunks)
    view.clear()
    view.width[:] = width
    _write_decodes(view, chunks[:num_decodes], sources, pieces)
    _write_prefills(view, chunks[num_decodes:], num_decodes, block_size, tile_tokens)
    tables = view.tables[: len(chunks) * width].reshape(len(chunks), width)
    for row, chunk in zip(tables, chunks, strict=True):
        table = chunk.sequence.block_table[:width]
        row[: len(table)] = table
    _write_samples(view, chunks, sampling, random)
    return view.shape.fixed_size + len(chunks) * width


def _write_decodes(
    view: StepView, chunks: Ids[ScheduledChunk], sources: Mapping[Sequence, int], pieces: DecodePieces
) -> None:
    columns: list[tuple[int, int, int]] = []
    for chunk in chunks:
        sequence = chunk.sequence
        position = sequence.num_computed_tokens
        token = sequence.token_ids[position]
        columns.append((token, sources[sequence] if token == UNREAD else -1, position))
    if columns:
        count = len(columns)
        view.tokens[:3, :count] = np.array(columns, dtype=np.int32).T
        view.tokens[3, :count] = -2
        view.sequences[0, :count] = np.arange(count)
        view.sequences[1, :count] = 1
        contexts = view.sequences[2, :count] = view.tokens[2, :count] + 1
        cut = pieces.cut(contexts)
        view.pieces[:, : cut.shape[1]] = cut


def _write_prefills(
    view: StepView, chunks: Ids[ScheduledChunk], num_decodes: int, block_size: int, tile_tokens: int
) -> None:
    row = num_decodes
    tiles: list[npt.NDArray[np.int32]] = []
    for index, chunk in enumerate(chunks, num_decodes):
        sequence, count = chunk.sequence, chunk.num_new_tokens
        first = sequence.num_computed_tokens
        positions = np.arange(first, first + count, dtype=np.int32)
        rows = slice(row, row + count)
        view.tokens[0, rows] = sequence.token_ids[first : first + count]
        view.tokens[2, rows] = positions
        blocks = np.asarray(sequence.block_table, dtype=np.int32)
        view.tokens[3, rows] = blocks[positions // block_size] * block_size + positions % block_size
        view.sequences[:, index] = row, count, first + count
        begins = np.arange(0, count, tile_tokens, dtype=np.int32)
        tiles.append(np.stack((np.full_like(begins, index), begins, -(first + begins))))
        row += count
    if tiles:
        found = np.concatenate(tiles, axis=1)
        # Those of the longest context are begun first, so that no long one is left at the end.
        view.tiles[:, : found.shape[1]] = found[:2, np.argsort(found[2], kind="stable")]


def _write_samples(
    view: StepView, chunks: Ids[ScheduledChunk], sampling: Ids[int], random: random.Random
) -> None:  # fmt: skip
    columns: list[tuple[float, int, int, int, float]] = []
    for i in sampling:
        sequence, params = chunks[i].sequence, chunks[i].sequence.params
        seed = random.getrandbits(64) if params.seed is None else params.seed
        # A float64 may be infinite as a float32.
        temperature = min(params.temperature, HOTTEST)
        columns.append((temperature, seed, sequence.num_output_tokens, params.top_k, params.top_p))
    if not columns:
        return
    temperatures, seeds, indices, top_k, top_p = zip(*columns, strict=True)
    samples = view.samples[:, : len(columns)]
    last_rows = np.cumsum([chunk.num_new_tokens for chunk in chunks]) - 1
    samples[0] = last_rows[list(sampling)]
    samples[1] = np.array(temperatures, dtype=np.float32).view(np.int32)
    halves = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    samples[2] = (halves & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
    samples[3] = (halves >> np.uint64(32)).astype(np.uint32).view(np.int32)
    samples[4], samples[5] = indices, np.minimum(top_k, 2**31 - 1)
    samples[6] = np.array(top_p, dtype=np.float32).view(np.int32)
