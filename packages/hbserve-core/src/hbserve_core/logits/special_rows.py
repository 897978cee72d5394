"""Special rows of a step, whose logits are read and changed before a token is drawn from them.

    hidden rows ─model's head─▶ logits ─LogitRules─▶ changed logits ─the runner's own sampling─▶ tokens
                                   └────Logprobs─────────────────────────────────────────────────────▶ to the host

Every step first samples all its rows as if none were special, which costs next to nothing. Then the logits of the
special rows are computed again, and other tokens are drawn from them. So steps without special rows are not affected,
and steps with them use the same graphs. If a request has a grammar, special rows are sampled even later, by the
runner's `draw`: by then the host has computed the masks, while the device computed the logits.
Shapes: N special rows of R, V vocab_size.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids

import torch

from hbserve_core.engine.sequence import Sequence
from hbserve_core.engine.step import DrawnToken
from hbserve_core.logits.logprobs import Logprobs
from hbserve_core.logits.rows import LogitsRow, on_device
from hbserve_core.logits.rules import LogitRules
from hbserve_core.model.model_config import ModelConfig
from hbserve_rpc import SamplingParams, StructuredOutputsParams
from hbserve_rpc.messages import TokenLogprobs

_MOST_ROWS, _MOST_NUMBERS = 256, 1 << 24
"""Limits of the float32 logits that are in memory at once, in rows and in numbers. Further rows wait for these."""
_MOST_TOKENS = 1 << 22
"""Limit of the tokens that are read for penalties at once."""

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""Function from places (N,) int64 among the step's R rows to their logits (N, V)."""
Draw = Callable[[torch.Tensor, torch.Tensor, Ids[LogitsRow]], torch.Tensor]
"""Function from logits (N, V), places (N,) and rows to tokens (N,), which are also stored as the step's tokens."""


class PendingLogprobs(list[tuple[Ids[LogitsRow], Logprobs]]):
    """Results of a step's special rows on their way to the host: log-probabilities, and the tokens that they belong
    to."""

    def read(self, chunks: Ids[int | None]) -> tuple[dict[int, TokenLogprobs], dict[int, list[DrawnToken]]]:
        """Return log-probabilities, and the tokens of rows that are choices, by chunk. Called when the step has been
        computed.

        chunks: the place of the chunk of each of the step's R rows; None if nobody wants the row's token.
        """
        found: dict[int, TokenLogprobs] = {}
        choices: dict[int, list[DrawnToken]] = {}
        for rows, logprobs in self:
            for row, drawn in zip(rows, logprobs.read(), strict=True):
                if (chunk := chunks[row.place]) is None:
                    continue
                if row.is_choice:
                    choices.setdefault(chunk, []).append(drawn)
                elif drawn[1] is not None:
                    found[chunk] = drawn[1]
        return found, choices


class SpecialRows:
    """Sampler of special rows, which does not wait for the device."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._device = device
        self._rules = LogitRules(model.eos_token_ids, device)
        self.most_rows = max(1, min(_MOST_ROWS, _MOST_NUMBERS // model.vocab_size))
        """Number of rows that are sampled at once."""

    def prepare(self, rows: Ids[LogitsRow], sampled: torch.Tensor | None) -> None:
        """Prepare a step. sampled: tokens of the previous step, some of which the host has not read yet; None if it has
        read all."""
        self._rules.prepare(rows, sampled)

    def sample(self, rows: Ids[LogitsRow], logits_of: LogitsOf, draw: Draw) -> "PendingLogprobs":
        """Draw a new token for each row, after `prepare` with the same rows. Choices share a place, which gets the
        token of any one of them."""
        pending = []
        for part in self._parts(rows):
            places = on_device([each.place for each in part], torch.int64, self._device)
            logits = logits_of(places)
            # Rules only change the copy: log-probabilities are those of the model.
            scores = logits.to(torch.float32, copy=True)
            counts = [each.sequence.params.logprobs for each in part]
            is_read = counts != [None] * len(part) or any(each.is_choice for each in part)
            logprobs = Logprobs(scores, counts) if is_read else None
            self._rules.apply(scores, part)
            tokens = draw(scores, places, part)
            if logprobs is not None:
                pending.append((part, logprobs.send(logits, tokens)))
        return PendingLogprobs(pending)

    @staticmethod
    def dummies(count: int) -> list[LogitsRow]:
        """Make `count` rows that use every rule, for measurements before there are requests."""
        params = SamplingParams(
            min_p=0.5,
            repetition_penalty=2,
            presence_penalty=1,
            logit_bias={0: 1.0},
            logprobs=20,
            structured_outputs=StructuredOutputsParams(json_object=True),
        )
        return [LogitsRow(place, Sequence("", [0], 1, params)) for place in range(count)]

    def _parts(self, rows: Ids[LogitsRow]) -> Iterator[Ids[LogitsRow]]:
        penalized = [each.sequence.num_tokens for each in rows if each.sequence.params.has_penalties]
        count = min(self.most_rows, max(1, _MOST_TOKENS // max(penalized, default=1)))
        for first in range(0, len(rows), count):
            yield rows[first : first + count]
