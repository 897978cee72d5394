"""Results of an engine step, and figures of the engine."""

from dataclasses import dataclass, field
from typing import Any

from hbserve_core.engine.sequence import NOT_FINITE, Sequence
from hbserve_core.model.model_config import ModelConfig
from hbserve_rpc import HBServeRpcError, InvalidRequest, LogitsNotFinite
from hbserve_rpc.histogram import Histogram
from hbserve_rpc.messages import FinishReason, TokenLogprobs

NO_LOGITS = (
    "the model's logits are not finite at output token {index}: its weights are broken, or float16 overflows where "
    "dtype='bfloat16' or 'float32' would not"
)


def error_of(sequence: Sequence, token: int, index: int) -> HBServeRpcError | None:
    """Why a row has given no output token `index`, if `token` is none. Each row of a step is its own: others go on."""
    if sequence.matcher is not None and sequence.matcher.error:
        return InvalidRequest(sequence.matcher.error)
    return LogitsNotFinite(NO_LOGITS.format(index=index)) if token == NOT_FINITE else None


def finish_reason_of(sequence: Sequence, token: int, model: ModelConfig) -> FinishReason | None:
    """Why an output token is the sequence's last one; None if it is not."""
    params = sequence.params
    # Where there is a grammar, one that is ignored cannot be drawn, unless the answer is complete.
    is_end = not params.ignore_eos or sequence.matcher is not None
    if token in params.stop_token_ids or (is_end and token in model.eos_token_ids):
        return "stop"
    return "length" if sequence.is_full else None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did for one request, or for one choice of it."""

    request_id: str
    token_id: int | None
    """The new token, or None: the step only computed a part of the prompt, or the request has ended without one."""
    index: int
    """Place of that token, or without one of the next, among the output tokens of the request, or of the choice."""
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Of those, how many came from the prefix cache."""
    block_table: list[int] = field(default_factory=list)
    """Of a prefill-only request, whose blocks stay as they are until `release`; else empty. The keys and values of its
    computed tokens are there: on a device too, no stream has to be waited for, unless `ready` says otherwise."""
    logprobs: TokenLogprobs | None = None
    """At the new token's place, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """With output token 0, if the request asks for them: of each prompt token but the first."""
    error: HBServeRpcError | None = None
    """Why the request has ended, if it is not by a token: what it asks for cannot be computed."""
    choice: int = 0
    """Of `SamplingParams.n`. What has no token yet is of all."""
    num_preemptions: int = 0
    """So far."""
    ready: Any = None
    """CUDA event after which keys and values are there: of a step that was launched, and has not been read."""

    @property
    def is_last(self) -> bool:
        """Whether the request, or the choice, has ended with it."""
        return self.finish_reason is not None or self.error is not None

    def raise_error(self) -> None:
        """Raises LogitsNotFinite or InvalidRequest if the request has ended so."""
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


def output_of(
    sequence: Sequence,
    token: int | None,
    index: int,
    finish_reason: FinishReason | None,
    computed: int,
    logprobs: TokenLogprobs | None = None,
    error: HBServeRpcError | None = None,
) -> StepOutput:
    """Of a sequence, when `computed` of its tokens have been computed."""
    return StepOutput(
        sequence.request_id,
        None if error else token,
        index,
        finish_reason,
        computed,
        sequence.num_cached_tokens,
        sequence.block_table.tolist() if sequence.prefill_only else [],
        None if error else logprobs,
        sequence.prompt_logprobs if token is not None and index == 0 else [],
        error,
        sequence.choice,
        sequence.num_preemptions,
    )


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a request whose KV others will bring."""

    request_id: str
    block_ids: list[int]
    """Blocks of the tokens that are to be brought, in order: the last ones of the request's, without those that are
    cached here, or that no layer will see."""
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges are of now, counters from the start."""

    num_waiting: int = 0
    num_running: int = 0
    num_reserved: int = 0
    """Requests whose blocks wait for a transfer."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that nobody holds, those kept as prefix cache included."""
    num_cached_blocks: int = 0
    """Of the free ones, those kept as prefix cache."""
    num_reserved_blocks: int = 0
    """Of `num_reserved` requests; one that several of them share counts for each."""
    num_quarantined_blocks: int = 0
    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    """Prompt tokens computed, those computed again after a preemption included."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    host_time_s: float = 0.0
    """Time spent in steps other than waiting for the device: scheduling, preparing, launching, taking tokens in. With a
    runner that computes on the host, its computation too."""
    num_late_steps: int = 0
    """Steps that were launched to be just in time, and came after the one before them had ended."""
    idle_time_s: float = 0.0
    """How long the device had nothing to do because of that, at most."""
    iteration_tokens: Histogram | None = None
    """Tokens of each step."""
