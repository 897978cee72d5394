"""Random bodies for each endpoint: what is wrong is a 4xx that says so in a line, and what is right is answered."""

import copy
import json
import math
import random
from typing import Any

import pytest
from hbserve_fake_scheduler import server_that_thinks

TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "1"}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ASKED: list[Any] = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {
            "messages": ASKED, "max_completion_tokens": 5, "stream": True, "n": 2, "seed": 3, "stop": ["x"],
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "logprobs": True,
            "top_logprobs": 3,
        },
        {
            "messages": [
                *ASKED,
                {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "2"},
            ],
            "tools": [{"type": "function", "function": TOOL}], "tool_choice": "auto", "parallel_tool_calls": False,
        },
        {"messages": ASKED, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
        {"messages": ASKED, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {
            "messages": ASKED, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1,
            "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {"5": 1}, "min_tokens": 2,
            "ignore_eos": True, "stop_token_ids": [3], "skip_special_tokens": False, "bad_words": ["a"],
            "include_stop_str_in_output": True, "prompt_logprobs": 1, "chat_template_kwargs": {"x": 1},
            "add_generation_prompt": True, "priority": 0, "return_token_ids": True, "reasoning_effort": "low",
        },
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "max_tokens": 4, "n": 2, "best_of": 2, "logprobs": 2, "echo": True, "model": "small"},
        {"prompt": [1, 2, 3], "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": [[1, 2], [3]], "temperature": 0, "structured_outputs": {"choice": ["a", "b"]}},
        {"prompt": "x", "response_format": {"type": "json_object"}, "truncate_prompt_tokens": 3},
    ],
    "/v1/responses": [
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "instructions": "i",
            "stream": True, "max_output_tokens": 6, "temperature": 0.5, "reasoning": {"effort": "low"},
            "text": {"format": {"type": "text"}}, "store": False, "tools": [{"type": "function", **TOOL}],
            "tool_choice": "auto", "metadata": {"a": "b"}, "include": [], "parallel_tool_calls": True,
        },
        {
            "input": [
                {"type": "message", "role": "user", "content": "q"},
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "3"},
            ],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        },
    ],
    "/v1/messages": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]},
            ],
            "max_tokens": 5, "system": [{"type": "text", "text": "s"}], "stream": True, "stop_sequences": ["z"],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
            "thinking": {"type": "disabled"}, "metadata": {"user_id": "u"},
        },
    ],
    "/v1/messages/count_tokens": [{"messages": [{"role": "user", "content": "hi"}]}],
    "/v1/responses/input_tokens": [{"input": "hi"}],
    "/tokenize": [{"prompt": "abc", "add_special_tokens": True}, {"messages": ASKED, "add_generation_prompt": True}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 10**6, 2**31, 2**63, 2**64, 10**40, 0.5, -0.5, 1e308, 1e-320, math.nan, math.inf, "",
    " ", "a", "auto", "required", "text", "json_object", "json_schema", "function", "user", "assistant", "tool", "\0",
    "\ud800", "😀", "x" * 5000, "a - at `$.b`", "{", "[a-", "(a+)+$", "1", "null", [], {}, [[]], [None], [{}], [""],
    {"a": None}, {"type": "x"}, {"type": None}, {"type": {}}, {"$ref": "#/x"}, {"anyOf": []}, {"enum": []},
    {"pattern": "("}, {"minimum": 1e308}, ["a"] * 50, list(range(40)), {"name": "f"}, {"type": "function"},
    {"type": "function", "function": {"name": "g"}}, {"type": "image_url", "image_url": {"url": "http://a"}},
    [{"type": "text", "text": None}], [{"role": "user"}], [{"role": "user", "content": ""}],
]  # fmt: skip
NAMES = [
    "model", "stop", "logprobs", "echo", "seed", "tools", "response_format", "structured_outputs", "chat_template",
    "continue_final_message", "kv_transfer_params", "allowed_token_ids", "prompt_embeds", "prompt", "input", "messages",
    "timeout_s", "use_beam_search", "max_tokens", "min_tokens", "cache_salt", "background", "x\0y", "",
]  # fmt: skip
MOST_ERROR = 1000
"""Most characters of an error, which is one line that repeats some of what was sent."""


def places(value: Any) -> list[tuple[Any, Any]]:
    """Yield each container in a body, with a key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def spoilt(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with one to three changes."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice([1, 1, 2, 3])):
        odd = copy.deepcopy(rng.choice(ODD))
        at, key = rng.choice(places(body) or [(body, "model")])
        kind = rng.random()
        if kind < 0.2:
            body[rng.choice(NAMES)] = odd
        elif kind < 0.3 and key in at:
            del at[key]
        elif kind < 0.4 and isinstance(at, dict):
            at[rng.choice(NAMES)] = odd
        elif isinstance(at, dict) or key < len(at):
            at[key] = odd
    return body


@pytest.mark.parametrize("path", BODIES)
async def test_a_body_of_any_kind_is_answered_or_refused_in_a_line(small_model, path):
    server, rng = server_that_thinks(small_model), random.Random(path)
    statuses = set()
    for number in range(250):
        body = spoilt(rng, BODIES[path][number % len(BODIES[path])])
        data = json.dumps(body).encode(errors="surrogatepass")
        response = await server.client.post(path, content=data, headers={"Content-Type": "application/json"})
        statuses.add(response.status_code)
        what = f"{data!r}: {response.status_code} {response.text}"
        assert response.status_code < 500, what
        if response.status_code >= 400:
            error = response.json()["error"]
            assert 0 < len(error["message"]) <= MOST_ERROR, what
            assert "Traceback" not in error["message"], what
    assert {200, 400} <= statuses
