"""Steps on CUDA, each launched without waiting for the previous one.

    batch ─pack▶ pinned memory ─copy▶ device ─graph, or kernels▶ tokens ─host_copy▶ pinned memory ─wait▶ tokens

A step's sampled tokens also stay on the device, where the next step's first kernel finds them. Rows whose requests ask
for more than temperature, top-k and top-p are sampled again afterwards, by hbserve_core/logits.

Shapes: T rows of one step, E hidden_size. The pool: see model/kv_pool.py. A step in memory: see step_packer.py.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from typing import Any

import torch
from tqdm import tqdm

from hbserve_core.config import InstanceConfig
from hbserve_core.cuda_runner.decoder import CudaDecoder
from hbserve_core.cuda_runner.kernels.dependent_launch import num_processors
from hbserve_core.cuda_runner.kernels.pointwise import host_copy
from hbserve_core.cuda_runner.kernels.prefill_attention import new_tokens_per_tile
from hbserve_core.cuda_runner.step_packer import PackedStep, SplitKV, StepPacker, StepShape, StepView
from hbserve_core.cuda_runner.warm_up import run_steps_without_graph
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.engine.step import PendingStep, StepResult
from hbserve_core.errors import RankFailed
from hbserve_core.logits.prompt_logprobs import PendingPromptLogprobs, ScoredRows, score
from hbserve_core.logits.rows import LogitsRow, has_grammars
from hbserve_core.logits.special_rows import PendingLogprobs, SpecialRows
from hbserve_core.model.loaded_model import LoadedModel
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.weights import MakeNarrow

logger = logging.getLogger(__name__)


class CudaRunner:
    """Runner of a model on a CUDA device. Steps run in order on their own stream; one may be launched before the last
    is read.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `LoadedModel`.
        InvalidInstanceConfig: a setting is not possible here.
        NotEnoughMemory: the pool does not fit.
    """

    overlaps = True
    transfer_addresses: Ids[str] = ()
    computed: Any = None
    _turn = 0
    _left: Callable[[], None] | None = None
    """Work of the last step that is left for `draw`; None unless the step has rows with a grammar."""

    def __init__(self, config: InstanceConfig, group: RankGroup, make_narrow: MakeNarrow) -> None:
        """make_narrow: see `LoadedModel`."""
        self._group = group
        model = LoadedModel(config, group, make_narrow)
        self.config = config
        self.model_config = model.model_config
        self.device = model.device
        self.dtype = model.dtype
        self.fingerprint = model.fingerprint
        torch.cuda.set_device(self.device)
        # Entering the stream itself takes 2 us; `torch.cuda.stream` takes 19, for which a prompt waits.
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), self._stream:
            scratch = torch.empty((1, *model.block.shape), dtype=model.block.dtype, device=self.device)
            self._packer = self._make_packer(model.rank_config, group.seed)
            self._shapes = self._packer.shapes
            self._largest = self._shapes.largest(
                max(config.max_num_batched_tokens, config.max_num_seqs), config.max_num_seqs
            )
            self._decoder = CudaDecoder(model, self._largest, group)
            self._special_rows = SpecialRows(model.model_config, self.device)
            self._sampled = torch.zeros(config.max_num_seqs, dtype=torch.int32, device=self.device)
            self._make_buffers()
            self.pool = scratch
            begin = time.perf_counter()
            reserved_bytes = self._measure_step()
            logger.info(
                "%s: kernels compiled, or found in Triton's cache, in %.1f s; a step takes up to %.0f MiB",
                config.instance_id,
                time.perf_counter() - begin,
                reserved_bytes / 2**20,
            )
            self.pool = model.allocate_pool(reserved_bytes)
            self._graphs = CudaGraphs(self._stream)
            group.on_close = self._graphs.close
            self._graphs.capture(self._shapes.decodes, self._clear, self._decode, f"{config.instance_id} decode")
            self._graphs.capture(self._shapes.prefills, self._clear, self._hidden, f"{config.instance_id} prefill")
            self._stream.synchronize()

    def _make_packer(self, model: ModelConfig, seed: int | None) -> StepPacker:
        pieces = SplitKV(model.num_kv_heads, num_processors(self.device))
        heads = model.num_heads, model.num_kv_heads, model.head_dim
        return StepPacker(self.config, new_tokens_per_tile(self.dtype, heads), pieces, seed)

    def _make_buffers(self) -> None:
        """Allocate memory for the largest possible step: on the device, and twice on the host, so that the next step
        can be written while the device still reads the last one."""
        config = self.config
        blocks_per_sequence = -(-self.model_config.max_model_len // config.block_size)
        size = self._largest.fixed_size + config.max_num_seqs * blocks_per_sequence
        self._on_device = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._on_host = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._read_back = [torch.zeros(config.max_num_seqs, dtype=torch.int32, pin_memory=True) for _ in range(2)]

    def _measure_step(self) -> int:
        """Measure the bytes that the largest step takes besides weights and pool, by computing it once with padding
        only."""
        config = self.config
        shape = self._largest
        self._stream.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        view, hidden = run_steps_without_graph(
            self._decoder, self._shapes, shape, self._on_device, self._sampled, self.pool
        )
        # These kernels are compiled now too, so that the first request that needs them does not delay the others.
        for target, source in ((self._on_device, self._on_host[0]), (self._read_back[0], self._sampled)):
            host_copy(target[:1], source)
        rows = self._special_rows.dummies(min(config.max_num_seqs, self._special_rows.most_rows))
        self._special_rows.prepare(rows, self._sampled)
        self._sample_special(view, hidden, rows)
        self._score(hidden, [ScoredRows(0, 0, [0] * min(shape.rows, self._special_rows.most_rows), 1)])
        self._stream.synchronize()
        step = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        # Graphs share memory for as many rows as the largest of them has. Only the last layer's output is separate for
        # each graph: for graphs with prompts the factor covers it; decode graphs are counted, as there may be a
        # thousand.
        shared = min(1.0, 2 * max([0, *(shape.rows for shape in self._shapes.prefills)]) / shape.rows)
        row_bytes = self.model_config.hidden_size * self.dtype.itemsize
        return int(step * (1.1 + shared)) + row_bytes * sum(shape.rows for shape in self._shapes.decodes)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    # ---- steps ---------------------------------------------------------------------------------------------------

    def run(self, batch: Ids[ScheduledChunk]) -> StepResult:
        """Launch a step and wait for it."""
        return self.launch(batch)() if batch else StepResult([])

    def launch(self, batch: Ids[ScheduledChunk]) -> PendingStep:
        turn = self._turn = 1 - self._turn
        host = self._on_host[turn]
        step = self._packer.pack(batch, host.numpy())
        with torch.inference_mode(), self._stream:
            if step.shape.tiles:
                # With prompts the device usually waits for this copy, and the host needs longer to launch our kernel.
                self._on_device[: step.used].copy_(host[: step.used], non_blocking=True)
            else:
                host_copy(self._on_device[: step.used], host)
            if step.special:
                self._special_rows.prepare(step.special, self._sampled)
            hidden, every_row = self._compute(step)
            logprobs = PendingLogprobs()
            is_drawn_later = has_grammars(step.special)
            if step.special and not is_drawn_later:
                logprobs += self._sample_special(StepView(self._on_device, step.shape), hidden, step.special)
            scored = self._score(every_row, step.scored) if step.scored else PendingPromptLogprobs()
            read_back = self._read_back[turn][: len(step.places)]
            host_copy(read_back, self._sampled)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self.computed = done
        # Keys and values are complete when the step is `done`. Tokens may come later.
        sampled = torch.cuda.Event() if is_drawn_later else done  # type: ignore[no-untyped-call]

        def draw() -> None:
            with torch.inference_mode(), self._stream:
                logprobs.extend(self._sample_special(StepView(self._on_device, step.shape), hidden, step.special))
                host_copy(read_back, self._sampled)
                sampled.record(self._stream)

        if is_drawn_later:
            self._left = draw

        def result() -> StepResult:
            sampled.synchronize()
            self._group.check()
            tokens = step.tokens(read_back.tolist())
            found, choices = logprobs.read(step.places) if logprobs else ({}, {})
            return StepResult(tokens, found, scored.read() if scored else {}, choices)

        return result

    def draw(self) -> None:
        left, self._left = self._left, None
        if left is not None:
            left()

    def is_idle(self) -> bool:
        return self._stream.query()

    def _compute(self, step: PackedStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a step, whose sampled tokens go to `_sampled`. Returns the last layer's output for the samples (R, E)
        and, if prompts are scored, for every row (T, E). Both are valid until the next step."""
        shape = step.shape
        if not shape.tiles:
            every_row = self._graphs.replay(shape) if shape in self._graphs else self._decode(shape)
            return every_row, every_row
        # Graphs do not compute the last layer's output for other rows.
        has_graph = shape in self._graphs and not step.scored
        found = self._graphs.replay(shape) if has_graph else None
        view = StepView(self._on_device, shape)
        view.samples = view.samples[:, : len(step.places)]
        if found is None:
            found = self._decoder.hidden(view, self._sampled, self.pool, every_row=bool(step.scored))
        hidden = found.index_select(0, view.samples[0]) if step.scored else found
        if step.places:
            self._decoder.finish(view, hidden, self._sampled)
        return hidden, found

    def _sample_special(self, view: StepView, hidden: torch.Tensor, rows: Ids[LogitsRow]) -> PendingLogprobs:
        return self._special_rows.sample(
            rows,
            lambda places: self._decoder.logits(hidden.index_select(0, places)),
            lambda scores, places, rows: self._decoder.draw(view, scores, places, self._sampled, rows),
        )

    def _score(self, hidden: torch.Tensor, scored: Ids[ScoredRows]) -> PendingPromptLogprobs:
        most_rows = self._special_rows.most_rows
        return score(scored, lambda rows: self._decoder.logits(hidden[rows]), most_rows, self.device)

    def _clear(self, shape: StepShape) -> None:
        StepView(self._on_device, shape).clear()

    def _decode(self, shape: StepShape) -> torch.Tensor:
        return self._decoder.decode(StepView(self._on_device, shape), self._sampled, self.pool)

    def _hidden(self, shape: StepShape) -> torch.Tensor:
        return self._decoder.hidden(StepView(self._on_device, shape), self._sampled, self.pool)


