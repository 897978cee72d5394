"""Refusals and failures of the OpenAI server: a status, an error that names what is wrong, and nothing left behind."""

import asyncio
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hbserve_fake_scheduler import FakeServer, chunks_of

from hbserve.server.fields.request_fields import NOT_SERVED, ChatBody, CompletionBody
from hbserve.server.http.request_body import ignored_header
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import LogitsNotFinite, RequestTimeout, Unavailable
from hbserve_scheduler import RequestFailed


@pytest.fixture
def tokenizer(small_model: Callable[[str], Path]) -> Any:
    return load_tokenizer(small_model("qwen3"))


@pytest.fixture
def server(tokenizer: Any) -> FakeServer:
    server = FakeServer(tokenizer)
    server.answers("one", "two")
    return server


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    (name,) = response.json()
    error: dict[str, Any] = response.json()[name]
    assert (name, set(error)) == ("error", {"message", "type", "param", "code"})
    return error


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "a wrong type": ({"max_tokens": "many"}, "max_tokens", "expected `int"),
    "a value out of its range": ({"temperature": -1}, "temperature", "temperature=-1.0: expected a number >= 0"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "max_tokens=0: expected an integer from 1"),
    "too many answers": ({"n": 1025}, "n", "n=1025: expected 1 to 1024"),
    "no answers": ({"n": 0}, "n", "n=0: expected 1 to 1024"),
    "too many stops": ({"stop": ["a"] * 17}, "stop", "at most 16"),
    "another best_of": ({"best_of": 5}, "best_of", "best_of=5: is not served; expected null, 1, or n=1"),
    "options of no stream": ({"stream_options": {}}, "stream_options", "only with stream=true"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format", "expected type text"),
    "a penalty": ({"frequency_penalty": 2.5}, "frequency_penalty", "frequency_penalty=2.5: expected a number"),
    "a value that is not served": ({"length_penalty": 0.5}, "length_penalty", "is not served; expected null or 1.0"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_value_is_a_400_that_names_its_field(server, case):
    body, param, message = WRONG[case]
    for response in [await server.complete(**body), await server.chat(**body)]:
        error = error_of(response, 400)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert message in error["message"]
    assert not server.scheduler.asked


@pytest.mark.parametrize("name", NOT_SERVED)
async def test_a_field_that_is_not_served_may_have_its_neutral_values_only(server, name):
    for kind, post in ((CompletionBody, server.complete), (ChatBody, server.chat)):
        if name not in kind.__struct_fields__ or name not in kind.not_served:
            continue
        for value in (None, *NOT_SERVED[name]):
            assert (await post(**{name: value})).status_code == 200, (name, value)
    body = next(value for value in (0.25, 3, "x", ["x"], [1], True, {"5": 1.0}) if value is not None)
    candidates = [body, 3, "x", ["x"], [7], True, {"5": 1.5}]
    statuses = {(await server.chat(**{name: value})).status_code for value in candidates} | {
        (await server.complete(**{name: value})).status_code
        for value in candidates
        if name in CompletionBody.not_served
    }
    assert 400 in statuses
    assert statuses <= {200, 400}, "a field of the other endpoint is ignored"


async def test_the_most_tokens_of_a_chat_are_named_as_the_request_names_them(server):
    for name in ("max_tokens", "max_completion_tokens"):
        error = error_of(await server.chat(**{name: 0}), 400)
        assert (error["param"], error["message"].partition("=")[0]) == (name, name)


async def test_logprobs_are_bounded(server):
    assert error_of(await server.chat(logprobs=True, top_logprobs=21), 400)["param"] == "top_logprobs"
    assert error_of(await server.chat(top_logprobs=2), 400)["param"] == "top_logprobs"
    assert error_of(await server.complete(logprobs=21), 400)["param"] == "logprobs"
    assert error_of(await server.complete(prompt_logprobs=21), 400)["param"] == "prompt_logprobs"
    assert error_of(await server.complete(logprobs=21, echo=True), 400)["param"] == "logprobs"


CHATS = {
    "no messages": ([], "messages", "expected 1 to 4096"),
    "a strange role": ([{"role": "boss", "content": "a"}], "messages[0].role", "expected one of assistant"),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "messages[0].content[0]",
        "expected text",
    ),
    "a number": ([{"role": "user", "content": 5}], "messages[0].content", "messages[0].content=5: expected a string"),
    "a content that is called otherwise": (
        [{"role": "user", "contnet": "a"}],
        "messages[0].content",
        "messages[0]: has no content, but 'contnet, role'",
    ),
    "a content that is nothing": (
        [{"role": "user", "content": None}],
        "messages[0].content",
        "messages[0]: has no content, but 'role'",
    ),
    "a part without its text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "messages[0].content[0].text",
        "messages[0].content[0].text=None: expected a string",
    ),
    "a call by its older name": (
        [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}],
        "messages[0].function_call",
        "messages[0].function_call={'name': 'f', 'arguments': '{}'}: is called tool_calls here",
    ),
    "half a character": ([{"role": "user", "content": "\ud83d"}], None, ""),
}


