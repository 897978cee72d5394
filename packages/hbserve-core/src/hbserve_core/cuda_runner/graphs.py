"""Which steps run as CUDA graphs, and the graphs themselves, one for each shape of step."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from hbserve_core.config import InstanceConfig
from hbserve_core.cuda_runner.split_kv import DecodePieces
from hbserve_core.cuda_runner.step_buffer import StepShape
from hbserve_core.errors import RankFailed

logger = logging.getLogger(__name__)

_SMALLEST_PREFILL = 32


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Numbers of rows of the decode graphs, ascending. The last is `max_num_seqs`, so every decode step has one."""
    small = [1, 2, 4, 8]
    return sorted({size for size in [*small, *range(16, max_num_seqs, 16)] if size < max_num_seqs} | {max_num_seqs})


def prefill_buckets(max_len: int) -> list[int]:
    """Numbers of rows of the graphs for steps with prompt chunks, ascending, up to `max_len`."""
    sizes = []
    size = _SMALLEST_PREFILL
    while size < max_len:
        sizes.append(size)
        size *= 2
    return [*sizes, max_len] if max_len >= _SMALLEST_PREFILL else []


class GraphShapes:
    """The shape of step that a batch is padded to.

    Decode steps have a graph in any case. Steps with prompt chunks have one if they are not larger than
    `cuda_graph_max_seq_len` tokens and not made of too many sequences; others get the shape that fits them exactly.
    """

    def __init__(self, config: InstanceConfig, tile_tokens: int, pieces: DecodePieces) -> None:
        longest = min(config.cuda_graph_max_seq_len, config.max_num_batched_tokens)
        decodes = decode_buckets(config.max_num_seqs) if config.cuda_graph_enabled else []
        prefills = prefill_buckets(longest) if config.cuda_graph_enabled else []
        self._tile_tokens = tile_tokens
        self._pieces = pieces
        self.decodes = [self._shape(size, size, size, 0) for size in decodes]
        self.prefills = [self._prefill_shape(size, config.max_num_seqs) for size in prefills]

    def _prefill_shape(self, rows: int, max_num_seqs: int) -> StepShape:
        sequences = min(max_num_seqs, max(8, rows // 8))
        return self._shape(rows, sequences, sequences, rows // self._tile_tokens + sequences)

    def _shape(self, rows: int, sequences: int, num_decodes: int, tiles: int) -> StepShape:
        return StepShape(rows, sequences, self._pieces.most(num_decodes), tiles, sequences)

    def largest(self, rows: int, max_num_seqs: int) -> StepShape:
        """What any step of so many rows and sequences fits into."""
        return self._shape(rows, max_num_seqs, max_num_seqs, rows // self._tile_tokens + max_num_seqs)

    def choose(self, counts: list[int]) -> StepShape:
        """For a batch of chunks with so many new tokens each."""
        num_tiles = sum(-(-count // self._tile_tokens) for count in counts if count > 1)
        exact = self._shape(sum(counts), len(counts), counts.count(1), num_tiles)
        for shape in self.prefills if num_tiles else self.decodes:
            if exact.fits(shape):
                return shape
        return exact


class CudaGraphs:
    """Captured work by shape of step. All graphs share one pool of memory: only one runs at a time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._memory: Any = None
        self._lock = threading.Lock()
        self._is_closed = False

    def capture(
        self, shapes: list[StepShape], prepare: Callable[[StepShape], None], work: Callable[[StepShape], Any], name: str
    ) -> None:
        """Capture `work(shape)` for each shape, the largest first. It must only queue kernels on memory that stays.

        `prepare(shape)` puts something there that it can be run on before.
        """
        begin, before = time.perf_counter(), torch.cuda.memory_reserved(self._stream.device)
        for shape in self._with_progress(shapes, name):
            prepare(shape)
            work(shape)  # compiles kernels and makes workspaces, which cannot be done during capture
            graph = torch.cuda.CUDAGraph()
            # Other threads may use CUDA meanwhile: NCCL's, or another engine's.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                result = work(shape)
            self._memory = self._memory or graph.pool()
            with self._lock:
                self._check_open()
                self._graphs[shape] = (graph, result)
        used = torch.cuda.memory_reserved(self._stream.device) - before
        logger.info(
            "%s: %d graphs captured in %.1f s, %.0f MiB", name, len(shapes), time.perf_counter() - begin, used / 2**20
        )

    @staticmethod
    def _with_progress(shapes: list[StepShape], name: str) -> Iterator[StepShape]:
        # Without a terminal there is no bar, only the line at the end.
        largest_first = sorted(shapes, key=lambda shape: -shape.rows)
        return iter(tqdm(largest_first, desc=f"{name} graphs", disable=None, leave=False))

    def replay(self, shape: StepShape) -> Any:
        """Queue a shape's work, and return what `work` returned: results that stay until the next replay."""
        with self._lock:
            self._check_open()
            graph, result = self._graphs[shape]
            graph.replay()
        return result

    def _check_open(self) -> None:
        if self._is_closed:
            raise RankFailed("the ranks are being closed")

    def close(self) -> None:
        """Free all graphs, even one that runs. From any thread, and more than once; a replay raises RankFailed then."""
        with self._lock:
            self._is_closed = True
            for graph, _ in self._graphs.values():
                graph.reset()
            self._graphs.clear()

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self._graphs
