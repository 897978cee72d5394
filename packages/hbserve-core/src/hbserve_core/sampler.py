"""Choosing next tokens: greedy, temperature, top-k, top-p, and seeds.

A token is drawn by one uniform number per request, which falls into the cumulated probabilities, in the order of token
ids. A seeded request's number follows from its seed and from how many tokens it has so far, and from nothing else: the
same request gets the same tokens in any batch, on any instance, and after a restart on another one.
Shapes: R rows, one per sampling request; V vocab_size.
"""

import random
from collections.abc import Sequence as Rows

import torch

from hbserve_core.sequence import Sequence
from hbserve_rpc import SamplingParams

_MASK = (1 << 64) - 1
# Top-p rarely needs more of the most likely tokens than this; where it does, all of them are sorted.
_FEW = 512


class Sampler:
    """Owns the randomness of requests without a seed."""

    def __init__(self) -> None:
        self._random = random.Random()

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
        """One token per row of logits (R, V)."""
        if not sequences:
            return []
        drawn = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0]
        if not drawn:
            return _to_list(_most_likely(logits))
        if len(drawn) == len(sequences):
            return self._draw(logits, sequences)
        tokens = _most_likely(logits)
        drawn_rows = torch.tensor(drawn, device=logits.device)
        chosen = self._draw(logits[drawn_rows], [sequences[row] for row in drawn])
        tokens[drawn_rows] = torch.tensor(chosen, device=logits.device)
        return _to_list(tokens)

    def _draw(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
        params = [sequence.params for sequence in sequences]
        uniforms = [self._uniform(sequence) for sequence in sequences]
        temperatures = torch.tensor([p.temperature for p in params], device=logits.device)
        scores = logits.float() / temperatures[:, None]
        _keep_top_k(scores, params)
        probabilities = scores.softmax(-1)
        _keep_top_p(probabilities, params)
        cumulated = probabilities.cumsum(-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
        # Rounding must not lift a point to the total: the token found there would be one of probability 0.
        points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
        return _to_list(torch.searchsorted(cumulated, points, right=True)[:, 0])

    def _uniform(self, sequence: Sequence) -> float:
        if sequence.params.seed is None:
            return self._random.random()
        return seeded_uniform(sequence.params.seed, sequence.num_output_tokens)


def seeded_uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for output token `index` of a request with `seed`: same everywhere, on every device."""
    mixed = _scramble(_scramble(seed) + index)
    return (mixed >> 11) * 2.0**-53


def _scramble(value: int) -> int:
    """SplitMix64: a bijection of 64-bit integers whose output bits all depend on all input bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _keep_top_k(scores: torch.Tensor, params: Rows[SamplingParams]) -> None:
    """Set all but the k highest scores of each row to -inf. Scores equal to the k-th stay too."""
    vocab_size = scores.shape[1]
    limits = {row: p.top_k for row, p in enumerate(params) if 0 < p.top_k < vocab_size}
    if not limits:
        return
    rows = torch.tensor(list(limits), device=scores.device)
    kth = torch.tensor(list(limits.values()), device=scores.device)[:, None] - 1
    highest = scores[rows].topk(max(limits.values()), sorted=True).values
    threshold = scores.new_full((len(params), 1), float("-inf"))
    threshold[rows] = highest.gather(1, kth)
    scores.masked_fill_(scores < threshold, float("-inf"))


def _keep_top_p(probabilities: torch.Tensor, params: Rows[SamplingParams]) -> None:
    """Zero all but the most likely tokens that together reach top_p. Tokens as likely as the last kept one stay too."""
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
    """(R,): the lowest id among the most likely tokens. On a CPU, the detour by float32 is four times as fast."""
    return logits.float().argmax(-1)


def _to_list(tokens: torch.Tensor) -> list[int]:
    result: list[int] = tokens.tolist()
    return result
