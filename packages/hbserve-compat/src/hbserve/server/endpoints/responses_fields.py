"""Fields of requests to /v1/responses: their types, and what is done with each, as request_fields.py describes it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from hbserve.server.fields.request_fields import RequestBody

NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "moderation": (),
    "context_management": ([],),
    "image": (),
    "access_programs": (),
    "background_options": (),
    "cache_salt": (),
    "previous_response": (),
    "previous_input_messages": (),
    "enable_response_messages": (False,),
}
"""Fields that are not served, with the values that they may have besides null. Nothing is stored, so later requests
cannot refer to anything."""
IGNORED = {
    "metadata": "nothing is stored",
    "user": "nothing is stored about users",
    "safety_identifier": "nothing is stored about users",
    "service_tier": "there is only one service tier",
    "stream_options": "nothing is obfuscated",
    "prompt_cache_key": "cached prefixes are found by their tokens",
    "prompt_cache_options": "cached prefixes are found by their tokens",
    "prompt_cache_retention": "cached prefixes stay as long as there is room",
}
"""Fields that clients are known to send and that have no effect, with the reason. Unlisted fields have none either."""
AS_IN_A_CHAT = [
    "stream",
    "temperature",
    "top_p",
    "top_logprobs",
    "parallel_tool_calls",
    "priority",
    "timeout_s",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "structured_outputs",
    "chat_template_kwargs",
]
"""Fields that a chat has under the same names, and that are passed on."""
LOGPROBS = "message.output_text.logprobs"
INCLUDED = ["reasoning.encrypted_content", LOGPROBS]
"""Values that `include` may have. Clients that store nothing always send the first; here, reasoning is plain text."""


class TextConfig(msgspec.Struct, frozen=True):
    """`text` of a request."""

    format: dict[str, Any] | None = None
    verbosity: Any = None
    """Has no effect: chat templates do not know it."""


class ReasoningConfig(msgspec.Struct, frozen=True):
    """`reasoning` of a request."""

    effort: str | None = None
    """Passed to the chat template."""
    summary: Any = None
    """Has no effect: reasoning comes whole."""


class ResponsesBody(RequestBody, frozen=True, kw_only=True):
    """Body of /v1/responses."""

    id_prefix: ClassVar[str] = "resp_"
    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_SERVED
    elsewhere: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "max_new_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "system": "instructions",
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    priority: int | None = None
    timeout_s: float | None = None
    """`priority` and `timeout_s`, as in chats, are extensions of ours."""
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    structured_outputs: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    """The fields from `top_k` on are as in chats; most of them are vLLM's extensions."""
    store: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    truncation: str | None = None
    max_tool_calls: int | None = None
    moderation: Any = None
    context_management: Any = None
    image: Any = None
    access_programs: Any = None
    background_options: Any = None
    cache_salt: str | None = None
    previous_response: Any = None
    previous_input_messages: Any = None
    enable_response_messages: bool | None = None