@pytest.mark.parametrize("case", CHATS)
async def test_a_wrong_message_is_a_400_that_names_its_place(server, case):
    messages, param, message = CHATS[case]
    body = json.dumps({"messages": messages}).encode()
    error = error_of(await server.client.post("/v1/chat/completions", content=body), 400)
    assert message in error["message"]
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt=[]: expected at least one"),
        (["a"] * 1025, "prompt: 1025 of them; expected at most 1024"),
        ([[]], "expected at least one token"),
        ([5, "a"], "prompt[1]='a'"),
        (["a", 5], "prompt[1]=5"),
        (["a", [7, "b"]], "prompt[1][1]='b'"),
        (["a", "x" * 600], "prompt[1]: 600 tokens"),
        ([320], "outside the vocabulary"),
        (["a", [320]], "prompt[1][0]: token 320 is outside the vocabulary"),
        ([-1], "expected a token id"),
        ("x" * 600, "600 tokens; the instances take at most 511"),
        ({}, "expected"),
    ],
)
async def test_a_prompt_that_can_never_run_is_a_400(server, prompt, message):
    error = error_of(await server.complete(prompt=prompt), 400)
    assert message in error["message"]
    assert error["param"] == "prompt"
    assert not server.scheduler.running


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100000, b'{"prompt": "a", "prompt"}'])
async def test_a_body_that_is_no_json_object_is_a_400(server, body):
    error_of(await server.client.post("/v1/completions", content=body), 400)


async def test_a_body_over_the_limit_is_a_413_whether_it_says_its_length_or_not(tokenizer):
    server = FakeServer(tokenizer, max_body_size="1KiB")

    async def parts() -> Any:
        for _ in range(5):
            yield b"x" * 500

    for content in (b"x" * 2000, parts()):
        error_of(await server.client.post("/v1/completions", content=content), 413)


async def test_an_unknown_model_path_or_method_is_a_404_or_405_in_the_same_shape(server):
    assert error_of(await server.chat(model="other"), 404)["param"] == "model"
    assert error_of(await server.client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    error_of(await server.client.get("/v1/embeddings"), 404)
    error_of(await server.client.get("/v1/completions"), 405)


async def test_template_arguments_that_are_ours_cannot_be_set(server):
    error = error_of(await server.chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), 400)
    assert error["param"] == "chat_template_kwargs.chat_template"


async def test_a_model_without_a_chat_template_says_so(tokenizer):
    server = FakeServer(tokenizer, chat_template=None)
    assert "chat template" in error_of(await server.chat(), 400)["message"]


async def test_overload_is_a_503_with_a_time_after_which_to_try_again_and_nothing_of_a_batch_goes_on(server):
    server.scheduler.most_running = 2
    server.scheduler.steps = [asyncio.Event()]
    response = await server.complete(prompt=["a", "b", "c"])
    assert error_of(response, 503)["type"] == "overloaded_error"
    assert response.headers["retry-after"] == "8", "the scheduler's 7.2 s"
    assert not server.scheduler.running
    assert server.scheduler.num_abandoned == 2


