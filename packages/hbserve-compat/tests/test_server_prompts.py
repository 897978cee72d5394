"""Fields for how a prompt is made, and how tokens are shown, as users of vLLM send them."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hbserve_fake_scheduler import TOOL_TEMPLATE, FakeServer, chunks_of
from transformers import PreTrainedTokenizerBase

from hbserve.server.service import RESERVED_TEMPLATE_KWARGS
from hbserve.text.tokenizer import load_tokenizer

BEGUN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(small_model: Callable[[str], Path]) -> Any:
    return load_tokenizer(small_model("qwen3"))


@pytest.fixture
def server(tokenizer: Any) -> FakeServer:
    server = FakeServer(tokenizer, chat_template=CHATML)
    server.answers("one", "two")
    return server


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("begins", [None, False])
async def test_an_answer_goes_on_with_the_last_message(server, begins):
    body = {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": begins}
    assert (await server.chat(**body)).json()["choices"][0]["message"]["content"] == "onetwo"
    assert server.prompt == "<user>hi</user><assistant>The answer"
    counted = (await server.post("/tokenize", **body)).json()
    assert tuple(counted["tokens"]) == server.scheduler.asked[0][0]
    await server.chat(messages=BEGUN, continue_final_message=False)
    assert server.prompt == "<user>hi</user><assistant>The answer</assistant><assistant>"


async def test_an_answer_does_not_both_begin_and_go_on(server):
    body = {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True}
    for response in (await server.chat(**body), await server.post("/tokenize", **body)):
        assert error_of(response)["param"] == "add_generation_prompt"
    called = [BEGUN[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    error = error_of(await server.chat(messages=called, continue_final_message=True))
    assert error["param"] == "continue_final_message"


async def test_a_call_that_has_to_be_made_is_not_put_behind_a_text(tokenizer):
    server = FakeServer(tokenizer, chat_template=TOOL_TEMPLATE)
    body = {"messages": BEGUN, "continue_final_message": True, "tools": [TOOL]}
    assert error_of(await server.chat(**body, tool_choice="required"))["param"] == "tool_choice"
    server.answers("a")
    assert (await server.chat(**body)).status_code == 200


async def test_documents_are_given_to_a_template_that_knows_them_and_are_not_lost_in_another(server, tokenizer):
    documents = [{"title": "a", "text": "b"}]
    error = error_of(await server.chat(documents=documents))
    assert (error["param"], "knows none" in error["message"]) == ("documents", True)
    assert (await server.chat(documents=[])).status_code == 200
    knows = FakeServer(tokenizer, chat_template="{% for d in documents %}{{ d.title }}={{ d.text }};{% endfor %}")
    knows.answers("one")
    assert (await knows.chat(documents=documents)).status_code == 200
    assert knows.prompt == "a=b;"


async def test_nothing_but_variables_of_the_template_is_set_by_its_arguments(server):
    ours = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) & RESERVED_TEMPLATE_KWARGS
    assert {"truncation", "max_length", "padding", "continue_final_message", "add_generation_prompt"} <= ours
    for name in ours:
        error = error_of(await server.chat(chat_template_kwargs={name: True}))
        assert error["param"] == f"chat_template_kwargs.{name}"


async def test_a_completion_s_prompt_has_special_tokens_unless_it_says_that_it_has_none(server, monkeypatch):
    seen = []
    encode = server.service.model.encoder.text

    def noted(text, *, add_special_tokens, **more):
        seen.append(add_special_tokens)
        return encode(text, add_special_tokens=add_special_tokens, **more)

    monkeypatch.setattr(server.service.model.encoder, "text", noted)
    for value in (None, True, False):
        assert (await server.complete(add_special_tokens=value)).status_code == 200
    for value in (None, True, False):
        assert (await server.post("/tokenize", prompt="hi", add_special_tokens=value)).status_code == 200
    assert seen == [True, True, False] * 2
    assert (await server.chat(add_special_tokens=False)).status_code == 200
    assert error_of(await server.chat(add_special_tokens=True))["param"] == "add_special_tokens"


async def test_tokens_of_logprobs_are_their_numbers_if_a_request_wants_that(server):
    plain = (await server.complete(logprobs=1)).json()["choices"][0]["logprobs"]
    shown = (await server.complete(logprobs=1, return_tokens_as_token_ids=True)).json()["choices"][0]["logprobs"]
    ids = server.tokenizer.encode("onetwo", add_special_tokens=False)
    assert shown["tokens"] == [f"token_id:{each}" for each in ids]
    assert all(f"token_id:{each}" in top for each, top in zip(ids, shown["top_logprobs"], strict=True))
    assert (shown["text_offset"], shown["token_logprobs"]) == (plain["text_offset"], plain["token_logprobs"])
    body = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    entries = (await server.chat(**body)).json()["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in entries] == [f"token_id:{each}" for each in ids]
    assert bytes(byte for each in entries for byte in each["bytes"]) == b"onetwo"
    assert {each["top_logprobs"][0]["token"] for each in entries} == {"token_id:3"}
    streamed = [chunk["choices"][0]["logprobs"] or {} for chunk in chunks_of(await server.chat(**body, stream=True))]
    assert [each for logprobs in streamed for each in logprobs.get("content", [])] == entries


@pytest.mark.parametrize("name", ["json", "regex", "choice", "grammar"])
async def test_older_names_of_structured_outputs_are_told_the_newer_one(server, name):
    for ask in (server.complete, server.chat):
        error = error_of(await ask(**{f"guided_{name}": "a"}))
        assert error["param"] == f"guided_{name}"
        assert error["message"].endswith(f"is called structured_outputs.{name} here")
