"""Fields of requests to /v1/completions and /v1/chat/completions: their types, and what is done with each.

A field is served unless NOT_SERVED has it, and then it may only have one of the values there. A field of SamplingParams
that is not in NOT_SERVED is passed on under its own name, so to serve one, delete its line there. A field that is not
here is ignored, and named in a header of the answer. docs/openai-server.md lists all; a test compares it with this.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from hbserve.server.http.api_error import ApiError
from hbserve_rpc import SamplingParams
from hbserve_rpc.plain_values import shown

NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": (),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": (),
    "kv_transfer_params": (),
    "prompt_embeds": (),
    "cache_salt": (),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "moderation": (),
    "watermarking": (False,),
    "return_prompt_text": (False,),
    "ec_transfer_params": (),
    "structural_tag": (),
    "extra_body": ({},),
}
"""Fields that are not served, with the values that they may have besides null."""
IGNORED = {
    "user": "nothing is stored about users",
    "metadata": "nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is only one service tier",
    "safety_identifier": "nothing is stored about users",
    "prompt_cache_key": "cached prefixes are found by their tokens",
    "verbosity": "chat templates have no such setting",
    "request_id": "the header X-Request-Id sets it",
    "session_id": "cached prefixes are found by their tokens",
    "prompt_cache_options": "cached prefixes are found by their tokens",
    "prompt_cache_retention": "cached prefixes stay as long as there is room",
    "stream_interval": "tokens are sent as soon as they are computed",
    "spaces_between_special_tokens": "the tokenizer decides where spaces are",
    "truncation_side": "nothing is truncated",
    "mm_processor_kwargs": "prompts are text only",
    "media_io_kwargs": "prompts are text only",
    "guided_decoding_backend": "there is only one backend",
    "vllm_xargs": "these are for extensions of vLLM",
}
"""Fields that clients are known to send and that have no effect, with the reason. Unlisted fields have none either."""


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options` of a request."""

    include_usage: bool | None = None
    """Whether a last chunk, without choices, has the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Whether each chunk has the usage so far."""


class RequestBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of a request for an answer. A field that is null is treated as absent."""

    id_prefix: ClassVar[str]
    """Prefix of the ids of answers."""
    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of this body that are not served, in the format of NOT_SERVED."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Names of other APIs, each with the field of this body that a request with that name means."""

    model: str | None = None


class SamplingFields(RequestBody, frozen=True, kw_only=True):
    """Fields that both endpoints take."""

    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_SERVED
    elsewhere: ClassVar[Mapping[str, str]] = {
        "max_output_tokens": "max_tokens",
        "max_new_tokens": "max_tokens",
        "stop_sequences": "stop",
        "guided_json": "structured_outputs.json",
        "guided_regex": "structured_outputs.regex",
        "guided_choice": "structured_outputs.choice",
        "guided_grammar": "structured_outputs.grammar",
    }

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = None
    timeout_s: float | None = None
    echo: bool | None = None
    response_format: Any = None
    """OpenAI's form of `structured_outputs`."""
    structured_outputs: Any = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: Any = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Whether tokens in `logprobs` are shown by their ids, because not every token is text by itself."""
    kv_transfer_params: Any = None
    cache_salt: str | None = None
    logprob_token_ids: list[int] | None = None
    repetition_detection: Any = None
    thinking_token_budget: int | None = None
    watermarking: bool | None = None
    ec_transfer_params: Any = None
    structural_tag: Any = None
    extra_body: Any = None
    """An argument of OpenAI's Python client, whose content belongs into the body itself."""


class CompletionBody(SamplingFields, frozen=True, kw_only=True):
    """Body of /v1/completions."""

    id_prefix: ClassVar[str] = "cmpl-"
    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        name: values for name, values in NOT_SERVED.items() if name not in ("echo", "add_special_tokens")
    }
    elsewhere: ClassVar[Mapping[str, str]] = {
        **SamplingFields.elsewhere,
        "max_completion_tokens": "max_tokens",
        "messages": "prompt",
        "input": "prompt",
    }
    prompt: str | tuple[Any, ...]
    """Text, token ids, or several of either. A tuple rather than a list, like `hbserve_rpc.prompt_shape.PromptIds`."""
    logprobs: int | bool | None = None
    suffix: str | None = None
    prompt_embeds: Any = None


class ChatBody(SamplingFields, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    id_prefix: ClassVar[str] = "chatcmpl-"
    elsewhere: ClassVar[Mapping[str, str]] = {
        **SamplingFields.elsewhere,
        "prompt": "messages",
        "input": "messages",
        "functions": "tools",
    }
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    """`max_tokens` by its newer name, which is preferred."""
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = None
    """Passed to the chat template."""
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None
    return_prompt_text: bool | None = None
    chat_template: str | None = None
    documents: list[dict[str, Any]] | None = None
    """Passed to the chat template."""
    continue_final_message: bool | None = None
    """Whether the answer continues the last message."""


def require_own_names(content: Mapping[str, Any], kind: type[RequestBody]) -> None:
    """Raise ApiError (400) if a field has another API's name, and not its own. Ignoring `max_new_tokens`, for example,
    would mean to answer until the context is full."""
    for name, own in kind.elsewhere.items():
        if content.get(name) is not None and content.get(own.partition(".")[0]) is None:
            raise ApiError(400, f"{name}={shown(content[name])}: is called {own} here", param=name)


def require_served(body: RequestBody) -> None:
    """Raise ApiError (400) if a field has a value that is not served. Names the field, and the values that are."""
    for name, allowed in body.not_served.items():
        value = getattr(body, name, None)
        if value is not None and not any(type(value) is type(each) and value == each for each in allowed):
            expected = " or ".join(["null", *(shown(each) for each in allowed)])
            raise ApiError(400, f"{name}={shown(value)}: is not served; expected {expected}", param=name)


SAMPLED = [name for name in SamplingParams.__struct_fields__ if name not in NOT_SERVED and name != "logprobs"]
"""Fields of SamplingParams that requests may set under the same names; `logprobs` differs between the endpoints."""
