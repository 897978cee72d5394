"""From a body's fields to the SamplingParams of its requests."""

from hbserve.server.api_error import ApiError
from hbserve.server.request_fields import SAMPLED, ChatBody, CompletionBody, SamplingFields
from hbserve_rpc import SamplingParams, StructuredOutputsParams
from hbserve_rpc.sampling_params import MAX_LOGPROBS

MOST_CHOICES = 1024
"""Of one request: its prompts, times `n`."""
COMPLETION_MAX_TOKENS = 16
"""As in OpenAI's API, where a completion does not say."""
SEEDS = 2**63


def num_choices(body: SamplingFields, num_prompts: int) -> int:
    """`n`: how many answers each prompt gets.

    Raises:
        ApiError: 400, there are too many, or they cannot be.
    """
    if num_prompts == 0:
        raise ApiError(400, "prompt=[]: expected at least one", param="prompt")
    n = 1 if body.n is None else body.n
    if not 1 <= n * num_prompts <= MOST_CHOICES:
        expected = f"1 to {MOST_CHOICES // num_prompts}"
        raise ApiError(400, f"n={n}: expected {expected} for {num_prompts} prompts", param="n")
    if body.best_of not in (None, 1, n):
        raise ApiError(400, f"best_of={body.best_of}: is not served; expected null, 1, or n={n}", param="best_of")
    return n


def sampling_params(body: SamplingFields, max_tokens: int, grammar: StructuredOutputsParams | None) -> SamplingParams:
    """Parameters of a request whose answer may have so many tokens unless it says otherwise, and follows this grammar.

    Raises:
        InvalidRequest: a value out of its range; names the field.
    """
    given = {name: value for name in SAMPLED if (value := getattr(body, name, None)) is not None}
    wanted = _max_tokens(body)
    given["max_tokens"] = max_tokens if wanted is None else wanted
    given["logprobs"] = _logprobs(body)
    given["structured_outputs"] = grammar
    if isinstance(body, CompletionBody):
        given["prompt_logprobs"] = _prompt_logprobs(body, given["logprobs"])
        given["max_tokens"] += is_only_prompt(body)  # the engines know no answer without a token
    if "seed" in given:  # OpenAI's may be negative
        given["seed"] %= SEEDS
    return SamplingParams(**given)


def _logprobs(body: SamplingFields) -> int | None:
    """How many tokens beside the chosen one; None: not even that. Raises ApiError."""
    if isinstance(body, CompletionBody):
        if body.logprobs is False or body.logprobs is None:
            return None
        return int(body.logprobs)
    assert isinstance(body, ChatBody)
    if not body.logprobs:
        if body.top_logprobs:
            raise ApiError(400, f"top_logprobs={body.top_logprobs}: only with logprobs=true", param="top_logprobs")
        return None
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        problem = f"top_logprobs={body.top_logprobs}: expected 0 to {MAX_LOGPROBS}"
        raise ApiError(400, problem, param="top_logprobs")
    return body.top_logprobs or 0


def _prompt_logprobs(body: CompletionBody, logprobs: int | None) -> int | None:
    """As many as are asked for themselves, or to be echoed with the prompt; whichever is more."""
    wanted = [body.prompt_logprobs, logprobs if body.echo else None]
    return max((each for each in wanted if each is not None), default=None)


def is_only_prompt(body: CompletionBody) -> bool:
    """Whether nothing is wanted but the prompt and what is known of it."""
    return body.max_tokens == 0 and bool(body.echo)


def _max_tokens(body: SamplingFields) -> int | None:
    newer = body.max_completion_tokens if isinstance(body, ChatBody) else None
    return body.max_tokens if newer is None else newer
