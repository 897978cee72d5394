"""Answers with reasoning and tool calls, as the official clients read them. The model writes what it is told."""

from typing import Any

import pytest
from hbserve_fake_scheduler import THOUGHT_TEXT_AND_CALL, TOOL_TEMPLATE, FakeServer

from hbserve.text.tokenizer import load_tokenizer

openai = pytest.importorskip("openai", reason="needs the dependency group clients")
anthropic = pytest.importorskip("anthropic", reason="needs the dependency group clients")
import httpx2  # noqa: E402
from anthropic.types import Message  # noqa: E402
from openai.types.responses import Response  # noqa: E402

NAME = "small"


@pytest.fixture
def server(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=TOOL_TEMPLATE)
    server.answers(*THOUGHT_TEXT_AND_CALL)
    return server


def client_of(server: FakeServer, kind: Any, base_url: str) -> Any:
    transport = httpx2.ASGITransport(server.app)
    return kind(base_url=base_url, api_key="none", max_retries=0, http_client=httpx2.AsyncClient(transport=transport))


async def test_openai_reads_responses_and_sends_them_back_as_input(server):
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": False}
    settings: Any = {"model": NAME, "tools": [tool], "instructions": "be brief", "store": False}
    async with client_of(server, openai.AsyncOpenAI, "http://test/v1") as client:
        answer = await client.responses.create(input="hi", **settings)
        Response.model_validate(answer.model_dump(by_alias=True), strict=True)
        types = []
        async with client.responses.stream(input="hi", **settings) as stream:
            async for event in stream:
                types.append(event.type)
            streamed = await stream.get_final_response()
        assert types[0] == "response.created"
        assert types[-1] == "response.completed"
        for each in (answer, streamed):
            reasoning, message, call = each.output
            assert reasoning.content[0].text == "hm, f"
            assert (message.content[0].text, each.output_text) == ("So be it.", "So be it.")
            assert (call.name, call.arguments) == ("f", '{"a": 1}')
        result = {"type": "function_call_output", "call_id": answer.output[2].call_id, "output": "3"}
        history = [{"role": "user", "content": "hi"}, *answer.output, result]
        await client.responses.create(input=history, **settings)
    assert server.prompt == "f<system>[be brief]<user>[hi]<assistant>hm, f[So be it.]f(1)<tool>[3]"


async def test_openai_reads_the_log_probabilities_of_a_responses_text(server):
    settings: Any = {"model": NAME, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    async with client_of(server, openai.AsyncOpenAI, "http://test/v1") as client:
        answer = await client.responses.create(input="hi", **settings)
        Response.model_validate(answer.model_dump(by_alias=True), strict=True)
        told = []
        async with client.responses.stream(input="hi", **settings) as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    told += event.logprobs
    found = answer.output[1].content[0].logprobs
    assert [each.token for each in told] == [each.token for each in found]
    assert [each.top_logprobs[0].logprob for each in told] == [-1.0] * len(found)
    assert "".join(each.token for each in found).startswith("So be it.")


async def test_anthropic_reads_messages_and_sends_them_back(server):
    tool = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
    settings: Any = {"model": NAME, "tools": [tool], "system": "be brief", "max_tokens": 200}
    question = {"role": "user", "content": "hi"}
    async with client_of(server, anthropic.AsyncAnthropic, "http://test") as client:
        answer = await client.messages.create(messages=[question], **settings)
        Message.model_validate(answer.model_dump(), strict=True)
        types = []
        async with client.messages.stream(messages=[question], **settings) as stream:
            async for event in stream:
                types.append(event.type)
            streamed = await stream.get_final_message()
        assert (types[0], types[-1]) == ("message_start", "message_stop")
        for each in (answer, streamed):
            thinking, text, call = each.content
            assert (thinking.thinking, text.text, call.name, call.input) == ("hm, f", "So be it.", "f", {"a": 1})
            assert (each.stop_reason, each.usage.cache_read_input_tokens) == ("tool_use", 7)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
        history = [question, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        await client.messages.create(messages=history, **settings)
        assert server.prompt == "f<system>[be brief]<user>[hi]<assistant>hm, f[So be it.]f(1)<tool>[3]"
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(messages=[question], **settings, container="c")
    assert refused.value.body["error"]["type"] == "invalid_request_error"
