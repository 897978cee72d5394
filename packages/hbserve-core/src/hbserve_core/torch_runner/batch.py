"""One step's input: the tokens of all its chunks, one after the other, as flat tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.logits.prompt_logprobs import ScoredRows, scored_rows


@dataclass(frozen=True, slots=True)
class StepInput:
    """T rows of one step: its tokens, then padding, which is computed and not used. R of its chunks sample."""

    chunks: tuple[ScheduledChunk, ...]
    """In the order of their tokens: by number of new tokens, then by context."""
    token_ids: torch.Tensor
    """(T,) int64"""
    positions: torch.Tensor
    """(T,) int64: each token's place in its sequence."""
    sampling_rows: torch.Tensor | None
    """(R,) int64: rows, among the T, whose hidden states give next tokens. None: the first R rows."""
    sampling_places: tuple[int, ...]
    """(R,): places of the sampling chunks in the batch as it was given."""
    scored: tuple[ScoredRows, ...]
    """Rows, among the T, that score tokens of prompts."""


def prepare_step(batch: Sequence[ScheduledChunk], device: torch.device, fewest_rows: int = 1) -> StepInput:
    """Flatten a batch, and pad it to `fewest_rows`.

    The order is the kernels' convenience: decodes first, equal shapes together. `sampling_places` leads back.
    """
    order = sorted(range(len(batch)), key=lambda i: (batch[i].num_new_tokens, batch[i].sequence.num_computed_tokens))
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    places: list[int] = []
    scored: list[ScoredRows] = []
    for place in order:
        chunk = batch[place]
        first = chunk.sequence.num_computed_tokens
        end = first + chunk.num_new_tokens
        if chunk.scored_positions and (scores := scored_rows(chunk, place, len(token_ids))) is not None:
            scored.append(scores)
        token_ids += chunk.sequence.token_ids[first:end]
        positions += range(first, end)
        if chunk.samples:
            rows.append(len(token_ids) - 1)
            places.append(place)
    all_sample = len(rows) == len(token_ids)
    padding = [0] * (fewest_rows - len(token_ids))
    return StepInput(
        chunks=tuple(batch[place] for place in order),
        token_ids=torch.tensor(token_ids + padding, dtype=torch.int64, device=device),
        positions=torch.tensor(positions + padding, dtype=torch.int64, device=device),
        sampling_rows=None if all_sample else torch.tensor(rows, dtype=torch.int64, device=device),
        sampling_places=tuple(places),
        scored=tuple(scored),
    )
