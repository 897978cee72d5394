"""Steps on CUDA, launched without waiting for the one before: pinned memory in, CUDA graphs, next tokens out."""

import logging
import time
from collections.abc import Sequence as Ids
from typing import Any

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.cuda_runner.decoder import CudaDecoder
from hbserve_core.cuda_runner.graphs import CudaGraphs
from hbserve_core.cuda_runner.kernels.dependent_launch import num_processors
from hbserve_core.cuda_runner.kernels.host_copy import host_copy
from hbserve_core.cuda_runner.kernels.prefill_attention import new_tokens_per_tile
from hbserve_core.cuda_runner.split_kv import DecodePieces
from hbserve_core.cuda_runner.step_buffer import StepShape, StepView
from hbserve_core.cuda_runner.step_packer import PackedStep, StepPacker
from hbserve_core.engine.runner import StepTokens
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.model.loaded_model import LoadedModel
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.rank_group import RankGroup

logger = logging.getLogger(__name__)


class CudaRunner:
    """A model on a CUDA device. Steps run in order on a stream of its own; one may be launched before the last is read.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `LoadedModel`.
        InvalidInstanceConfig: a setting that cannot be.
        NotEnoughMemory: the pool does not fit.
    """

    overlaps = True
    transfer_addresses: Ids[str] = ()

    def __init__(self, config: InstanceConfig, group: RankGroup | None = None) -> None:
        group = group or RankGroup()
        model = LoadedModel(config, group)
        self.config, self.model_config, self.device, self.dtype = config, model.model_config, model.device, model.dtype
        self.fingerprint = model.fingerprint
        torch.cuda.set_device(self.device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            scratch = torch.empty((1, *model.block.shape), dtype=self.dtype, device=self.device)
            self._packer = self._make_packer(scratch, model.rank_config, group.seed)
            self._shapes = self._packer.shapes
            self._largest = self._shapes.largest(
                max(config.max_num_batched_tokens, config.max_num_seqs), config.max_num_seqs
            )
            self._decoder = CudaDecoder(model.rank_config, model.weights, self._largest, group)
            self._sampled = torch.zeros(config.max_num_seqs, dtype=torch.int32, device=self.device)
            self._make_buffers()
            self.pool = scratch
            begin = time.perf_counter()
            reserved_bytes = self._measure_step()
            logger.info(
                "%s: kernels compiled, or found in Triton's cache, in %.1f s; a step takes up to %.0f MiB",
                config.instance_id, time.perf_counter() - begin, reserved_bytes / 2**20,
            )  # fmt: skip
            self.pool = model.allocate_pool(reserved_bytes)
            self._graphs = CudaGraphs(self._stream)
            group.on_close = self._graphs.close
            self._graphs.capture(self._shapes.decodes, self._clear, self._decode, f"{config.instance_id} decode")
            self._graphs.capture(self._shapes.prefills, self._clear, self._hidden, f"{config.instance_id} prefill")
            self._stream.synchronize()
        self._turn = 0

    def _make_packer(self, pool: torch.Tensor, model: ModelConfig, seed: int | None) -> StepPacker:
        pieces = DecodePieces(model.num_kv_heads, num_processors(self.device))
        return StepPacker(self.config, new_tokens_per_tile(pool, model.num_heads), pieces, seed)

    def _make_buffers(self) -> None:
        """Memory for the largest step there can be, on the device, and twice on the host: while the device still reads
        one step's, the next is written."""
        config = self.config
        blocks_per_sequence = -(-self.model_config.max_model_len // config.block_size)
        size = self._largest.fixed_size + config.max_num_seqs * blocks_per_sequence
        self._on_device = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._on_host = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._read_back = [torch.zeros(config.max_num_seqs, dtype=torch.int32, pin_memory=True) for _ in range(2)]

    def _measure_step(self) -> int:
        """Bytes that the largest step takes besides weights and pool: it is computed once, with padding only."""
        config = self.config
        shape = self._largest
        self._clear(shape)
        self._stream.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._decoder.finish(StepView(self._on_device, shape), self._hidden(shape), self._sampled)
        self._stream.synchronize()
        step = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        # Graphs keep memory of their own, for no more than cuda_graph_max_seq_len rows.
        in_graphs = (
            max([1, *(shape.rows for shape in self._shapes.prefills)]) / shape.rows if config.cuda_graph_enabled else 0
        )
        return int(step * (1.1 + min(1.0, 2 * in_graphs)))

    def close(self) -> None:
        """Nothing to end."""

    # ---- steps ---------------------------------------------------------------------------------------------------

    def run(self, batch: Ids[ScheduledChunk]) -> StepTokens:
        """Launch a step and wait for it."""
        return self.launch(batch).tokens() if batch else []

    def launch(self, batch: Ids[ScheduledChunk]) -> "CudaStep":
        turn = self._turn = 1 - self._turn
        host = self._on_host[turn]
        step = self._packer.pack(batch, host.numpy())
        num_samples = len(step.places)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            host_copy(self._on_device[: step.used], host)
            self._compute(step.shape, num_samples)
            read_back = self._read_back[turn][:num_samples]
            host_copy(read_back, self._sampled)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return CudaStep(step, done, read_back)

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

    def _clear(self, shape: StepShape) -> None:
        StepView(self._on_device, shape).clear()

    def _decode(self, shape: StepShape) -> None:
        self._decoder.decode(StepView(self._on_device, shape), self._sampled, self.pool)

    def _hidden(self, shape: StepShape) -> torch.Tensor:
        return self._decoder.hidden(StepView(self._on_device, shape), self._sampled, self.pool)


class CudaStep:
    """A step that the device computes, or has computed."""

    def __init__(self, step: PackedStep, done: Any, read_back: torch.Tensor) -> None:
        self._step = step
        self._done = done
        self._read_back = read_back

    def tokens(self) -> StepTokens:
        self._done.synchronize()
        return self._step.tokens(self._read_back.tolist())
