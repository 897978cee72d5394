"""Rules that requests set for their logits: biases, tokens that must not come yet, penalties, grammars, min-p.

They are applied in the same order as in vLLM: biases and min_tokens, then penalties and grammars, then min_p. Logits
that are not finite stay so, and the code that draws tokens from them deals with that.
Shapes: N rows, V vocab_size.
"""

import math
from collections.abc import Collection
from collections.abc import Sequence as Ids
from typing import Any

import torch

from hbserve_core.engine.sequence import COLDEST, HOTTEST, Sequence
from hbserve_core.logits.grammar_masks import GrammarMasks
from hbserve_core.logits.penalties import Penalties
from hbserve_core.logits.rows import LogitsRow, on_device
from hbserve_rpc import SamplingParams

_NEVER = float("-inf")


class LogitRules:
    """Rules of one runner. Data that was put on the device for one step is reused in the next if that has the same
    rows."""

    def __init__(self, eos_token_ids: Collection[int], device: torch.device) -> None:
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._known: tuple[Any, ...] = ()
        self._additions: tuple[torch.Tensor, torch.Tensor] | None = None
        self._min_p: torch.Tensor | None = None
        self._penalties = Penalties(device)
        self._grammar_masks = GrammarMasks(device)

    def prepare(self, rows: Ids[LogitsRow], sampled: torch.Tensor | None) -> None:
        """Prepare a step; see `Penalties.prepare`. Called once for all rows of the step, before they are sampled."""
        self._penalties.prepare(rows, sampled)

    def apply(self, scores: torch.Tensor, rows: Ids[LogitsRow]) -> None:
        """Change logits (N, V) float32, a row for each of `rows`, in place."""
        known = tuple((each.sequence, _may_not_end(each.sequence)) for each in rows)
        if known != self._known:
            self._additions = self._make_additions(rows, scores.shape[1])
            self._min_p = self._make_min_p(rows)
            self._known = known
        if self._additions is not None:
            places, values = self._additions
            # Values are added and not set, so that logits that are not finite stay so.
            scores.view(-1).index_add_(0, places, values)
        if any(each.sequence.params.has_penalties for each in rows):
            self._penalties.apply(scores, rows)
        if any(each.sequence.params.structured_outputs for each in rows):
            self._grammar_masks.apply(scores, rows)
        if self._min_p is not None:
            scores.masked_fill_(scores < scores.amax(-1, keepdim=True) + self._min_p, _NEVER)

    def _make_additions(self, rows: Ids[LogitsRow], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        places: list[int] = []
        values: list[float] = []
        for row, sequence in enumerate(each.sequence for each in rows):
            bias = dict(sequence.params.logit_bias or {})
            if _may_not_end(sequence):
                bias |= dict.fromkeys(self._ends(sequence.params), _NEVER)
            places += [row * vocab_size + token for token in bias]
            values += bias.values()
        if not places:
            return None
        return on_device(places, torch.int64, self._device), on_device(values, torch.float32, self._device)

    def _ends(self, params: SamplingParams) -> set[int]:
        """Return the tokens that would end the request."""
        return {*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)}

    def _make_min_p(self, rows: Ids[LogitsRow]) -> torch.Tensor | None:
        """Return how far below the highest logit of its row another one may be, (N, 1), or None if no request sets a
        limit."""
        params = [each.sequence.params for each in rows]
        if not any(each.min_p and each.temperature for each in params):
            return None
        return on_device([_least_below(each) for each in params], torch.float32, self._device)[:, None]


def _least_below(params: SamplingParams) -> float:
    """Return the difference to the highest logit at which a token is min_p times as likely as the best one: there its
    logit, divided by the temperature, is less by -log(min_p). Returns -inf if the request has no min_p or is greedy."""
    if not (params.min_p and params.temperature):
        return _NEVER
    return min(max(params.temperature, COLDEST), HOTTEST) * math.log(params.min_p)


def _may_not_end(sequence: Sequence) -> bool:
    params = sequence.params
    # If there is a grammar, its mask says when an answer may not end, because the grammar may require the end.
    return sequence.num_output_tokens < params.min_tokens and params.structured_outputs is None
