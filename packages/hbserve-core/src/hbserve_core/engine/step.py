"""Interface of a step: what its runner is given and returns, what the engine reports of it, and the engine's figures.

Engine ─ScheduledChunks▶ Runner.launch ─PendingStep▶ StepInFlight ─read▶ StepResult ─▶ a StepOutput for each request
"""

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from hbserve_core.engine.sequence import NOT_FINITE, ScheduledChunk, Sequence
from hbserve_core.model.model_config import ModelConfig
from hbserve_rpc import HBServeRpcError, InvalidRequest, LogitsNotFinite
from hbserve_rpc.counts import Histogram
from hbserve_rpc.messages import FinishReason, TokenLogprobs

MASK_PATIENCE_S = 0.01
"""Longest time that a step waits for the masks of all its rows with grammars together. They are usually ready in a
tenth of it. A row whose mask is later is left to the next step."""
StepTokens = list[int | None]
"""Next token of each chunk, or NOT_FINITE; None if the chunk does not reach the last known token."""
DrawnToken = tuple[int, TokenLogprobs | None]
"""Token, or NOT_FINITE, with its log-probabilities if they are wanted."""
NO_LOGITS = (
    "the model's logits are not finite at output token {index}: its weights are broken, or float16 overflows where "
    "dtype='bfloat16' or 'float32' would not"
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a step."""

    tokens: StepTokens
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Log-probabilities of the sampled tokens, by the chunk's position, for chunks whose requests ask for them."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Log-probabilities of the prompt tokens after `ScheduledChunk.scored_positions`, by the chunk's position."""
    choices: dict[int, list[DrawnToken]] = field(default_factory=dict)
    """Next token of each choice, by the chunk's position, for requests with several choices. The entry in `tokens` is
    unused then."""


PendingStep = Callable[[], StepResult]
"""Step that was launched (and drawn, if it has rows with grammars). It is called once; the call waits until the step
has been computed, including its keys and values, and returns the result."""


class StepInFlight(NamedTuple):
    """Launched step, with what must be remembered of it until its tokens are read."""

    chunks: list[tuple[Sequence, int, int]]
    """Chunks of the step: sequence, first computed token, number of computed tokens."""
    read: PendingStep
    number: int
    launched_at: float
    """Time from which the step could begin. Without overlap it began then, and has been computed by now."""
    may_have_grammars: bool
    """Whether any request had a grammar at the launch, even one that ends before this step is drawn: all ranks draw
    what was launched."""
    late: list[int]
    """Positions of chunks whose masks were not ready in time: the next step computes their last token again."""

    def wait_for_masks(self) -> None:
        """Wait for the masks of rows with grammars, before these are drawn. All their earlier tokens have been read by
        now."""
        until = perf_counter() + MASK_PATIENCE_S
        for place, (sequence, first, count) in enumerate(self.chunks):
            matcher = sequence.matcher
            if matcher is None or first + count < sequence.num_tokens:
                continue
            if not matcher.is_ready(until - perf_counter()):
                self.chunks[place] = sequence, first, count - 1
                self.late.append(place)


class Runner(Protocol):
    """Model and its pool. One thread launches steps, one after another."""

    model_config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    fingerprint: dict[str, str | int]
    """Values that two instances must have in common to read each other's blocks."""
    pool: torch.Tensor
    """KV pool with this rank's heads: (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)."""
    transfer_addresses: Ids[str]
    """Addresses at which ranks 1, 2, … serve the transfers of their pools, if the instance's role has transfers."""
    overlaps: bool
    """Whether a step may be launched before the tokens of the previous one are read. Those tokens are UNREAD then."""

    @property
    def computed(self) -> Any:
        """Marker, on the device, that the keys and values of the last launched step are complete: a CUDA event or, with
        several ranks, a LaunchedStep, by which each rank finds its own event. None means that they are complete when
        the step's tokens have been read."""

    def launch(self, batch: Ids[ScheduledChunk]) -> PendingStep:
        """Begin to compute a step. The chunks have been read when this returns."""

    def draw(self) -> None:
        """Sample the rows of the last launched step whose requests have grammars, if there are any. `launch` leaves
        them out, because their masks depend on tokens that may not have been read by then. By now they have been."""

    def is_idle(self) -> bool:
        """Return whether every launched step has been computed, without waiting."""

    def close(self) -> None:
        """End the processes of other ranks, if there are any. Nothing is launched afterwards. May be called twice."""


def error_of(sequence: Sequence, token: int, index: int) -> HBServeRpcError | None:
    """Return why a row has yielded no output token `index`, or None if `token` is one. Other rows of the step are not
    affected."""
    if sequence.matcher is not None and sequence.matcher.error:
        return InvalidRequest(sequence.matcher.error)
    return LogitsNotFinite(NO_LOGITS.format(index=index)) if token == NOT_FINITE else None


@dataclass(slots=True)
class StepOutput:
    """Output of one step for one request, or for one of its choices. It is not frozen, because making 256 frozen ones
    would take a millisecond of each step."""

    request_id: str
    token_id: int | None
    """New token; None if the step only computed a part of the prompt, or the request has ended without a token."""
    index: int
    """Position of that token (of the next one, if there is none) among the output tokens of the request or choice."""
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Number of computed tokens that came from the prefix cache."""
    block_table: list[int] = field(default_factory=list)
    """Blocks of a prefill-only request, which stay as they are until `release`; otherwise empty. The keys and values of
    its computed tokens are complete, even on a device without waiting for a stream, unless `ready` says otherwise."""
    logprobs: TokenLogprobs | None = None
    """Log-probabilities of the new token, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of each prompt token but the first. They come with output token 0, if the request asks for
    them."""
    error: HBServeRpcError | None = None
    """Error that has ended the request, because what it asks for cannot be computed."""
    choice: int = 0
    """Index of the choice, one of `SamplingParams.n`. An output without a token concerns all choices."""
    num_preemptions: int = 0
    """Number of preemptions so far."""
    ready: Any = None
    """Marker after which keys and values are complete, as in `Runner.computed`; set for a step that has not been
    read."""

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        num_computed_tokens: int,
        token: int | None = None,
        finish_reason: FinishReason | None = None,
        logprobs: TokenLogprobs | None = None,
        error: HBServeRpcError | None = None,
        ready: Any = None,
    ) -> "StepOutput":
        """Make the output of a sequence, given its number of computed tokens and the token, if any, that was sampled
        from them."""
        known = sequence.num_tokens if token is None else num_computed_tokens
        index = known - sequence.num_prompt_tokens
        return cls(
            sequence.request_id,
            None if error else token,
            index,
            finish_reason,
            num_computed_tokens,
            sequence.num_cached_tokens,
            sequence.block_table.tolist() if sequence.prefill_only else [],
            None if error else logprobs,
            sequence.prompt_logprobs if token is not None and index == 0 else [],
            error,
            sequence.choice,
            sequence.num_preemptions,
            ready,
        )

    @property
    def is_last(self) -> bool:
        """Whether the request or choice has ended with this output."""
        return self.finish_reason is not None or self.error is not None

    def raise_error(self) -> None:
        """Raise LogitsNotFinite or InvalidRequest if that has ended the request."""
        if self.error is not None:
            raise self.error

    @property
    def token_ids(self) -> list[int]:
        """List of the new token; empty if there is none."""
        return [] if self.token_id is None else [self.token_id]

    @property
    def all_logprobs(self) -> list[TokenLogprobs]:
        """Log-probabilities of `token_ids`, if the request asks for them."""
        return [] if self.logprobs is None else [self.logprobs]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a request whose KV others will send."""

    request_id: str
    block_ids: list[int]
    """Blocks of the tokens to be received, in order: the last blocks of the request, without those that are cached here
    or that no layer will see."""
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of one engine. Gauges show the present, counters grow from the start."""

    num_waiting: int = 0
    num_running: int = 0
    num_reserved: int = 0
    """Number of requests whose blocks wait for a transfer."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Number of blocks that nobody holds, including those kept as prefix cache."""
    num_cached_blocks: int = 0
    """Number of free blocks that are kept as prefix cache."""
    num_reserved_blocks: int = 0
    """Number of blocks of the `num_reserved` requests. A shared block counts once for each request."""
    num_quarantined_blocks: int = 0
    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    """Number of prompt tokens computed, including those computed again after a preemption."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    host_time_s: float = 0.0
    """Time spent in steps other than waiting for the device: scheduling, preparing, launching, taking tokens in. It
    includes the computation of a runner that computes on the host."""
    num_late_steps: int = 0
    """Number of steps that were meant to be launched just in time, but came after the previous one had ended."""
    idle_time_s: float = 0.0
    """Longest time for which the device may have been idle because of late steps."""
    iteration_tokens: Histogram | None = None
    """Histogram of the number of tokens in each step."""
