"""Log-probabilities of a prompt's tokens. A row of the last layer scores the token after its own.

The logits of a whole chunk would be some gigabytes. So they are computed for a slice of rows at a time, and only what
is asked for is kept. A chunk's last row scores the first token of the next chunk, which is known already.
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
    """The chunk's place in the batch."""
    first_row: int
    token_ids: list[int]
    """The scored tokens, one for each row."""
    most: int
    """How many most likely tokens to read for each."""


def scored_rows(chunk: ScheduledChunk, place: int, first_row: int) -> ScoredRows | None:
    """The rows of a chunk that score tokens, or None if its request asks for none. first_row: the chunk's first row."""
    params = chunk.sequence.params
    if params.prompt_logprobs is None or not (positions := chunk.scored_positions):
        return None
    tokens = chunk.sequence.token_ids[positions.start + 1 : positions.stop + 1]
    return ScoredRows(place, first_row + positions.start - chunk.first, tokens, params.prompt_logprobs)


class PendingPromptLogprobs(list[tuple[int, Logprobs]]):
    """A step's log-probabilities of prompts on their way to the host, with the place of each one's chunk."""

    def read(self) -> dict[int, list[TokenLogprobs]]:
        """The results by the chunk's place. To be called when the step has been computed."""
        found: dict[int, list[TokenLogprobs]] = {}
        for place, logprobs in self:
            found.setdefault(place, []).extend(each for _, each in logprobs.read() if each is not None)
        return found


def score(
    scored: Ids[ScoredRows], logits_of: Callable[[slice], torch.Tensor], most_rows: int, device: torch.device
) -> PendingPromptLogprobs:
    """Score prompts without waiting for the device. logits_of: logits (N, V) of a slice of the step's rows."""
    pending = PendingPromptLogprobs()
    for place, first_row, token_ids, most in scored:
        for first in range(0, len(token_ids), most_rows):
            tokens = on_device(token_ids[first : first + most_rows], torch.int64, device)
            logits = logits_of(slice(first_row + first, first_row + first + len(tokens)))
            logprobs = Logprobs(logits.float(), [most] * len(tokens))
            pending.append((place, logprobs.send(logits, tokens)))
    return pending