class CudaGraphs:
    """CUDA graphs of captured work, by shape of step. All graphs share one memory pool, because only one runs at a
    time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._memory: Any = None
        self._lock = threading.Lock()
        self._is_closed = False

    def capture(
        self, shapes: list[StepShape], prepare: Callable[[StepShape], None], work: Callable[[StepShape], Any], name: str
    ) -> None:
        """Capture `work(shape)` for each shape, the largest first. The work must only queue kernels, on memory that
        stays allocated.

        `prepare(shape)` writes input to that memory on which the work can be run once before the capture.
        """
        begin, before = time.perf_counter(), torch.cuda.memory_reserved(self._stream.device)
        for shape in self._with_progress(shapes, name):
            prepare(shape)
            work(shape)  # compiles kernels and allocates workspaces, which is impossible during capture
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
        # Without a terminal there is no progress bar, only the log line at the end.
        largest_first = sorted(shapes, key=lambda shape: -shape.rows)
        return iter(tqdm(largest_first, desc=f"{name} graphs", disable=None, leave=False))

    def replay(self, shape: StepShape) -> Any:
        """Queue a shape's work, and return what `work` returned at the capture: results that stay until the next
        replay."""
        with self._lock:
            self._check_open()
            graph, result = self._graphs[shape]
            graph.replay()
        return result

    def _check_open(self) -> None:
        if self._is_closed:
            raise RankFailed("the ranks are being closed")

    def close(self) -> None:
        """Free all graphs, even one that runs. A later replay raises RankFailed. May be called from any thread, and
        more than once."""
        with self._lock:
            self._is_closed = True
            for graph, _ in self._graphs.values():
                graph.reset()
            self._graphs.clear()

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self._graphs
