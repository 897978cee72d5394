"""Log-probabilities of a prompt's tokens. Each row of the last layer scores the token after its own.

The logits of a whole chunk would take some gigabytes. So they are computed for a slice of rows at a time, and only what
is asked for is kept. A chunk's last row scores the first token of the next chunk, which is already known.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import NamedTuple

import torch

from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.logits.logprobs import Logprobs
from hbserve_core.logits.rows import on_device
from hbserve_rpc.messages import TokenLogprobs


class ScoredRows(NamedTuple):
    """Consecutive rows of a step that score tokens of one prompt."""

    place: int
    """Place of the chunk in the batch."""
    first_row: int
    token_ids: list[int]
    """Scored tokens, one for each row."""
    most: int
    """Number of most likely tokens to read for each row."""


def scored_rows(chunk: ScheduledChunk, place: int, first_row: int) -> ScoredRows | None:
    """Return the rows of a chunk that score tokens, or None if there are none. first_row: the chunk's first row."""
    params = chunk.sequence.params
    if params.prompt_logprobs is None or not (positions := chunk.scored_positions):
        return None
    tokens = chunk.sequence.token_ids[positions.start + 1 : positions.stop + 1]
    return ScoredRows(place, first_row + positions.start - chunk.first, tokens, params.prompt_logprobs)


class PendingPromptLogprobs(list[tuple[int, Logprobs]]):
    """Log-probabilities of a step's prompts on their way to the host, each with the place of its chunk."""

    def read(self) -> dict[int, list[TokenLogprobs]]:
        """Return the results by the chunk's place. Called when the step has been computed."""
        found: dict[int, list[TokenLogprobs]] = {}
        for place, logprobs in self:
            found.setdefault(place, []).extend(each for _, each in logprobs.read() if each is not None)
        return found


def score(
    scored: Ids[ScoredRows], logits_of: Callable[[slice], torch.Tensor], most_rows: int, device: torch.device
) -> PendingPromptLogprobs:
    """Score prompts without waiting for the device. logits_of: returns logits (N, V) of a slice of the step's rows."""
    pending = PendingPromptLogprobs()
    for place, first_row, token_ids, most in scored:
        for first in range(0, len(token_ids), most_rows):
            tokens = on_device(token_ids[first : first + most_rows], torch.int64, device)
            logits = logits_of(slice(first_row + first, first_row + first + len(tokens)))
            logprobs = Logprobs(logits.float(), [most] * len(tokens))
            pending.append((place, logprobs.send(logits, tokens)))
    return pending
