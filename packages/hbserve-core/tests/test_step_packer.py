"""What a CUDA step is told, without a GPU: shapes of graphs, block tables, and places of unread tokens."""

from array import array
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hbserve_core import InstanceConfig
from hbserve_core.cuda_runner.step_packer import (
    GraphShapes,
    SplitKV,
    StepPacker,
    StepView,
    decode_buckets,
    prefill_buckets,
)
from hbserve_core.engine.sequence import UNREAD, ScheduledChunk, Sequence
from hbserve_rpc import SamplingParams

BLOCK, TILE_TOKENS = 4, 8
PIECES = SplitKV(num_kv_heads=2, num_processors=4)


def config(**settings):
    return InstanceConfig(
        model_path="none", block_size=BLOCK, **({"max_num_seqs": 6, "max_num_batched_tokens": 64} | settings)
    )


def sequence(name, num_tokens, computed, **params):
    found = Sequence(name, list(range(100, 100 + num_tokens)), num_tokens, SamplingParams(**params))
    found.num_computed_tokens = computed
    found.block_table = array("i", [int(name) * 10 + i for i in range(-(-num_tokens // BLOCK) + 1)])
    return found


class Packer:
    """A packer and its memory, full of numbers that no step may be left with."""

    def __init__(self, **settings):
        self.packer = StepPacker(config(**settings), TILE_TOKENS, PIECES)
        self.memory = np.full(4096, 54321, dtype=np.int32)

    def pack(self, *chunks):
        step = self.packer.pack([ScheduledChunk(*chunk) for chunk in chunks], self.memory)
        return step, StepView(self.memory, step.shape)


@pytest.mark.parametrize("most", [1, 2, 7, 16, 17, 250, 256, 512])
def test_decode_graphs_end_exactly_at_the_largest_batch(most):
    buckets = decode_buckets(most)
    assert buckets[-1] == most
    assert buckets == sorted(set(buckets))
    # Padding is at most half of a small step, and 15 rows of a large one.
    for rows in range(1, most + 1):
        bucket = next(size for size in buckets if size >= rows)
        assert bucket < 2 * rows or bucket - rows < 16


def test_prefill_graphs_end_at_the_longest_step_that_may_have_one():
    assert prefill_buckets(300) == [32, 64, 96, 128, 160, 192, 224, 256, 300]
    assert prefill_buckets(31) == []
    for max_len in (1000, 2048, 8192):
        buckets = prefill_buckets(max_len)
        assert buckets[-1] == max_len
        assert buckets == sorted(set(buckets))
        # Of a prompt that is not short, less than a fifth is computed for nothing.
        assert all(after < 1.25 * (before + 1) or after - before <= 32 for before, after in pairwise(buckets))
        assert len(buckets) < 50
    shapes = GraphShapes(config(max_num_batched_tokens=128, cuda_graph_max_seq_len=300), TILE_TOKENS, PIECES)
    assert [shape.rows for shape in shapes.prefills] == [32, 32, 64, 64, 96, 96, 128, 128]


def test_the_longest_chunk_has_a_graph_with_decodes_beside_it_too():
    settings = config(max_num_batched_tokens=8192, cuda_graph_max_seq_len=2048, max_num_seqs=256)
    shapes = GraphShapes(settings, TILE_TOKENS, PIECES)
    assert settings.most_graph_tokens == 2304
    for num_decodes, rows in ((0, 2048), (1, 2176), (128, 2176), (129, 2304), (255, 2304)):
        assert shapes.choose([1] * num_decodes + [2048]) in shapes.prefills
        assert shapes.choose([1] * num_decodes + [2048]).rows == rows
    assert shapes.choose([1] * 256 + [2049]) not in shapes.prefills
    few = config(max_num_batched_tokens=8192, cuda_graph_max_seq_len=2048, max_num_seqs=4)
    assert [shape.rows for shape in GraphShapes(few, TILE_TOKENS, PIECES).prefills][-2:] == [2048, 2052]
    assert config(cuda_graph_enabled=False).most_graph_tokens == 0


def test_a_short_step_with_prompts_has_one_graph_with_decodes_and_one_without():
    shapes = GraphShapes(config(max_num_batched_tokens=512, cuda_graph_max_seq_len=512), TILE_TOKENS, PIECES)
    alone, beside, longer = (shapes.choose(counts) for counts in ([250], [1, 249], [500]))
    assert {alone, beside, longer} <= {*shapes.prefills}
    assert alone.rows == beside.rows == 256
    assert [shape.pieces > 0 for shape in (alone, beside, longer)] == [False, True, True]


def test_each_decode_step_has_a_graph_and_without_graphs_the_shape_that_fits_it():
    shapes = GraphShapes(config(max_num_seqs=21), TILE_TOKENS, PIECES)
    for rows in range(1, 22):
        shape = shapes.choose([1] * rows)
        assert shape in shapes.decodes
        assert shape.rows >= rows
    exact = GraphShapes(config(cuda_graph_enabled=False), TILE_TOKENS, PIECES).choose([1, 1, 9])
    assert (exact.rows, exact.sequences, exact.tiles) == (11, 3, 2)


def test_a_step_that_is_too_long_or_of_too_many_sequences_runs_without_a_graph():
    shapes = GraphShapes(config(max_num_seqs=64, cuda_graph_max_seq_len=32), TILE_TOKENS, PIECES)
    assert shapes.choose([20, 12]) in shapes.prefills
    assert shapes.choose([37]) not in shapes.prefills
    assert shapes.choose([2] * 16) not in shapes.prefills


def test_decodes_come_first_and_each_chunk_finds_its_blocks():
    packer = Packer(cuda_graph_enabled=False)
    prompt, decode = sequence("1", 10, 3), sequence("2", 6, 5)
    step, view = packer.pack((prompt, 5), (decode, 1))
    assert view.tokens[0].tolist() == [105, 103, 104, 105, 106, 107]
    assert view.tokens[2].tolist() == [5, 3, 4, 5, 6, 7]
    # The decode stores its own token; the prompt's tokens go to blocks 10 and 11.
    assert view.tokens[3].tolist() == [-2, 43, 44, 45, 46, 47]
    assert view.sequences.tolist() == [[0, 1], [1, 5], [6, 8]]
    assert view.tables[:4].reshape(2, 2).tolist() == [[20, 21], [10, 11]]
    assert view.width.tolist() == [2]
    # The prompt is not at its end, so only the decode samples.
    assert step.places == [1]
    assert step.tokens([7]) == [None, 7]


def test_tiles_of_the_longest_context_come_first():
    packer = Packer(cuda_graph_enabled=False)
    _, view = packer.pack((sequence("1", 20, 0), 20), (sequence("2", 40, 30), 10))
    # Sequence 0 is the one that goes on from token 30.
    assert view.tiles.T.tolist() == [[0, 8], [0, 0], [1, 16], [1, 8], [1, 0]]
    assert view.last_tiles.T.tolist() == [[0, 8], [1, 16]]


def test_the_last_layer_s_tiles_are_those_of_chunks_that_are_sampled():
    packer = Packer()
    _, view = packer.pack((sequence("1", 20, 0), 17), (sequence("2", 40, 30), 10), (sequence("3", 5, 4), 1))
    assert view.sequences[:, :3].tolist() == [[0, 1, 11], [1, 10, 17], [5, 40, 17]]
    first, *others = view.last_tiles.T.tolist()
    assert first == [1, 8]
    assert {tile for tile, _ in others} == {-1}


def test_an_unread_token_is_taken_from_where_the_step_before_puts_it():
    packer = Packer()
    sequences = [sequence("1", 5, 4), sequence("2", 9, 8), sequence("3", 7, 6)]
    packer.pack(*((each, 1) for each in sequences))
    for each in sequences:
        each.num_computed_tokens += 1
        each.token_ids.append(UNREAD)
    # The longest context comes first in every step: the first had rows 2, 0 and 1.
    _, view = packer.pack((sequences[0], 1), (sequences[2], 1))
    assert view.tokens[1, :2].tolist() == [1, 2]


def test_what_the_same_requests_ask_for_is_theirs_in_every_step_and_others_have_their_own():
    """It is kept from step to step as long as they are the same."""
    packer = Packer()
    asked: list[dict[str, Any]] = [
        {"temperature": 0.5, "top_k": 3, "seed": 2**63 - 1}, {"temperature": 0.75, "top_p": 0.5}, {"seed": 7},
    ]  # fmt: skip
    sequences = [sequence(str(i), 9 - i, 8 - i, **params) for i, params in enumerate(asked)]
    seeds = []
    for chosen in ([0, 1, 2], [0, 1, 2], [0, 2], [1, 2], [0, 1, 2]):
        batch = [sequences[i] for i in chosen]
        _, view = packer.pack(*((each, 1) for each in batch))
        samples = view.samples[:, : len(batch)]
        for each, (row, temperature, low, high, index, top_k, top_p) in zip(batch, samples.T.tolist(), strict=True):
            found = np.array([temperature, top_p], dtype=np.int32).view(np.float32).tolist()
            expected = each.params
            assert found == [np.float32(expected.temperature), np.float32(expected.top_p)]
            assert (row, top_k) == (batch.index(each), expected.top_k)
            assert index == each.num_output_tokens
            seed = (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32
            if expected.seed is None:
                seeds.append(seed)
            else:
                assert seed == expected.seed
        for each in batch:
            each.num_computed_tokens += 1
            each.token_ids.append(5)
    assert len(set(seeds)) == 4, "each token of a request without a seed is drawn by another number"


def test_padding_holds_nothing_of_earlier_steps():
    packer = Packer(max_num_seqs=5)
    _, view = packer.pack((sequence("1", 9, 8, temperature=0.5, top_p=0.3, seed=7), 1), (sequence("2", 3, 2), 1),
                          (sequence("3", 3, 2), 1))  # fmt: skip
    assert view.shape.rows == 4
    assert view.tokens[:, 3].tolist() == [0, -1, 0, -1]
    assert not view.samples[:, 3].any()
    used = sum(row >= 0 for row in view.pieces[0].tolist())
    assert used == 3
    assert (view.pieces[0, used:] == -1).all()
    assert (view.tiles[0] == -1).all()


def test_every_row_of_a_part_begins_at_a_multiple_of_16_bytes():
    packer = Packer()
    _, view = packer.pack((sequence("1", 9, 2), 7), (sequence("2", 3, 2), 1))
    begin = packer.memory.ctypes.data
    for part in (view.header, view.tokens, view.sequences, view.pieces, view.tiles, view.last_tiles, view.samples):
        for row in part:
            assert (row.ctypes.data - begin) % 16 == 0
    assert (view.tables.ctypes.data - begin) % 16 == 0


def test_decodes_are_cut_as_their_worked_example_says():
    cut = SplitKV(num_kv_heads=5, num_processors=16).cut(np.array([1000, 130, 40], dtype=np.int32))
    assert cut.tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 0, 0],
        [6, 6, 6, 6, 6, 6, 1, 1],
        [0, 192, 384, 576, 768, 960, 0, 0],
        [192, 384, 576, 768, 960, 999, 129, 39],
        [999, 999, 999, 999, 999, 999, 129, 39],
    ]
