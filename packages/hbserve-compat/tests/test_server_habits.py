"""Requests that people send from habit with other servers and languages: they are served, or refused with advice."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hbserve_fake_scheduler import FakeServer

from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc.messages import InstanceInfo

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


async def test_an_unknown_field_of_an_object_is_named_by_its_path(server):
    response = await server.chat(stream=True, stream_options={"include_usgae": True, "odd": None})
    assert response.headers["x-hbserve-ignored"] == "stream_options.include_usgae"


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


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/version", "/tokenizer_info"])
async def test_a_slash_behind_a_path_changes_nothing(server, path):
    response = await server.client.get(f"{path}/")
    assert response.status_code == 200
    assert response.content == (await server.client.get(path)).content


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1/responses/", "/v1/messages/"])
async def test_what_is_posted_to_a_path_with_a_slash_is_answered_and_not_sent_elsewhere(server, path):
    field = {"input": "hi"} if "responses" in path else {"messages": MESSAGES, "max_tokens": 4}
    assert (await server.post(path, **field)).status_code == 200


OTHER_NAMES = [
    ("/v1/chat/completions", {"messages": MESSAGES}, "max_new_tokens", "max_tokens"),
    ("/v1/chat/completions", {"messages": MESSAGES}, "max_output_tokens", "max_tokens"),
    ("/v1/chat/completions", {"messages": MESSAGES}, "stop_sequences", "stop"),
    ("/v1/chat/completions", {}, "prompt", "messages"),
    ("/v1/completions", {"prompt": "hi"}, "max_completion_tokens", "max_tokens"),
    ("/v1/completions", {}, "messages", "prompt"),
    ("/v1/responses", {"input": "hi"}, "max_tokens", "max_output_tokens"),
    ("/v1/responses", {"input": "hi"}, "response_format", "text.format"),
    ("/v1/responses", {}, "messages", "input"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}, "stop", "stop_sequences"),
    ("/v1/messages", {"messages": MESSAGES}, "max_completion_tokens", "max_tokens"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}, "output_format", "output_config.format"),
]


@pytest.mark.parametrize(("path", "body", "name", "own"), OTHER_NAMES)
async def test_a_field_by_the_name_of_another_api_is_refused_with_its_own(server, path, body, name, own):
    response = await server.post(path, **body, **{name: 4})
    assert error_of(response, 400)["message"] == f"{name}=4: is called {own} here"
    assert not server.scheduler.asked


async def test_a_field_by_both_names_has_the_one_that_is_its_own(server):
    """Some load generators send both names to every endpoint."""
    response = await server.complete(max_tokens=2, max_completion_tokens=2)
    assert response.json()["usage"]["completion_tokens"] == 2
    assert response.headers["x-hbserve-ignored"] == "max_completion_tokens"


async def test_a_body_may_begin_with_a_byte_order_mark(server):
    body = json.dumps({"messages": MESSAGES}).encode("utf-8-sig")
    assert (await send(server, {}, body)).status_code == 200


BROKEN = {
    "the body is empty; expected a JSON object": b"",
    "the body is null; expected a JSON object": b"null",
    "the body is not UTF-8 text: byte 11 is 0xe4": '{"prompt": "\xe4"}'.replace(" ", "").encode("latin-1"),
    "the body is not Unicode text: byte 12 is \\ud83d, half of a surrogate pair": b'{"prompt": "\\ud83d"}',
    "the body is not Unicode text: byte 23 is \\ude00, half of a surrogate pair": b'{"prompt":"\\ud83d\\ude00\\ude00"}',
    "the body is not JSON: Input data was truncated": b'{"prompt": "\\ud83d\\ude00',
    "the body is not UTF-8 text: byte 0 is 0xff": json.dumps({"messages": MESSAGES}).encode("utf-16"),
}


@pytest.mark.parametrize("message", BROKEN)
async def test_a_body_that_cannot_be_read_is_told_what_it_is_and_where(server, message):
    assert error_of(await send(server, {}, BROKEN[message]), 400)["message"] == message


async def test_another_method_is_told_which_there_are(server):
    response = await server.client.get("/v1/chat/completions")
    assert error_of(response, 405)["message"] == "GET /v1/chat/completions: Method Not Allowed; expected POST"


async def test_tokens_that_no_model_here_has_are_no_empty_text(server, monkeypatch):
    error = error_of(await server.post("/detokenize", tokens=[5, 320]), 400)
    assert (error["param"], error["message"]) == ("tokens[1]", "tokens[1]=320: is outside the vocabulary [0, 320)")
    info = server.scheduler.info()
    starting = msgspec.structs.replace(info, instances=[InstanceInfo("h1", "hybrid", "1", "starting"), *info.instances])
    for told, status in ((starting, 400), (msgspec.structs.replace(info, instances=[]), 200)):
        monkeypatch.setattr(server.scheduler, "info", lambda told=told: told)
        assert (await server.post("/detokenize", tokens=[5, 320])).status_code == status


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_an_answer_without_a_second_token_has_no_pace(server, max_tokens):
    answer = (await server.complete(max_tokens=max_tokens, echo=True)).json()
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert answer["metrics"]["tokens_per_second"] is None
