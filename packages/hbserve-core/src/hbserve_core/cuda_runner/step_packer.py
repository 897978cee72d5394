"""Packing of a batch into the numbers that a device reads, and assignment of the tokens that it samples to the batch.

A step is in one piece of memory, so that one copy brings it to the device. Its layout is as follows, all int32.
`StepShape` says how large each part is; only the last part's size differs between steps of one shape:
    header         1                 width of the tables
    tokens         (4, rows)         token id, source (see `embed`), position, slot (see `store_kv`)
    sequences      (3, sequences)    first row, new tokens, context with them
    pieces         (6, pieces)       of the decodes; see `SplitKV.cut`; row -1: none
    tiles          (2, tiles)        sequence (-1: none) and first new token; see kernels/prefill_attention.py
    last_tiles     (2, sequences)    of those, the ones whose last new token is sampled
    samples        (7, sequences)    row, and what kernels/sampling.py says of each
    tables         sequences * width block numbers of each sequence
Each part, and each of its rows, begins at a multiple of 16 bytes: kernels are compiled for that once, for all shapes.
Sequences are in the order of their rows: decodes, which are chunks of one token, before longer chunks.
"""

import random
import struct
from bisect import bisect_left
from collections.abc import Sequence as Ids
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.sequence import HOTTEST, UNREAD, ScheduledChunk, Sequence
from hbserve_core.engine.step import StepTokens
from hbserve_core.logits.prompt_logprobs import ScoredRows, scored_rows
from hbserve_core.logits.rows import LogitsRow, special_rows
from hbserve_rpc import SamplingParams
from hbserve_rpc.settings import ROWS_PER_SEQUENCE

_ALIGNMENT, _SMALLEST_PREFILL, _LARGEST_PREFILL_STEP = 4, 32, 128
_MOST_ALONE = 256
"""Most rows of a step with prompts for which there is another graph without decodes: leaving them out is worthwhile."""
_KERNELS_DIFFER = (32, 64, 128, 256, 512, 1024)
"""Numbers of rows of steps with prompts, one from each range in which the same kernels are chosen."""
TILE = 64
"""Number of tokens of which the length of a piece of a decode's context is a multiple."""
_MOST_PARTS, _AT_ONCE, _SIMILAR = 64, 4, 1.25
_PIECES = ((1, 2.5, 1 / 4), (_AT_ONCE, 3, 1 / 8), (float("inf"), _AT_ONCE, 1 / 8))
"""Numbers of pieces that are wanted: up to how many rows, how many, and by which part of one a row may be longer before
it is cut once more. Rows and pieces count once for each key head, and are those for each multiprocessor, which holds
`_AT_ONCE` programs. With fewer pieces a long context ends alone, with more some begin after all others. Measured in
docs/performance-kernels.md, "Attention of a decode step"."""


