"""Bodies, heads and payloads that clients of the OpenAI server might send, most of them wrong."""

import json
from typing import Any

from hypothesis import strategies as st

from hbserve.server.endpoints.anthropic_fields import MessagesBody
from hbserve.server.endpoints.responses_fields import ResponsesBody
from hbserve.server.fields.request_fields import ChatBody, CompletionBody

LEAF = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 5) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["auto", "\x00", "x" * 600, 2**70, -(2**70), 1e308, "text", "user"])
)  # fmt: skip
VALUE: st.SearchStrategy[Any] = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
CONTENT = st.text(max_size=4) | VALUE | st.lists(st.deferred(lambda: PART), max_size=3)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "boss"]), "content": CONTENT},
    optional={"tool_calls": VALUE, "reasoning": LEAF, "name": LEAF},
)
PART: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "input_text", "thinking", "tool_use", "tool_result", "function_call", "reasoning"]
        )
    },
    optional={"text": LEAF, "content": VALUE, "input": VALUE, "name": LEAF, "arguments": LEAF, "role": st.just("user")},
)
KINDS = (ChatBody, CompletionBody, ResponsesBody, MessagesBody)
CHANGES = st.dictionaries(
    st.sampled_from([*(name for kind in KINDS for name in kind.__struct_fields__), "user", "a\r\nb"]),
    VALUE,
    max_size=2,
)
GOOD = st.fixed_dictionaries(
    {"prompt": st.just("hi") | st.just([5, 6]), "stream": st.booleans(), "n": st.integers(1, 3)}
)
CHAT = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=2), "stream": st.booleans(), "max_tokens": st.just(9)}
)
RESPONSE = st.fixed_dictionaries(
    {"input": st.text(max_size=4) | st.lists(MESSAGE | PART, max_size=3), "stream": st.booleans()}
)
BODY = (
    st.binary(max_size=30)
    | st.tuples(GOOD | CHAT | RESPONSE | VALUE.filter(lambda value: isinstance(value, dict)), CHANGES).map(
        lambda both: json.dumps({**both[0], **both[1]}).encode()
    )
)  # fmt: skip
GENERATING = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
PATHS = st.sampled_from([*GENERATING, "/tokenize", "/detokenize", "/v1/models/%00"])
LINE = st.sampled_from(
    [
        "POST /v1/completions HTTP/1.1",
        "GET /health HTTP/1.1",
        "GET / HTTP/1.0",
        "\x00",
        "POST * HTTP/9.9",
        "GET /%ff%0a",
    ]
)
HEADER = st.sampled_from(
    [
        "Content-Length: 20",
        "Content-Length: -1",
        "Content-Length: 9999999999",
        "Transfer-Encoding: chunked",
        "X-Request-Id: a",
        "Expect: 100-continue",
        "Connection: close",
        ": empty",
        "A: " + "b" * 9000,
        "Host: a",
    ]
)
STREAMED = b'{"prompt": "hi", "stream": true}'
PAYLOAD = st.binary(max_size=20) | st.sampled_from([STREAMED, b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n"])
