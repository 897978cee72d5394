"""Fields of requests to /v1/messages: their types, and what is done with each, as request_fields.py describes it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from hbserve.server.fields.request_fields import RequestBody

NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "compaction": (),
    "thread": (),
    "cache_salt": (),
    "kv_transfer_params": (),
}
"""Fields that are not served, with the values that they may have besides null."""
IGNORED = {
    "metadata": "nothing is stored about users",
    "service_tier": "there is only one service tier",
    "cache_control": "cached prefixes are found by their tokens",
    "context_management": "messages are never shortened",
    "inference_geo": "requests are computed where the server is",
    "diagnostics": "there are no diagnostics",
    "user_profile_id": "nothing is stored about users",
    "workspace_id": "there is only one workspace",
    "fallbacks": "there is only one model, which does not decline",
    "fallback_credit_token": "nothing is billed",
    "billing_policy": "nothing is billed",
}
"""Fields that clients are known to send and that have no effect, with the reason. Unlisted fields have none either."""


class Thinking(msgspec.Struct, frozen=True):
    """`thinking` of a request."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Any = None
    """Has no effect: the model itself decides how long it thinks."""
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """`tool_choice` of a request."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(msgspec.Struct, frozen=True):
    """`output_config` of a request."""

    effort: str | None = None
    """Passed to the chat template."""
    format: dict[str, Any] | None = None


class CountTokensBody(RequestBody, frozen=True, kw_only=True):
    """Body of /v1/messages/count_tokens: all that is the prompt."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, as in chats: an extension of vLLM's."""


class MessagesBody(CountTokensBody, frozen=True, kw_only=True):
    """Body of /v1/messages."""

    id_prefix: ClassVar[str] = "msg_"
    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_SERVED
    elsewhere: ClassVar[Mapping[str, str]] = {
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "max_new_tokens": "max_tokens",
        "stop": "stop_sequences",
        "response_format": "output_config.format",
        "output_format": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "instructions": "system",
        "input": "messages",
        "prompt": "messages",
    }

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    priority: int | None = None
    timeout_s: float | None = None
    """`priority` and `timeout_s`, as in chats, are extensions of ours."""
    container: Any = None
    mcp_servers: Any = None
    speed: str | None = None
    compaction: Any = None
    thread: Any = None
    cache_salt: str | None = None
    kv_transfer_params: Any = None
