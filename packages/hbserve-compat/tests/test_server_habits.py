"""Requests as people send them by habit, of other servers and other languages: served, or refused with what to do."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hbserve_fake_scheduler import FakeServer

from hbserve.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(small_model: Callable[[str], Path]) -> FakeServer:
    server = FakeServer(load_tokenizer(small_model("qwen3")))
    server.answers("one", "two")
    return server


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    "content",
    [
        ["Hello, ", "you"],
        [{"type": "input_text", "text": "Hello, "}, {"type": "output_text", "text": "you"}],
        [{"type": "text", "text": "Hello, "}, "you"],
    ],
)
async def test_parts_of_a_content_are_text_by_whichever_name(server, content):
    assert (await server.chat(messages=[{"role": "user", "content": content}])).status_code == 200
    assert server.prompt.startswith("<user>Hello, you")


@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": ["text"]}, {"text": "a"}, {}, None, 5, ["a"]])
async def test_other_parts_are_refused_by_their_place(server, part):
    response = await server.chat(messages=[{"role": "user", "content": ["a", part]}])
    assert error_of(response, 400)["param"] == "messages[0].content[1]"


async def test_a_whole_number_is_one_however_it_is_written(server):
    response = await server.chat(max_tokens=4.0, seed=7.0, n=1.0, temperature=1.0, top_k=5.0)
    assert response.status_code == 200
    ((_, params),) = server.scheduler.asked
    assert (params.max_tokens, params.seed, params.top_k) == (4, 7, 5)
    assert type(params.max_tokens) is int
    for field in ("max_tokens", "n", "seed"):
        error = error_of(await server.chat(**{field: 2.5}), 400)
        assert (error["param"], "got `float`" in error["message"]) == (field, True)
    assert error_of(await server.chat(max_tokens=1e300), 400)["param"] == "max_tokens"


async def test_a_key_that_is_no_token_is_named_with_its_field(server):
    error = error_of(await server.chat(logit_bias={"a": 1}), 400)
    assert error["param"] == "logit_bias"
    assert error["message"] == "logit_bias: a key of it: expected `int`, got `str`"


async def test_an_unknown_field_that_is_null_is_not_there(server):
    response = await server.chat(user=None, store=None, foo=None, bar=1)
    assert response.headers["x-hbserve-ignored"] == "bar"
    assert "x-hbserve-ignored" not in (await server.chat(metadata=None)).headers


async def send(server: FakeServer, headers: dict[str, str], body: bytes | None = None) -> httpx.Response:
    body = json.dumps({"messages": MESSAGES}).encode() if body is None else body
    return await server.client.post("/v1/chat/completions", content=body, headers=headers)


async def test_a_compressed_body_is_refused_as_that(server):
    body = gzip.compress(json.dumps({"messages": MESSAGES}).encode())
    error = error_of(await send(server, {"content-encoding": "gzip"}, body), 415)
    assert (error["type"], error["message"]) == (
        "invalid_request_error",
        "content-encoding='gzip': is not served; send the body as it is",
    )
    assert (await send(server, {"content-encoding": "identity"})).status_code == 200


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("kind", [FORM, "text/plain", None])
async def test_a_page_of_another_origin_does_not_get_a_request_through_unasked(server, kind):
    """A browser asks first (OPTIONS) only about what is called JSON. curl calls its bodies forms."""
    named = {} if kind is None else {"content-type": kind}
    assert (await send(server, named)).status_code == 200
    error = error_of(await send(server, {**named, "origin": "https://example.org"}), 415)
    assert "expected application/json from a browser" in error["message"]
    assert len(server.scheduler.asked) == 1
    json_of_a_page = {"content-type": "application/json; charset=utf-8", "origin": "http://test"}
    assert (await send(server, json_of_a_page)).status_code == 200


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/v1/v1/chat/completions", "/v1//chat/completions", "//v1/chat/completions"]
)
async def test_a_wrong_base_url_is_told_the_path_that_there_is(server, path):
    response = await server.client.post(f"http://test{path}", json={"messages": MESSAGES})
    assert error_of(response, 404)["message"].endswith("Not Found; there is /v1/chat/completions")


async def test_a_path_that_is_like_none_is_referred_to_the_documents(server):
    for path in ("/v1/embeddings", "/v1", "/nothing"):
        assert "docs/openai-server.md" in error_of(await server.post(path), 404)["message"]
    assert error_of(await server.post("/v1/tokenize"), 404)["message"].endswith("there is /tokenize")


async def test_models_are_listed_with_a_slash_behind_too(server):
    response = await server.client.get("/v1/models/")
    assert response.status_code == 200
    assert response.json() == (await server.client.get("/v1/models")).json()