async def test_who_is_refused_for_lack_of_room_does_not_wait_for_a_prompt_to_be_encoded(server, monkeypatch):
    monkeypatch.setattr(server.service.model.encoder, "text", pytest.fail)
    server.scheduler.most_running = 0
    response = await server.complete(prompt="a" * 100_000)
    assert error_of(response, 503)["message"] == "so many requests are waiting"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": list(range(300))}),
        ("/v1/completions", {"prompt": "a" * 300}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 300}]}),
    ],
)
async def test_the_collector_does_not_go_through_the_prompt_of_a_request_that_waits(server, path, body):
    """With thousands of waiting requests, most objects are their prompts, and a full pass would delay refusals."""
    server.scheduler.steps = [asyncio.Event()]
    gc.freeze()  # what was there before
    try:
        waiting = asyncio.create_task(server.post(path, **body))
        async with asyncio.timeout(20):
            while not server.scheduler.running:
                await asyncio.sleep(0.01)
        gc.collect()
        of_ids = [each for each in gc.get_objects() if type(each) in (list, tuple) and len(each) >= 300]
    finally:
        gc.unfreeze()
    prompt = [*server.scheduler.asked[0][0]]
    assert not [each for each in of_ids if [*each] == prompt and each is not prompt and each is not body.get("prompt")]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_priority_and_time_limit_of_a_request_are_handed_on(server):
    server.answers("x")
    await server.chat(priority=-3, timeout_s=2.5)
    await server.complete(prompt="a", priority=7)
    await server.post("/v1/responses", input="a", priority=-3, timeout_s=2.5)
    messages = [{"role": "user", "content": "a"}]
    await server.post("/v1/messages", messages=messages, max_tokens=2, priority=-3, timeout_s=2.5)
    own = [(each.priority, each.timeout_s) for _, each in server.scheduler.asked]
    assert own == [(-3, 2.5), (7, None), (-3, 2.5), (-3, 2.5)]
    assert error_of(await server.chat(timeout_s=0), 400)["param"] == "timeout_s"
    assert error_of(await server.post("/v1/responses", input="a", timeout_s=0), 400)["param"] == "timeout_s"
    assert error_of(await server.chat(priority=2**40), 400)["param"] == "priority"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (RequestFailed("attempt 1: p0 was lost"), 500),
        (LogitsNotFinite("NaN"), 500),
        (ZeroDivisionError(), 500),
        (RequestTimeout("not finished within request_timeout_s=1"), 504),
        (Unavailable("no instances for 30 s"), 503),
    ],
)
async def test_an_error_before_the_first_token_has_a_status_of_its_own_streamed_or_not(server, failure, status, stream):
    """A status of 200 must not be followed by such an error (known elsewhere: smg #2382)."""
    server.scheduler.steps = [failure]
    response = await server.chat(stream=stream)
    error = error_of(response, status)
    assert ("retry-after" in response.headers) == (status == 503)
    assert error["type"] == {500: "server_error", 503: "overloaded_error", 504: "timeout_error"}[status]
    if not isinstance(failure, ZeroDivisionError):
        assert error["message"] == str(failure)
    assert not server.scheduler.running


async def test_an_error_after_the_first_token_is_an_event_of_the_stream(server):
    server.scheduler.steps.append(RequestFailed("d0 was lost"))
    *chunks, last = chunks_of(await server.chat(stream=True))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last["error"]["message"] == "d0 was lost"
    assert error_of(await server.chat(), 500)["message"] == "d0 was lost"


@pytest.mark.parametrize(
    ("failure", "message", "is_logged"),
    [
        (RequestFailed("d0 was lost"), "d0 was lost", False),
        (ZeroDivisionError("of ours"), "internal error; the server's log has it", True),
    ],
)
async def test_of_what_ends_a_stream_only_faults_of_ours_are_to_be_reported(
    server, failure, message, is_logged, caplog
):
    server.scheduler.steps.append(failure)
    assert chunks_of(await server.chat(stream=True))[-1]["error"]["message"] == message
    assert ("an answer failed; please report it" in caplog.text) == is_logged
    assert ("of ours" in caplog.text) == is_logged


async def test_a_stream_without_a_token_for_long_begins_with_its_role(tokenizer):
    server = FakeServer(tokenizer, first_byte_timeout_s=0.05)
    go_on = asyncio.Event()
    server.scheduler.steps = [go_on, [104]]
    started: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        started.append(message)
        if len(started) == 2:  # the status line and the role are out
            go_on.set()

    await call(server, {"messages": [{"role": "user", "content": "a"}], "stream": True}, send, asyncio.Event())
    assert started[0]["status"] == 200
    assert b'"role":"assistant"' in started[1]["body"]
    assert b"[DONE]" in started[-1]["body"]


