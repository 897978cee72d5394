"""The interface that computes an engine's steps."""

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from hbserve_core.engine.sequence import ScheduledChunk, Sequence
from hbserve_core.model.model_config import ModelConfig
from hbserve_rpc.messages import TokenLogprobs

MASK_PATIENCE_S = 0.01
"""How long a step waits for the masks of its rows with grammars, of all together: usually they are there in a tenth of
that. Later ones are for a later step."""
StepTokens = list[int | None]
"""Each chunk's next token, or NOT_FINITE; None where the chunk does not reach the last known token."""
DrawnToken = tuple[int, TokenLogprobs | None]
"""A token, or NOT_FINITE, with its log-probabilities if they are asked for."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has given."""

    tokens: StepTokens
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Of the tokens of chunks whose requests ask for them, by the chunk's place."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the prompt tokens after `ScheduledChunk.scored_positions`, by the chunk's place."""
    choices: dict[int, list[DrawnToken]] = field(default_factory=dict)
    """Next tokens of chunks whose requests have several choices, one for each of these, by the chunk's place; its token
    in `tokens` is nobody's then."""


PendingStep = Callable[[], StepResult]
"""A step that was launched, and drawn if it has rows with grammars: the call, of which there is one, waits until the
step has been computed, its keys and values included, and returns what it has given."""


class StepInFlight(NamedTuple):
    """A launched step, and what must be remembered of it until its tokens are read."""

    chunks: list[tuple[Sequence, int, int]]
    """Sequence, first computed token, number of computed tokens."""
    read: PendingStep
    number: int
    launched_at: float
    """When it could begin; without overlap it did, and has been computed by now."""
    late: list[int]
    """Places of chunks whose masks did not come in time: their last token is computed once more, by the next step."""

    def wait_for_masks(self) -> None:
        """Of rows with grammars, before they are drawn. Their tokens before have all been read now."""
        until = perf_counter() + MASK_PATIENCE_S
        for place, (sequence, first, count) in enumerate(self.chunks):
            matcher = sequence.matcher
            if matcher is None or first + count < sequence.num_tokens:
                continue
            if not matcher.is_ready(until - perf_counter()):
                self.chunks[place] = sequence, first, count - 1
                self.late.append(place)


class Runner(Protocol):
    """A model and its pool. Steps are launched one after the other, by one thread."""

    model_config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    fingerprint: dict[str, str | int]
    """What two instances must share to read each other's blocks."""
    pool: torch.Tensor
    """(num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim), with this rank's heads"""
    transfer_addresses: Ids[str]
    """Where ranks 1, 2, … serve the transfers of their pools, if the instance's role has transfers."""
    overlaps: bool
    """Whether a step may be launched before the tokens of the one before it are read. Those tokens are UNREAD then."""

    computed: Any
    """CUDA event after which the keys and values of the step launched last are there, for other streams of this
    process. None: they are when its tokens have been read."""

    def launch(self, batch: Ids[ScheduledChunk]) -> PendingStep:
        """Begin to compute a step. What the chunks say is read before this returns."""

    def draw(self) -> None:
        """Sample those rows of the step launched last whose requests have grammars, if there are any: `launch` leaves
        them out, because their masks follow from tokens that need not have been read by then. Now they have been."""

    def is_idle(self) -> bool:
        """Whether every launched step has been computed. Does not wait."""

    def close(self) -> None:
        """End the processes of other ranks, if there are any. Nothing is launched afterwards. May be called twice."""
