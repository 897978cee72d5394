"""Steps on CUDA, launched without waiting for the one before: pinned memory in, CUDA graphs, next tokens out."""

import logging
import random
from collections.abc import Sequence as Ids
from typing import Any

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.cuda_decoder import CudaDecoder, Hidden
from hbserve_core.cuda_graphs import CudaGraphs, GraphShapes
from hbserve_core.kernels.prefill_attention import new_tokens_per_tile
from hbserve_core.loaded_model import LoadedModel
from hbserve_core.rank_group import RankGroup
from hbserve_core.runner import StepTokens
from hbserve_core.sequence import ScheduledChunk, Sequence
from hbserve_core.step_buffer import StepShape, StepView, order_chunks, write_step

logger = logging.getLogger(__name__)


class CudaRunner:
    """A model on a CUDA device. Steps run in order on a stream of its own; one may be launched before the last is read.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `LoadedModel`.
        InvalidInstanceConfig: a setting that cannot be.
        NotEnoughMemory: the pool does not fit.
    """

    overlaps = True

    def __init__(self, config: InstanceConfig, group: RankGroup | None = None) -> None:
        group = group or RankGroup()
        model = LoadedModel(config, group)
        self.config, self.model_config, self.device, self.dtype = config, model.model_config, model.device, model.dtype
        self.fingerprint = model.fingerprint
        torch.cuda.set_device(self.device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._random = random.Random(group.seed)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            self._decoder = CudaDecoder(model.rank_config, model.weights, processors, group)
            self._sampled = torch.zeros(config.max_num_seqs, dtype=torch.int32, device=self.device)
            scratch = torch.empty((1, *model.block.shape), dtype=self.dtype, device=self.device)
            self._tile_tokens = new_tokens_per_tile(scratch, model.rank_config.num_heads)
            self._shapes = GraphShapes(config, self._tile_tokens)
            self._make_buffers()
            self.pool = scratch
            reserved_bytes = self._measure_step()
            self.pool = model.allocate_pool(reserved_bytes)
            self._graphs = CudaGraphs(self._stream)
            self._graphs.capture(self._shapes.decodes, self._decode, f"{config.instance_id} decode")
            self._graphs.capture(self._shapes.prefills, self._hidden, f"{config.instance_id} prefill")
            self._stream.synchronize()
        self._sources: dict[Sequence, int] = {}
        self._turn = 0

    def _make_buffers(self) -> None:
        """Memory for the largest step there can be, on the device, and twice on the host: while the device still reads
        one step's, the next is written."""
        config, limit = self.config, self.model_config.max_model_len
        largest = StepShape(
            max(config.max_num_batched_tokens, config.max_num_seqs), config.max_num_seqs,
            config.max_num_batched_tokens // self._tile_tokens + config.max_num_seqs, config.max_num_seqs,
        )  # fmt: skip
        size = largest.fixed_size + config.max_num_seqs * -(-limit // config.block_size)
        self._on_device = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._on_host = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._read_back = [torch.zeros(config.max_num_seqs, dtype=torch.int32, pin_memory=True) for _ in range(2)]

    def _measure_step(self) -> int:
        """Bytes that the largest step takes besides weights and pool: it is computed once, with padding only."""
        config = self.config
        rows = max(config.max_num_batched_tokens, config.max_num_seqs)
        tiles = rows // self._tile_tokens + 1
        shape = StepShape(rows, 1, tiles, config.max_num_seqs)
        view = StepView(self._on_device, shape)
        view.tokens[1], view.tokens[3], view.tiles[0] = -1, -1, -1
        self._stream.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._decoder.finish(view, self._hidden(shape), self._sampled)
        self._stream.synchronize()
        step = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        # Graphs keep memory of their own, for no more than cuda_graph_max_seq_len rows.
        in_graphs = (
            max([1, *(shape.rows for shape in self._shapes.prefills)]) / rows if config.cuda_graph_enabled else 0
        )
        return int(step * (1.1 + min(1.0, 2 * in_graphs)))

    def close(self) -> None:
        """Nothing to end."""

    # ---- steps ---------------------------------------------------------------------------------------------------

    def run(self, batch: Ids[ScheduledChunk]) -> StepTokens:
        """Launch a step and wait for it."""
        return self.launch(batch).tokens() if batch else []

    def launch(self, batch: Ids[ScheduledChunk]) -> "CudaStep":
        order = order_chunks(batch)
        chunks = [batch[place] for place in order]
        shape = self._shapes.choose([chunk.num_new_tokens for chunk in chunks])
        turn = self._turn = 1 - self._turn
        host = self._on_host[turn]
        # A step of decodes samples every row, although a chunk of one token may stop short of its prompt's end.
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples or not shape.tiles]
        used = write_step(
            StepView(host.numpy(), shape), chunks, sampling, self._sources, self._random,
            block_size=self.config.block_size, tile_tokens=self._tile_tokens,
        )  # fmt: skip
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._on_device[:used].copy_(host[:used], non_blocking=True)
            self._compute(shape, len(sampling))
            read_back = self._read_back[turn][: len(sampling)]
            read_back.copy_(self._sampled[: len(sampling)], non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._sources = {chunks[i].sequence: row for row, i in enumerate(sampling)}
        places = [order[i] if chunks[i].samples else None for i in sampling]
        return CudaStep(done, read_back, places, len(batch))

    def _compute(self, shape: StepShape, num_samples: int) -> None:
        if shape.tiles == 0:
            if shape in self._graphs:
                self._graphs.replay(shape)
            else:
                self._decode(shape)
            return
        hidden = self._graphs.replay(shape) if shape in self._graphs else self._hidden(shape)
        if num_samples:
            view = StepView(self._on_device, shape)
            view.samples = view.samples[:, :num_samples]
            self._decoder.finish(view, hidden, self._sampled)

    def _decode(self, shape: StepShape) -> None:
        self._decoder.decode(StepView(self._on_device, shape), self._sampled, self.pool)

    def _hidden(self, shape: StepShape) -> Hidden:
        return self._decoder.hidden(StepView(self._on_device, shape), self._sampled, self.pool)


class CudaStep:
    """A step that the device computes, or has computed."""

    def __init__(self, done: Any, read_back: torch.Tensor, places: list[int | None], count: int) -> None:
        """places: for each token that is read back, its chunk's place in the batch, or None if nobody wants it."""
        self._done = done
        self._read_back = read_back
        self._places = places
        self._count = count

    def tokens(self) -> StepTokens:
        self._done.synchronize()
        result: StepTokens = [None] * self._count
        for place, token in zip(self._places, self._read_back.tolist(), strict=True):
            if place is not None:
                result[place] = token
        return result
