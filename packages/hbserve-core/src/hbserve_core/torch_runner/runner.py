"""Runner that needs only torch: the model, its pool and its sampler behind one call, `launch(batch)`.

    batch ─prepare_step▶ T rows ─Decoder▶ logits (R, V) ─Sampler▶ R tokens ─▶ one, or None, for each chunk

Rows whose requests ask for more than temperature, top-k and top-p are sampled again, by hbserve_core/logits. If any has
a grammar, that happens in `draw`.

Shapes: T rows of one step, R of them sampled, V vocab_size. The pool: see model/kv_pool.py.
"""

from collections.abc import Callable, Sequence

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.engine.step import PendingStep, StepResult, StepTokens
from hbserve_core.logits.prompt_logprobs import score
from hbserve_core.logits.rows import LogitsRow, has_grammars, special_rows
from hbserve_core.logits.special_rows import PendingLogprobs, SpecialRows
from hbserve_core.model.layers import fewest_rows
from hbserve_core.model.loaded_model import LoadedModel
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.torch_runner.attention import TorchAttention
from hbserve_core.torch_runner.decoder import Decoder, StepInput, prepare_step
from hbserve_core.torch_runner.sampler import Sampler
from hbserve_rpc.messages import TokenLogprobs


class ModelRunner:
    """Runner that computes steps in plain torch, one at a time, on any device; with a group, one rank's part of them.
    It is not thread-safe, but may be called from any thread.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `LoadedModel`.
        InvalidInstanceConfig: a setting is not possible here.
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
        """KV pool, (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)."""
        scales = [layer.kv_scales for layer in model.weights.layers]
        self._attention = TorchAttention(self.pool, model.rank_config, self.dtype, scales)
        self._sampler = Sampler()
        self._special_rows = SpecialRows(model.model_config, model.device)
        self._fewest_rows = fewest_rows(self.device)
        self._left: Callable[[], None] | None = None
        """Work that is left for `draw`."""

    def launch(self, batch: Sequence[ScheduledChunk]) -> PendingStep:
        """Compute a step. When this returns, everything is computed except rows that are left for `draw`."""
        with torch.inference_mode():
            step = prepare_step(batch, self.device, self._fewest_rows)
            hidden = self._decoder.hidden(step, self._attention.plan(step.chunks))
            logits = self._logits(hidden, step)
            sequences = [batch[place].sequence for place in step.sampling_places]
            sampled = self._sampler.sample(logits, sequences)
            asking = [(place, each) for place, each in enumerate(sequences) if each.is_special]
            special = [row for place, each in asking for row in special_rows(place, each)]
            pending = PendingLogprobs()
            if special:
                pending = self._sample_special(special, logits, sampled)
            scored = self._score(hidden, step) if step.scored else {}

        def result() -> StepResult:
            tokens: StepTokens = [None] * len(batch)
            for place, token in zip(step.sampling_places, sampled.tolist(), strict=True):
                tokens[place] = token
            found, choices = pending.read(step.sampling_places) if pending else ({}, {})
            return StepResult(tokens, found, scored, choices)

        return result

    def draw(self) -> None:
        left, self._left = self._left, None
        if left is not None:
            left()

    def is_idle(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    def run(self, batch: Sequence[ScheduledChunk]) -> StepResult:
        """Compute one step: write its keys and values into the pool, and sample."""
        if not batch:
            return StepResult([])
        pending = self.launch(batch)
        self.draw()
        return pending()

    def _sample_special(
        self, special: Sequence[LogitsRow], logits: torch.Tensor, sampled: torch.Tensor
    ) -> PendingLogprobs:
        """Draw other tokens for some rows into `sampled`, now or in `draw`."""
        pending = PendingLogprobs()

        def draw(scores: torch.Tensor, places: torch.Tensor, rows: Sequence[LogitsRow]) -> torch.Tensor:
            drawn = sampled[places] = self._sampler.sample(scores, [each.sequence for each in rows])
            return drawn

        def sample() -> None:
            with torch.inference_mode():
                pending.extend(self._special_rows.sample(special, logits.__getitem__, draw))

        self._special_rows.prepare(special, None)
        if has_grammars(special):
            self._left = sample
        else:
            sample()
        return pending

    def _score(self, hidden: torch.Tensor, step: StepInput) -> dict[int, list[TokenLogprobs]]:
        most_rows = self._special_rows.most_rows
        scored = score(step.scored, lambda rows: self._decoder.logits(hidden[rows]), most_rows, self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return scored.read()

    def _logits(self, hidden: torch.Tensor, step: StepInput) -> torch.Tensor:
        """Compute the logits of the sampled rows, (R, vocab_size)."""
        rows = step.sampling_rows if step.scored else None
        sampled = hidden if rows is None else hidden.index_select(0, rows)
        return self._decoder.logits(sampled)[: len(step.sampling_places)]
