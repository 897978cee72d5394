"""The runner that needs nothing but torch: the model, its pool and its sampler behind one call, `run(batch)`.

    batch ─prepare_step▶ T rows ─Decoder▶ logits (R, V) ─Sampler▶ R tokens ─▶ one, or None, for each chunk

Rows whose requests ask for more are sampled once more, by hbserve_core/logits.

Shapes: T rows of one step, R of them sampled, V vocab_size. The pool: see model/kv_pool.py.
"""

from collections.abc import Sequence

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.runner import PendingStep, StepResult, StepTokens
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.engine.sequence import Sequence as EngineSequence
from hbserve_core.logits.prompt_logprobs import score
from hbserve_core.logits.rows import LogitsRow, special_rows
from hbserve_core.logits.special_rows import PendingLogprobs, SpecialRows
from hbserve_core.model.linear import fewest_rows
from hbserve_core.model.loaded_model import LoadedModel
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.torch_runner.attention import TorchAttention
from hbserve_core.torch_runner.batch import StepInput, prepare_step
from hbserve_core.torch_runner.decoder import Decoder
from hbserve_core.torch_runner.sampler import Sampler
from hbserve_rpc.messages import TokenLogprobs


class ModelRunner:
    """Computes steps in plain torch, one at a time, on any device; with a group, one rank's part of them. Not
    thread-safe, but any thread may call.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `LoadedModel`.
        InvalidInstanceConfig: a setting that cannot be.
        NotEnoughMemory: the pool does not fit.
    """

    overlaps = False
    transfer_addresses: Sequence[str] = ()
    computed = None

    def __init__(self, config: InstanceConfig, group: RankGroup | None = None) -> None:
        group = group or RankGroup()
        model = LoadedModel(config, group)
        self.config = config
        self.model_config = model.model_config
        self.device = model.device
        self.dtype = model.dtype
        self.fingerprint = model.fingerprint
        self._decoder = Decoder(model.rank_config, model.weights, group)
        self.pool = model.allocate_pool()
        """(num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)"""
        self._attention = TorchAttention(self.pool, model.rank_config.num_heads)
        self._sampler = Sampler()
        self._special_rows = SpecialRows(model.model_config, model.device)
        self._fewest_rows = fewest_rows(self.device)

    def launch(self, batch: Sequence[ScheduledChunk]) -> PendingStep:
        result = self.run(batch)
        return lambda: result

    def is_idle(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to end."""

    def run(self, batch: Sequence[ScheduledChunk]) -> StepResult:
        """Compute one step: write its keys and values into the pool, and sample."""
        if not batch:
            return StepResult([])
        with torch.inference_mode():
            step = prepare_step(batch, self.device, self._fewest_rows)
            hidden = self._decoder.hidden(step, self._attention.plan(step.chunks))
            logits = self._logits(hidden, step)
            sampled, logprobs = self._sample(logits, [batch[place].sequence for place in step.sampling_places])
            scored = self._score(hidden, step) if step.scored else {}
        tokens: StepTokens = [None] * len(batch)
        for place, token in zip(step.sampling_places, sampled.tolist(), strict=True):
            tokens[place] = token
        found, choices = logprobs.read(step.sampling_places) if logprobs else ({}, {})
        return StepResult(tokens, found, scored, choices)

    def _sample(
        self, logits: torch.Tensor, sequences: Sequence[EngineSequence]
    ) -> tuple[torch.Tensor, PendingLogprobs]:
        chosen = self._sampler.sample(logits, sequences)

        def draw(scores: torch.Tensor, places: torch.Tensor, rows: Sequence[LogitsRow]) -> torch.Tensor:
            drawn = chosen[places] = self._sampler.sample(scores, [each.sequence for each in rows])
            return drawn

        special = [row for place, each in enumerate(sequences) if each.is_special for row in special_rows(place, each)]
        if not special:
            return chosen, PendingLogprobs()
        self._special_rows.prepare(special, None)
        return chosen, self._special_rows.sample(special, logits.__getitem__, draw)

    def _score(self, hidden: torch.Tensor, step: StepInput) -> dict[int, list[TokenLogprobs]]:
        most_rows = self._special_rows.most_rows
        return score(step.scored, lambda rows: self._decoder.logits(hidden[rows]), most_rows, self.device).read()

    def _logits(self, hidden: torch.Tensor, step: StepInput) -> torch.Tensor:
        """(R, vocab_size)"""
        sampled = hidden if step.sampling_rows is None else hidden.index_select(0, step.sampling_rows)
        return self._decoder.logits(sampled)[: len(step.sampling_places)]
