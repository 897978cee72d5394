"""Sampling of next tokens: greedy, temperature, top-k, top-p, and seeds.

A token is drawn by one uniform number per request, looked up in the cumulative probabilities, in the order of token
ids. A seeded request's number depends only on its seed and on how many tokens it has so far: the same request gets the
same tokens in any batch, on any instance, and after a restart on another one.

A row with a NaN, or whose maximum is infinite, yields no token: NOT_FINITE is sampled from it. A token whose logit is
-inf must not be drawn.

Shapes: R rows, one per sampling request; V vocab_size.
"""

import random
from collections.abc import Sequence as Rows

import torch

from hbserve_core.engine.sequence import COLDEST, HOTTEST, NOT_FINITE, Sequence
from hbserve_rpc import SamplingParams

_MASK = (1 << 64) - 1
# Top-p rarely needs more of the most likely tokens than this; if it does, all of them are sorted.
_FEW = 512


class Sampler:
    """Sampler that draws a token for each row of logits. Owns the randomness of requests without a seed."""

    def __init__(self) -> None:
        self._random = random.Random()

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Sample a token for each row of logits (R, V). Returns (R,) int64, on their device."""
        if not sequences:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        # On a CPU, the detour through float32 is four times as fast.
        scores = logits.float()
        drawn = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0]
        if len(drawn) == len(sequences):
            return self._draw(scores, sequences)
        tokens = _most_likely(scores)
        if drawn:
            drawn_rows = torch.tensor(drawn, device=scores.device)
            tokens[drawn_rows] = self._draw(scores[drawn_rows], [sequences[row] for row in drawn])
        return tokens

    def _draw(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        params = [sequence.params for sequence in sequences]
        uniforms = [self._uniform(sequence) for sequence in sequences]
        temperatures = torch.tensor([min(max(float(p.temperature), COLDEST), HOTTEST) for p in params])
        highest = logits.amax(-1, keepdim=True)
        # No difference is above 0, so none can overflow to infinity.
        scores = (logits - highest).div_(temperatures[:, None].to(logits.device))
        _keep_top_k(scores, logits, params)
        probabilities = scores.softmax(-1)
        _keep_top_p(probabilities, params)
        cumulated = probabilities.cumsum(-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
        # Rounding must not lift a point to the total: the token found there would have probability 0.
        points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
        return _where_finite(highest, torch.searchsorted(cumulated, points, right=True))

    def _uniform(self, sequence: Sequence) -> float:
        if sequence.params.seed is None:
            return self._random.random()
        return seeded_uniform(sequence.params.seed, sequence.num_output_tokens)


def seeded_uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) for output token `index` of a request with `seed`, which is the same on every
    device."""
    mixed = _scramble(_scramble(seed) + index)
    return (mixed >> 11) * 2.0**-53


def _scramble(value: int) -> int:
    """Apply SplitMix64, a bijection of 64-bit integers whose output bits all depend on all input bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _keep_top_k(scores: torch.Tensor, logits: torch.Tensor, params: Rows[SamplingParams]) -> None:
    """Set all scores but those of each row's k highest logits to -inf. Logits equal to the k-th are kept too."""
    vocab_size = logits.shape[1]
    limits = {row: p.top_k for row, p in enumerate(params) if 0 < p.top_k < vocab_size}
    if not limits:
        return
    rows = torch.tensor(list(limits), device=scores.device)
    kth = torch.tensor(list(limits.values()), device=scores.device)[:, None] - 1
    highest = logits[rows].topk(max(limits.values()), sorted=True).values
    threshold = scores.new_full((len(params), 1), float("-inf"))
    threshold[rows] = highest.gather(1, kth)
    scores.masked_fill_(logits < threshold, float("-inf"))


def _keep_top_p(probabilities: torch.Tensor, params: Rows[SamplingParams]) -> None:
    """Set the probabilities of all but the most likely tokens that together reach top_p to zero. Tokens as likely as
    the last one kept stay too."""
    limits = {row: p.top_p for row, p in enumerate(params) if p.top_p < 1}
    if not limits:
        return
    rows = torch.tensor(list(limits), device=probabilities.device)
    top_p = torch.tensor(list(limits.values()), device=probabilities.device)[:, None]
    filtered = probabilities[rows]
    highest = filtered.topk(min(_FEW, filtered.shape[1]), sorted=True).values
    if bool((highest.sum(-1, keepdim=True) < top_p).any()):
        highest = filtered.sort(-1, descending=True).values
    before = highest.cumsum(-1) - highest
    kept = before < top_p
    kept[:, 0] = True
    last = kept.sum(-1, keepdim=True) - 1
    threshold = highest.gather(1, last)
    probabilities[rows] = filtered.masked_fill(filtered < threshold, 0.0)


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Return the lowest id among the most likely tokens of each row, (R,)."""
    tokens = logits.argmax(-1, keepdim=True)
    return _where_finite(logits.gather(1, tokens), tokens)


def _where_finite(highest: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens (R,) from columns (R, 1), with NOT_FINITE for rows without a finite maximum. torch treats a NaN as
    the maximum."""
    return tokens.masked_fill(~highest.isfinite(), NOT_FINITE)[:, 0]