async def call(server: FakeServer, body: dict[str, Any], send: Any, gone: asyncio.Event) -> None:
    """Pass one request to the application as an ASGI server does. The client disconnects when `gone` is set."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "headers": [], "query_string": b"", "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 80), "scheme": "http",
        "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    await server.app(scope, receive, send)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
async def test_a_client_that_goes_away_ends_its_request_at_once(server, stream, num_tokens):
    server.scheduler.steps = [*([104],) * num_tokens, asyncio.Event()]
    gone, sent = asyncio.Event(), []

    async def send(message: Any) -> None:
        sent.append(message)

    body = {"messages": [{"role": "user", "content": "a"}], "stream": stream, "n": 2}
    calling = asyncio.create_task(call(server, body, send, gone))
    while len(server.scheduler.running) < 1 or (stream and num_tokens and not sent):
        await asyncio.sleep(0.001)
    gone.set()
    await calling
    assert (server.scheduler.running, server.scheduler.num_abandoned) == ({}, 1)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others


async def test_requests_while_the_server_ends_are_503(server):
    server.service.draining = True
    assert error_of(await server.chat(), 503)["message"] == "the server is ending"
    assert (await server.client.get("/health")).status_code == 503


# ---- keys, headers, the log --------------------------------------------------------------------------------------


async def test_a_key_is_asked_for_where_something_is_computed_and_read_again_when_its_file_changes(
    tokenizer, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setenv("HBSERVE_API_KEY", "from the environment")
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst\n")
    server = FakeServer(tokenizer, api_key="given", api_key_file=str(keys))
    server.answers("a")

    async def status(key: str | None, path: str = "/v1/models") -> int:
        headers = {} if key is None else {b"Authorization": f"Bearer {key}".encode()}
        return (await server.client.get(path, headers=headers)).status_code

    assert [await status(key) for key in ("given", "from the environment", "first")] == [200] * 3
    assert [await status(key) for key in (None, "", "# ours", "second", "gïven")] == [401] * 5
    for path in ("/health", "/ping", "/metrics", "/version", "/"):
        assert await status(None, path) == 200, path
    assert await status(None, "/tokenizer_info") == 401
    other = tmp_path / "other"
    other.write_text("second\n")
    other.replace(keys)
    assert [await status("first"), await status("second")] == [401, 200]
    assert f"{keys} has changed; it has 1 keys now" in caplog.text
    written_at = keys.stat().st_mtime_ns
    keys.write_text("second\nthird\n")
    os.utime(keys, ns=(written_at, written_at))  # as of a write within the same tick of the system's clock
    assert [await status(key) for key in ("second", "third")] == [200, 200]
    keys.unlink()
    assert [await status("second") for _ in range(3)] == [200] * 3
    assert caplog.text.count("keeping the previous API keys") == 1
    keys.write_text("fourth\n")
    assert [await status(key) for key in ("second", "fourth")] == [401, 200]
    error = error_of(await server.complete(), 401)
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert error["message"].startswith("no API key: expected the header")


async def test_a_variable_for_a_key_that_is_empty_is_told(tokenizer, monkeypatch, caplog):
    monkeypatch.setenv("HBSERVE_API_KEY", "")
    assert (await FakeServer(tokenizer).client.get("/v1/models")).status_code == 200
    assert "HBSERVE_API_KEY is set, and empty: it asks for no key" in caplog.text


async def test_no_origin_may_ask_unless_it_was_named(tokenizer):
    for origins, expected in ([], None), (["http://a"], "http://a"):
        server = FakeServer(tokenizer, cors_origins=origins)
        response = await server.client.get("/v1/models", headers={"Origin": "http://a"})
        assert response.headers.get("access-control-allow-origin") == expected


async def test_a_request_has_the_id_that_its_client_gave_it_or_a_new_one(server):
    for given in ("a-1", "half\x7f", "ü" * 3, "x" * 200, None):
        headers = {} if given is None else {"X-Request-Id": given.encode()}
        response = await server.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        request_id = response.headers["x-request-id"]
        assert (request_id == given) == (given == "a-1")
        assert response.json()["id"] == f"cmpl-{request_id}"


def test_ignored_names_are_sanitised_and_bounded_in_their_header():
    names = ["a\r\nSet-Cookie: b", "ü", "x" * 500, *(f"f{i}" for i in range(500))]
    (value,) = ignored_header(names).values()
    assert value.isprintable()
    assert len(value) < 1200
    assert value.endswith("+487")


async def test_the_log_has_a_line_for_a_request_but_neither_its_prompt_nor_its_answer(server, caplog):
    caplog.set_level("DEBUG")
    await server.client.post("/v1/completions?q=secret", json={"prompt": "my secret", "secret": "secret"})
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("request_log")]
    assert "POST /v1/completions 200" in line
    assert "onetwo" not in caplog.text
    assert "my secret" not in caplog.text
    assert "q=secret" not in line
