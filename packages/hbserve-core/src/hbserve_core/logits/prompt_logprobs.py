"""Log-probabilities of a prompt's tokens: a row of the last layer scores the token that comes after its own.

Logits of a whole chunk would be some gigabytes, so they are computed a slice of rows at a time, and only what is asked
for is kept of them. A chunk's last row scores the first token of the next chunk, which is known already.
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
    """Neighbouring rows of a step that score tokens of one prompt."""

    place: int
    """The chunk's, in the batch."""
    first_row: int
    token_ids: list[int]
    """The tokens that are scored, one by each row."""
    most: int
    """Of most likely tokens to be told of each."""


def scored_rows(chunk: ScheduledChunk, place: int, first_row: int) -> ScoredRows | None:
    """Those of a chunk whose rows begin at `first_row`, if its request asks for any."""
    params = chunk.sequence.params
    if params.prompt_logprobs is None or not (positions := chunk.scored_positions):
        return None
    tokens = chunk.sequence.token_ids[positions.start + 1 : positions.stop + 1]
    return ScoredRows(place, first_row + positions.start - chunk.first, tokens, params.prompt_logprobs)


class PendingPromptLogprobs(list[tuple[int, Logprobs]]):
    """Those of a step, by the places of their chunks, on their way to the host."""

    def read(self) -> dict[int, list[TokenLogprobs]]:
        """When the step has been computed: by the chunk's place."""
        found: dict[int, list[TokenLogprobs]] = {}
        for place, logprobs in self:
            found.setdefault(place, []).extend(each for _, each in logprobs.read() if each is not None)
        return found


def score(
    scored: Ids[ScoredRows], logits_of: Callable[[slice], torch.Tensor], most_rows: int, device: torch.device
) -> PendingPromptLogprobs:
    """Score prompts without waiting for the device. logits_of: of a slice of the step's rows, (N, V)."""
    pending = PendingPromptLogprobs()
    for place, first_row, token_ids, most in scored:
        for first in range(0, len(token_ids), most_rows):
            tokens = on_device(token_ids[first : first + most_rows], torch.int64, device)
            logits = logits_of(slice(first_row + first, first_row + first + len(tokens)))
            logprobs = Logprobs(logits.float(), [most] * len(tokens))
            pending.append((place, logprobs.send(logits, tokens)))
    return pending
