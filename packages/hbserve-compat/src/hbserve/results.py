"""Results of generating, as `generate` and `stream` return them: plain dicts with these keys."""

from typing import NotRequired, TypedDict

from hbserve_rpc.messages import FinishReason, RequestFinished, TokenLogprobs


class Timings(TypedDict):
    """Of one request. Times are in seconds."""

    queue_time_s: float
    ttft_s: float
    """Time to first token."""
    handoff_s: float
    """First token to second: how long the request stood still while it changed hands. 0 if there is no second."""
    tpot_s: float
    """Mean time per output token after the first."""
    e2e_s: float
    kv_bytes: int
    """KV moved from the prefill to the decode instance."""
    kv_transfer_time_s: float
    num_cached_tokens: int
    """Prompt tokens that the decode instance held already."""
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
    """The stop string, or the one of `stop_token_ids`, that ended it; None if something else did."""
    logprobs: list[TokenLogprobs] | None
    """Of each of `token_ids`, a dict of token ids and their log-probabilities: the most likely ones, in order, and the
    one that is there, which may be the last. None unless `SamplingParams.logprobs` asks for them."""
    prompt_logprobs: list[TokenLogprobs | None] | None
    """The same of each prompt token; of the first one it is None."""


class GenerationResult(Answer):
    """The answer to one prompt, or the first of several."""

    outputs: NotRequired[list[Answer]]
    """All of them, where `SamplingParams.n` is more than one. Their KV was moved once: each of them says so."""


class GenerationDelta(TypedDict):
    """What is new of a streamed answer."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    """Set in the last one only."""
    stop_reason: str | int | None
    """As in GenerationResult, in the last one."""
    logprobs: list[TokenLogprobs] | None
    """As in GenerationResult, of the new `token_ids`."""
    prompt_logprobs: list[TokenLogprobs | None] | None
    """As in GenerationResult, with the first token."""
    timings: Timings | None
    """Set in the last one only."""
    choice: NotRequired[int]
    """Which of the answers it is of, where `SamplingParams.n` is more than one; each has a last one."""


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
