"""Types of what `generate` returns and `stream` yields: plain dicts with these keys."""

from typing import NotRequired, TypedDict

from hbserve_rpc.messages import FinishReason, RequestFinished, TokenLogprobs


class Timings(TypedDict):
    """Times of one request, in seconds, and other figures of it."""

    queue_time_s: float
    ttft_s: float
    """Time to first token."""
    handoff_s: float
    """Time from the first token to the second, which includes the hand-off of the request; 0 without a second token."""
    tpot_s: float
    """Mean time per output token after the first."""
    e2e_s: float
    kv_bytes: int
    """Bytes of KV that moved from the prefill to the decode instance."""
    kv_transfer_time_s: float
    num_cached_tokens: int
    """Number of prompt tokens that the decode instance had in its prefix cache."""
    num_prompt_tokens: int
    num_attempts: int
    prefill_instance: str
    decode_instance: str


class Answer(Timings):
    """One whole answer."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string, or the one of `stop_token_ids`, that ended the answer; None if something else did."""
    logprobs: list[TokenLogprobs] | None
    """A dict for each of `token_ids`, of token ids and their log-probabilities: the most likely ones, in order, and the
    chosen one, which may come last. None unless `SamplingParams.logprobs` asks for them."""
    prompt_logprobs: list[TokenLogprobs | None] | None
    """The same for each prompt token; None for the first one."""


class GenerationResult(Answer):
    """The answer to one prompt, or the first of several."""

    outputs: NotRequired[list[Answer]]
    """All answers, if `SamplingParams.n` is more than one. Their KV moved only once; each of them reports that."""


class GenerationDelta(TypedDict):
    """A new piece of a streamed answer."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    """Why the answer ended; set in the last piece only."""
    stop_reason: str | int | None
    """The same as in GenerationResult; set in the last piece only."""
    logprobs: list[TokenLogprobs] | None
    """The same as in GenerationResult, for the new `token_ids`."""
    prompt_logprobs: list[TokenLogprobs | None] | None
    """The same as in GenerationResult; comes with the first token."""
    timings: Timings | None
    """Times of the request; set in the last piece only."""
    choice: NotRequired[int]
    """Index of the answer, if `SamplingParams.n` is more than one. Each answer has a last piece."""


def timings_of(end: RequestFinished) -> Timings:
    return Timings(
        queue_time_s=end.queue_time_s,
        ttft_s=end.ttft_s,
        handoff_s=end.handoff_s,
        tpot_s=end.tpot_s,
        e2e_s=end.e2e_s,
        kv_bytes=end.kv_bytes,
        kv_transfer_time_s=end.kv_transfer_time_s,
        num_cached_tokens=end.num_cached_tokens,
        num_prompt_tokens=end.num_prompt_tokens,
        num_attempts=end.num_attempts,
        prefill_instance=end.prefill_instance,
        decode_instance=end.decode_instance,
    )
