"""A step from outside: what its runner is given and returns, what the engine reports of it, and the engine's figures.

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
"""How long a step waits for the masks of its rows with grammars, for all of them together: usually they are ready in a
tenth of that. A row whose mask is later is left to the next step."""
StepTokens = list[int | None]
"""Each chunk's next token, or NOT_FINITE; None if the chunk does not reach the last known token."""
DrawnToken = tuple[int, TokenLogprobs | None]
"""A token, or NOT_FINITE, with its log-probabilities if they are wanted."""
NO_LOGITS = (
    "the model's logits are not finite at output token {index}: its weights are broken, or float16 overflows where "
    "dtype='bfloat16' or 'float32' would not"
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has computed."""

    tokens: StepTokens
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Of the tokens of chunks whose requests ask for them, by the chunk's position."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the prompt tokens after `ScheduledChunk.scored_positions`, by the chunk's position."""
    choices: dict[int, list[DrawnToken]] = field(default_factory=dict)
    """By the chunk's position, the next tokens of each choice of requests with several; the entry in `tokens` is unused
    then."""


PendingStep = Callable[[], StepResult]
"""A step that was launched (and drawn, if it has rows with grammars). Calling it, once, waits until the step has been
computed, including its keys and values, and returns the result."""


class StepInFlight(NamedTuple):
    """A launched step, and what must be remembered of it until its tokens are read."""

    chunks: list[tuple[Sequence, int, int]]
    """Sequence, first computed token, number of computed tokens."""
    read: PendingStep
    number: int
    launched_at: float
    """When it could begin; without overlap it began then, and has been computed by now."""
    may_have_grammars: bool
    """Whether any request has one, also of those that end before this step is drawn: all ranks draw what was launched.
    """
    late: list[int]
    """Positions of chunks whose masks were not ready in time: the next step computes their last token again."""

    def wait_for_masks(self) -> None:
        """Wait for the masks of rows with grammars, before these are drawn. All of their earlier tokens have been read
        by now."""
        until = perf_counter() + MASK_PATIENCE_S
        for place, (sequence, first, count) in enumerate(self.chunks):
            matcher = sequence.matcher
            if matcher is None or first + count < sequence.num_tokens:
                continue
            if not matcher.is_ready(until - perf_counter()):
                self.chunks[place] = sequence, first, count - 1
                self.late.append(place)


class Runner(Protocol):
    """A model and its pool. Steps are launched one after another, by one thread."""

    model_config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    fingerprint: dict[str, str | int]
    """What two instances must have in common to read each other's blocks."""
    pool: torch.Tensor
    """(num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim), with this rank's heads."""
    transfer_addresses: Ids[str]
    """Where ranks 1, 2, … serve the transfers of their pools, if the instance's role has transfers."""
    overlaps: bool
    """Whether a step may be launched before the tokens of the one before it are read. Those tokens are UNREAD then."""

    @property
    def computed(self) -> Any:
        """What tells, on the device, that the keys and values of the last launched step are there: a CUDA event or,
        with several ranks, a LaunchedStep, by which each rank finds its own. None: they are there when its tokens have
        been read."""

    def launch(self, batch: Ids[ScheduledChunk]) -> PendingStep:
        """Begin to compute a step. The chunks are read before this returns."""

    def draw(self) -> None:
        """Sample those rows of the last launched step whose requests have grammars, if there are any. `launch` leaves
        them out, because their masks depend on tokens that may not have been read by then. By now they have been."""

    def is_idle(self) -> bool:
        """Whether every launched step has been computed. Does not wait."""

    def close(self) -> None:
        """End the processes of other ranks, if there are any. Nothing is launched afterwards. May be called twice."""


def error_of(sequence: Sequence, token: int, index: int) -> HBServeRpcError | None:
    """Why a row has yielded no output token `index`, if `token` is not one. Other rows of the step are not affected."""
    if sequence.matcher is not None and sequence.matcher.error:
        return InvalidRequest(sequence.matcher.error)
    return LogitsNotFinite(NO_LOGITS.format(index=index)) if token == NOT_FINITE else None


@dataclass(slots=True)
class StepOutput:
    """What one step did for one request, or for one of its choices. Not frozen, because making 256 frozen ones would
    take a millisecond of each step."""

    request_id: str
    token_id: int | None
    """The new token; None if the step only computed a part of the prompt, or the request has ended without a token."""
    index: int
    """Position of that token, or if there is none of the next one, among the output tokens of the request or choice."""
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """How many of those came from the prefix cache."""
    block_table: list[int] = field(default_factory=list)
    """Of a prefill-only request, whose blocks stay as they are until `release`; otherwise empty. The keys and values of
    its computed tokens are there, on a device too, without waiting for a stream, unless `ready` says otherwise."""
    logprobs: TokenLogprobs | None = None
    """Of the new token, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """With output token 0, if the request asks for them: of each prompt token but the first."""
    error: HBServeRpcError | None = None
    """Why the request has ended, if not by a token: what it asks for cannot be computed."""
    choice: int = 0
    """Of `SamplingParams.n`. An output without a token concerns all choices."""
    num_preemptions: int = 0
    """Preemptions so far."""
    ready: Any = None
    """After this, keys and values are there, as in `Runner.computed`; set for a step that has not been read."""

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
        """Of a sequence and the token, if there is one, that was sampled from so many computed tokens."""
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
        """Whether the request, or the choice, has ended with it."""
        return self.finish_reason is not None or self.error is not None

    def raise_error(self) -> None:
        """Raises LogitsNotFinite or InvalidRequest if the request has ended by that."""
        if self.error is not None:
            raise self.error

    @property
    def token_ids(self) -> list[int]:
        """The new token, if there is one."""
        return [] if self.token_id is None else [self.token_id]

    @property
    def all_logprobs(self) -> list[TokenLogprobs]:
        """Of `token_ids`, if the request asks for them."""
        return [] if self.logprobs is None else [self.logprobs]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a request whose KV others will bring."""

    request_id: str
    block_ids: list[int]
    """Blocks of the tokens to be brought, in order: the last ones of the request, without those that are cached here or
    that no layer will see."""
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of one engine. Gauges show the present, counters grow from the start."""

    num_waiting: int = 0
    num_running: int = 0
    num_reserved: int = 0
    """Requests whose blocks wait for a transfer."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that nobody holds, including those kept as prefix cache."""
    num_cached_blocks: int = 0
    """How many of the free blocks are kept as prefix cache."""
    num_reserved_blocks: int = 0
    """Blocks of the `num_reserved` requests; a shared block counts once for each."""
    num_quarantined_blocks: int = 0
    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    """Prompt tokens computed, including those computed again after a preemption."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    host_time_s: float = 0.0
    """Time spent in steps other than waiting for the device: scheduling, preparing, launching, taking tokens in. With a
    runner that computes on the host, its computation too."""
    num_late_steps: int = 0
    """Steps that were meant to be launched just in time, and came after the one before them had ended."""
    idle_time_s: float = 0.0
    """How long the device was idle because of that, at most."""
    iteration_tokens: Histogram | None = None
    """Tokens of each step."""
