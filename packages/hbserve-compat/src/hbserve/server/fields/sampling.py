"""SamplingParams of requests, made from a body's fields and the model's own defaults."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hbserve.server.fields.request_fields import SAMPLED, ChatBody, CompletionBody, SamplingFields
from hbserve.server.http.api_error import ApiError
from hbserve_rpc import InvalidRequest, SamplingParams, StructuredOutputsParams
from hbserve_rpc.sampling_params import MAX_LOGPROBS

logger = logging.getLogger(__name__)

MOST_CHOICES = 1024
"""Most choices of one request: the number of its prompts, times `n`."""
COMPLETION_MAX_TOKENS = 16
"""Default of a completion's `max_tokens`, as in OpenAI's API."""
SEEDS = 2**63
FROM_THE_MODEL = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Settings that are taken from generation_config.json, with our names for them. vLLM takes the same ones."""


def num_choices(body: SamplingFields, num_prompts: int) -> int:
    """Return `n`, the number of answers to each prompt.

    Raises:
        ApiError: (400) there are too many answers, or an impossible number of them.
    """
    if num_prompts == 0:
        raise ApiError(400, "prompt=[]: expected at least one", param="prompt")
    if num_prompts > MOST_CHOICES:
        raise ApiError(400, f"prompt: {num_prompts} of them; expected at most {MOST_CHOICES}", param="prompt")
    n = 1 if body.n is None else body.n
    if not 1 <= n * num_prompts <= MOST_CHOICES:
        expected = f"1 to {MOST_CHOICES // num_prompts}"
        raise ApiError(400, f"n={n}: expected {expected} for {num_prompts} prompts", param="n")
    if body.best_of not in (None, 1, n):
        raise ApiError(400, f"best_of={body.best_of}: is not served; expected null, 1, or n={n}", param="best_of")
    return n


def model_defaults(folder: Path) -> dict[str, Any]:
    """Read the model's default parameters from its generation_config.json, for requests that do not set them. Invalid
    ones are left out, and so are all if the file cannot be read; both are logged."""
    path = folder / "generation_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        given = {name: content[name] for name in FROM_THE_MODEL if content.get(name) is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        logger.warning("%s: its sampling defaults are not used: %s", path, error)
        return {}
    found = {}
    for name, value in given.items():
        ours = FROM_THE_MODEL[name]
        try:
            found[ours] = getattr(SamplingParams(**{ours: value}), ours)
        except InvalidRequest as error:
            logger.warning("%s: its %s is not used as a default: %s", path, name, error)
    if found:
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        logger.info("defaults of requests are the model's own: %s; server.generation_config: none turns that off", said)
    return found


def sampling_params(
    body: SamplingFields,
    max_tokens: int,
    grammar: StructuredOutputsParams | None,
    defaults: Mapping[str, Any],
) -> SamplingParams:
    """Make the parameters of a request.

    Args:
        max_tokens: most tokens of the answer, unless the request sets another limit.
        grammar: the grammar that the answer follows.
        defaults: the model's own, from `model_defaults`.

    Raises:
        InvalidRequest: a value is out of its range; the message names the field.
    """
    given = {name: value for name in SAMPLED if (value := getattr(body, name, None)) is not None}
    wanted = _max_tokens(body)
    given = {**defaults, **given, "max_tokens": min(max_tokens, defaults.get("max_tokens", max_tokens))}
    if wanted is not None:
        given["max_tokens"] = wanted
    given["logprobs"] = _logprobs(body)
    given["structured_outputs"] = grammar
    if isinstance(body, CompletionBody):
        given["prompt_logprobs"] = _prompt_logprobs(body, given["logprobs"])
        given["max_tokens"] += is_only_prompt(body)  # for the engines, every answer has at least one token
    if "seed" in given:  # in OpenAI's API it may be negative
        given["seed"] %= SEEDS
    return SamplingParams(**given)


def _logprobs(body: SamplingFields) -> int | None:
    """Return for how many tokens besides the chosen one log-probabilities are wanted; None: for none at all. Raises
    ApiError."""
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
    """Return how many log-probabilities of each prompt token are wanted, by themselves or to be echoed with the prompt,
    whichever is more; None: none."""
    wanted = [body.prompt_logprobs, logprobs if body.echo else None]
    return max((each for each in wanted if each is not None), default=None)


def is_only_prompt(body: CompletionBody) -> bool:
    """Whether only the prompt and information about it is wanted, and no answer."""
    return body.max_tokens == 0 and bool(body.echo)


def _max_tokens(body: SamplingFields) -> int | None:
    newer = body.max_completion_tokens if isinstance(body, ChatBody) else None
    return body.max_tokens if newer is None else newer