def _ceil_div(dividend: Any, divisor: Any) -> Any:
    return -(-dividend // divisor)


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's parts. Two steps of one shape differ only in the width of their tables."""

    rows: int
    sequences: int
    pieces: int
    tiles: int

    def fits(self, other: "StepShape") -> bool:
        """Return whether a step of this shape can be padded to the other."""
        return all(getattr(self, size) <= getattr(other, size) for size in self.__slots__)

    @property
    def fixed_size(self) -> int:
        """Count of numbers before the tables."""
        return _parts(self)[-1][1]


@lru_cache(maxsize=1024)
def _parts(shape: StepShape) -> list[tuple[int, int, int, int]]:
    """Return for each part where it begins and ends, its number of rows, and its numbers per row."""
    columns = (1, shape.rows, shape.sequences, shape.pieces, shape.tiles, shape.sequences, shape.sequences)
    found, first = [], 0
    for rows, count in zip((1, 4, 3, 6, 2, 2, 7), columns, strict=True):
        end = first + rows * _ceil_div(count, _ALIGNMENT) * _ALIGNMENT
        found.append((first, end, rows, count))
        first = end
    return found


class StepView:
    """Views of the parts of a step's memory, which is a flat int32 numpy array or torch tensor."""

    def __init__(self, memory: Any, shape: StepShape) -> None:
        self.shape = shape
        self.header, self.tokens, self.sequences, self.pieces, self.tiles, self.last_tiles, self.samples = [
            memory[first:end].reshape(rows, -1)[:, :columns] for first, end, rows, columns in _parts(shape)
        ]
        self.width = self.header[0]
        self.tables = memory[shape.fixed_size :]

    def clear(self) -> None:
        """Make this a step of padding only. What an earlier step has left here could mean anything."""
        self.tokens[::2], self.tokens[1::2] = 0, -1
        self.tiles[0] = self.last_tiles[0] = self.pieces[0] = -1
        # Padding is sampled greedily, which costs least.
        self.samples[:] = self.header[:] = 0


class SplitKV:
    """Split-KV: division of a step's decodes into pieces, for kernels/decode_attention.py, whose programs take one
    piece and one key head each.

    No piece takes much longer than the whole device takes for all, so neither a few long contexts among short ones nor
    a single one leaves multiprocessors idle. The number of rows bounds that of pieces, so a graph has room for all.
    """

    def __init__(self, num_kv_heads: int, num_processors: int) -> None:
        self._rows_per_processor = num_kv_heads / num_processors

    def _wanted(self, rows: int) -> tuple[int, float]:
        """Return how many pieces are wanted, and by which part of one a row may be longer; see `_PIECES`."""
        load = rows * self._rows_per_processor
        _, per_processor, slack = next(each for each in _PIECES if load <= each[0])
        return max(1, int(per_processor / self._rows_per_processor)), slack

    def most(self, rows: int) -> int:
        """Return the largest number of pieces that this many rows, or fewer, may have."""
        return rows + min(self._wanted(rows)[0], (_MOST_PARTS - 1) * rows)

    def cut(self, contexts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return pieces (6, P), by row and part: row, part, number of parts, first and last (exclusive) position taken
        from the pool, the new token's position. A row's last part has the new token.

        contexts: length of each row's context, at least 1. The device takes pieces in their order, so long contexts
        should come first.

        With 8 pieces wanted, contexts of 1000, 130 and 40 tokens ask for pieces of 1170 / 8 = 147 tokens. The first row
        would be 7 of them; 7 equal parts in whole tiles are of 3 tiles, 192 tokens; of these it takes 6.
            row         0    0    0    0    0    0   1    2
            part of   0/6  1/6  2/6  3/6  4/6  5/6 0/1  0/1
            first       0  192  384  576  768  960   0    0
            last      192  384  576  768  960  999 129   39
        """
        wanted, slack = self._wanted(len(contexts))
        length = max(TILE, _ceil_div(int(contexts.sum()), wanted), _ceil_div(int(contexts.max()), _MOST_PARTS))
        counts = np.maximum(1, _ceil_div(contexts - int(slack * length), length))
        is_similar = int(contexts.max()) * len(contexts) <= _SIMILAR * int(contexts.sum())
        if is_similar and counts.sum() > _AT_ONCE / self._rows_per_processor:
            counts[:] = 1
        spans = _ceil_div(contexts, counts * TILE) * TILE
        parts = _ceil_div(contexts, spans)
        rows = np.repeat(np.arange(len(contexts)), parts)
        places = np.arange(len(rows)) - (np.cumsum(parts) - parts)[rows]
        positions = contexts[rows] - 1
        firsts = places * spans[rows]
        lasts = np.minimum(firsts + spans[rows], positions)
        return np.stack((rows, places, parts[rows], firsts, lasts, positions)).astype(np.int32)


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Return decode graphs' numbers of rows, ascending. The last is `max_num_seqs`: every decode step has a graph."""
    small = [1, 2, 4, 8]
    return sorted({size for size in [*small, *range(16, max_num_seqs, 16)] if size < max_num_seqs} | {max_num_seqs})


def prefill_buckets(max_len: int, most: int = 0) -> list[int]:
    """Return the numbers of rows of the graphs for steps with prompt chunks, ascending: up to `max_len`, and with
    decodes beside such a chunk up to `most`.

    There are four in an octave, and one every 128 rows between 512 and 2048, because a large product computes 128 rows
    at a time. A step is padded to the next graph, and padding takes as long as a prompt's own tokens. Beyond `max_len`
    there is one every 128 rows too: a hybrid instance most often computes a whole chunk and some decodes.
    """
    sizes, size = [], _SMALLEST_PREFILL
    while size < max_len:
        sizes.append(size)
        octave = 1 << (size.bit_length() - 1)
        size += max(_SMALLEST_PREFILL, min(octave // 4, _LARGEST_PREFILL_STEP), octave // 8)
    beside = {*range(max_len + _LARGEST_PREFILL_STEP, most, _LARGEST_PREFILL_STEP), max(most, max_len)}
    return sorted({*sizes, max_len, *beside}) if max_len >= _SMALLEST_PREFILL else []


class GraphShapes:
    """Shapes of steps that have a CUDA graph, and the choice to which of them a batch is padded.

    Decode steps always have a graph. Steps with prompt chunks have one if they are not larger than `most_graph_tokens`
    and do not have too many sequences; others get the shape that fits them exactly.
    """

    def __init__(self, config: InstanceConfig, tile_tokens: int, pieces: SplitKV) -> None:
        self._tile_tokens = tile_tokens
        self._pieces = pieces
        num_seqs, has_graphs = config.max_num_seqs, config.cuda_graph_enabled
        longest_chunk = min(config.cuda_graph_max_seq_len, config.max_num_batched_tokens)
        buckets = prefill_buckets(longest_chunk, config.most_graph_tokens) if has_graphs else []
        decodes = [self._shape(size, size, size, 0) for size in decode_buckets(num_seqs)]
        prefills = [self._prefill_shape(size, num_seqs) for size in buckets]
        alone = [replace(shape, pieces=0) for shape in prefills if shape.rows <= _MOST_ALONE]
        self.decodes = decodes if has_graphs else []
        self.prefills = sorted(alone + prefills, key=attrgetter("rows"))
        between = range(max(buckets, default=0) + 1, config.max_num_batched_tokens)
        larger = [self._prefill_shape(size, num_seqs) for size in _KERNELS_DIFFER if size in between]
        self.without_graph = larger if has_graphs else decodes + larger
        """Shapes which, with those that have a graph and the largest step, run every kernel that a step may run."""

    def _prefill_shape(self, rows: int, max_num_seqs: int) -> StepShape:
        sequences = min(max_num_seqs, max(8, rows // ROWS_PER_SEQUENCE))
        return self._shape(rows, sequences, sequences, rows // self._tile_tokens + sequences)

    def _shape(self, rows: int, sequences: int, num_decodes: int, tiles: int) -> StepShape:
        return StepShape(rows, sequences, self._pieces.most(num_decodes), tiles)

    def largest(self, rows: int, max_num_seqs: int) -> StepShape:
        """Return a shape into which any step of this many rows and sequences fits."""
        return self._shape(rows, max_num_seqs, max_num_seqs, rows // self._tile_tokens + max_num_seqs)

    def choose(self, counts: list[int]) -> StepShape:
        """Choose the shape for a batch of chunks with these numbers of new tokens."""
        num_tiles = sum(_ceil_div(count, self._tile_tokens) for count in counts if count > 1)
        exact = self._shape(sum(counts), len(counts), counts.count(1), num_tiles)
        shapes = self.prefills if num_tiles else self.decodes
        first = bisect_left(shapes, exact.rows, key=attrgetter("rows"))
        return next((shape for shape in shapes[first:] if exact.fits(shape)), exact)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """Knowledge of the host about a step that a device computes."""

    shape: StepShape
    used: int
    """Count of numbers of its memory that are used."""
    places: list[int | None]
    """Position in the batch of each sampled token's chunk, or None if nobody wants the token."""
    batch_size: int
    special: list[LogitsRow]
    """Samples among `places` whose tokens are drawn again, by hbserve_core/logits."""
    scored: list[ScoredRows]
    """Rows that score prompt tokens."""

    def tokens(self, sampled: Ids[int]) -> StepTokens:
        """Return each chunk's next token, or None; `sampled` are the step's tokens, one for each of `places`."""
        result: StepTokens = [None] * self.batch_size
        for place, token in zip(self.places, sampled, strict=True):
            if place is not None:
                result[place] = token
        return result


def _scored(chunks: Ids[ScheduledChunk], places: Ids[int]) -> list[ScoredRows]:
    """Return the scored rows of chunks that are in the order of their rows and have these positions in the batch."""
    firsts = accumulate((chunk.num_new_tokens for chunk in chunks), initial=0)
    found = [scored_rows(*each) for each in zip(chunks, places, firsts, strict=False)]
    return [each for each in found if each is not None]


class StepPacker:
    """Packer of one step after another. It remembers where the last step puts tokens that have not been read yet."""

    def __init__(self, config: InstanceConfig, tile_tokens: int, pieces: SplitKV, seed: int | None = None) -> None:
        """tile_tokens: new tokens that one program of prefill attention takes. pieces: divides decodes into pieces.

        seed: seed for requests that bring none of their own; None for a different one in each process.
        """
        self.shapes = GraphShapes(config, tile_tokens, pieces)
        self._block_size = config.block_size
        self._in_block = np.arange(config.block_size, dtype=np.int32)
        self._tile_tokens = tile_tokens
        self._pieces = pieces
        self._random = random.Random(seed)
        self._sources: dict[Sequence, int] = {}
        """Place of each sequence's token among those that the previous step samples."""
        self._sampled: list[Sequence] = []
        """Sequences of the last step with samples, usually also the next one's; `_asked` and `_unseeded` are theirs."""
        self._asked = asked_of_samples([])
        """Parameters of those sequences, (7, N), see `asked_of_samples`."""
        self._unseeded: list[int] = []
        """Places of those sequences that bring no seed."""

    def pack(self, batch: Ids[ScheduledChunk], memory: Any) -> PackedStep:
        """Write a step to `memory`, a flat int32 numpy array with room for `shapes.largest` and the tables."""
        # Decodes come first, and long contexts first among them, so that the last ones to end are short.
        keys = [(chunk.num_new_tokens > 1, -chunk.sequence.num_computed_tokens) for chunk in batch]
        order = sorted(range(len(batch)), key=keys.__getitem__)
        chunks = [batch[place] for place in order]
        counts = [chunk.num_new_tokens for chunk in chunks]
        shape, num_decodes = self.shapes.choose(counts), counts.count(1)
        view = StepView(memory, shape)
        view.clear()
        self._write_decodes(view, chunks[:num_decodes])
        self._write_prefills(view, chunks[num_decodes:], num_decodes)
        tables_size = self._write_tables(view, chunks)
        # A step of decodes samples every row, although a chunk of one token may end before its prompt does.
        samples = [chunk.samples for chunk in chunks]
        sampling = [i for i, is_last in enumerate(samples) if is_last or not shape.tiles]
        sequences = [chunks[i].sequence for i in sampling]
        ends = [*accumulate(counts)]
        self._write_samples(view, sequences, [ends[i] - 1 for i in sampling])
        places = [order[i] if samples[i] else None for i in sampling]
        special = [
            found
            for row, (i, sequence) in enumerate(zip(sampling, sequences, strict=True))
            if sequence.is_special and samples[i]
            for found in special_rows(row, sequence, self._sources.get(sequence, -1))
        ]
        self._sources = {sequence: row for row, sequence in enumerate(sequences)}
        # A step of decodes that all yield tokens, the most common kind, is not searched.
        scored = _scored(chunks, order) if shape.tiles or None in places else []
        return PackedStep(shape, shape.fixed_size + tables_size, places, len(batch), special, scored)

    def _write_decodes(self, view: StepView, chunks: Ids[ScheduledChunk]) -> None:
        if chunks:
            sequences, count = [chunk.sequence for chunk in chunks], len(chunks)
            positions = [sequence.num_computed_tokens for sequence in sequences]
            tokens = [each.token_ids[position] for each, position in zip(sequences, positions, strict=True)]
            view.tokens[0, :count] = _int32(tokens)
            view.tokens[1, :count] = [
                self._sources[each] if token == UNREAD else -1 for each, token in zip(sequences, tokens, strict=True)
            ]
            view.tokens[2, :count] = _int32(positions)
            view.tokens[3, :count] = -2
            view.sequences[0, :count] = np.arange(count)
            view.sequences[1, :count] = 1
            contexts = view.sequences[2, :count] = view.tokens[2, :count] + 1
            cut = self._pieces.cut(contexts)
            view.pieces[:, : cut.shape[1]] = cut

    def _write_prefills(self, view: StepView, chunks: Ids[ScheduledChunk], num_decodes: int) -> None:
        row, num_tiles, num_last, block_size = num_decodes, 0, 0, self._block_size
        for index, chunk in enumerate(chunks, num_decodes):
            sequence, count = chunk.sequence, chunk.num_new_tokens
            first = sequence.num_computed_tokens
            rows = slice(row, row + count)
            view.tokens[0, rows] = _int32(sequence.token_ids[first : first + count])
            view.tokens[2, rows] = np.arange(first, first + count, dtype=np.int32)
            before = first // block_size
            blocks = np.asarray(sequence.block_table[before : _ceil_div(first + count, block_size)], dtype=np.int32)
            slots = np.add.outer(blocks * block_size, self._in_block).reshape(-1)
            view.tokens[3, rows] = slots[first - before * block_size :][:count]
            view.sequences[:, index] = row, count, first + count
            tiles = view.tiles[:, num_tiles : num_tiles + _ceil_div(count, self._tile_tokens)]
            # The longest contexts begin first, so that no long one remains at the end.
            tiles[0] = index
            tiles[1] = np.arange((tiles.shape[1] - 1) * self._tile_tokens, -1, -self._tile_tokens, dtype=np.int32)
            if chunk.samples:
                view.last_tiles[:, num_last] = tiles[:, 0]
                num_last += 1
            num_tiles += tiles.shape[1]
            row += count
        if len(chunks) > 1:
            tiles = view.tiles[:, :num_tiles]
            contexts = tiles[1] + (view.sequences[2] - view.sequences[1])[tiles[0]]
            tiles[:] = tiles[:, np.argsort(-contexts, kind="stable")]

    def _write_tables(self, view: StepView, chunks: Ids[ScheduledChunk]) -> int:
        """Write the sequences' block tables, and return how many numbers they have."""
        last = max([chunk.sequence.num_computed_tokens + chunk.num_new_tokens for chunk in chunks])
        width = _ceil_div(last, self._block_size)
        view.width[:] = width
        tables = [chunk.sequence.block_table for chunk in chunks]
        lengths = [len(table) for table in tables]
        if max(lengths) > width:  # there is a chunk that is not the last one of its prompt
            tables = [table[:width] for table in tables]
            lengths = [len(table) for table in tables]
        target = view.tables[: len(chunks) * width]
        numbers = np.frombuffer(b"".join(tables), dtype=np.int32)  # a single loop, and not in Python
        if len(numbers) == len(target):
            target[:] = numbers
        else:
            inside = np.arange(width) < np.array(lengths)[:, np.newaxis]
            target.reshape(inside.shape)[inside] = numbers
        return len(target)

    def _write_samples(self, view: StepView, sequences: list[Sequence], rows: list[int]) -> None:
        """Write what is needed to sample for these sequences; rows: the last row of each."""
        if not sequences:
            return
        if sequences != self._sampled:
            self._sampled, self._asked = sequences, asked_of_samples([each.params for each in sequences])
            self._unseeded = [row for row, each in enumerate(sequences) if each.params.seed is None]
        samples = view.samples[:, : len(sequences)]
        samples[:] = self._asked
        samples[0] = rows
        drawn = np.frombuffer(self._random.randbytes(8 * len(self._unseeded)), dtype=np.int32)
        samples[2:4, self._unseeded] = drawn.reshape(2, -1)
        samples[4] = [len(each.token_ids) - each.num_prompt_tokens for each in sequences]


def asked_of_samples(params: Ids[SamplingParams]) -> npt.NDArray[np.int32]:
    """Return sampling parameters (7, N), laid out as in a step's memory: those that all tokens of a request share."""
    most_k, seed_bits, pack = 2**31 - 1, 2**64 - 1, struct.Struct("<ifQiif").pack  # a seed's halves are two numbers
    # A float64 may be beyond the range of float32.
    asked = [
        pack(0, min(each.temperature, HOTTEST), (each.seed or 0) & seed_bits, 0, min(each.top_k, most_k), each.top_p)
        for each in params
    ]
    return np.frombuffer(b"".join(asked), dtype=np.int32).reshape(-1, 7).T


def _int32(numbers: list[int]) -> npt.NDArray[np.int32]:
    """Make an int32 array of numbers, by struct, which reads a list in half of numpy's time."""
    return np.frombuffer(struct.pack(f"{len(numbers)}i", *numbers), dtype=np.int32)
