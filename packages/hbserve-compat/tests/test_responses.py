"""/v1/responses: OpenAI's Responses API before a scheduler that answers as it is told."""

import asyncio
from typing import Any

import pytest
from hbserve_fake_scheduler import THOUGHT_TEXT_AND_CALL, named_events_of, server_that_thinks

from hbserve.server.endpoints.responses_fields import NOT_SERVED

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}


@pytest.fixture
def server(small_model):
    return server_that_thinks(small_model)


async def ask(server, **body):
    return await server.post("/v1/responses", **{"input": "hi"} | body)


async def test_a_response_has_reasoning_text_and_calls_as_items(server):
    answer = (await ask(server, tools=[TOOL], instructions="be brief", max_output_tokens=200)).json()
    assert server.prompt == "f<system>[be brief]<user>[hi]"
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "small")
    assert answer["completed_at"] >= answer["created_at"]
    reasoning, message, call = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm, f"}]
    assert message["content"] == [{"type": "output_text", "text": "So be it.", "annotations": [], "logprobs": []}]
    assert (call["name"], call["arguments"], call["call_id"][:5]) == ("f", '{"a": 1}', "call_")
    assert {item["status"] for item in answer["output"]} == {"completed"}
    assert (answer["tools"], answer["instructions"], answer["store"]) == ([TOOL], "be brief", False)
    num_prompt, num_output = len(server.scheduler.asked[0][0]), sum(len(step) for step in server.scheduler.steps)
    num_reasoning = answer["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert len("<think>hm, f") < num_reasoning < num_output
    assert answer["usage"] == {
        "input_tokens": num_prompt, "input_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 0},
        "output_tokens": num_output, "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": num_prompt + num_output,
    }  # fmt: skip


async def test_a_response_says_again_what_was_asked_or_what_holds_where_nothing_was(server):
    asked = {
        "parallel_tool_calls": False, "temperature": 0.5, "top_p": 0.25, "max_output_tokens": 7, "instructions": "be",
        "text": {"format": {"type": "json_object"}}, "tool_choice": "none", "tools": [TOOL], "top_logprobs": 0,
    }  # fmt: skip
    answer = (await ask(server, **asked, reasoning={"effort": "low"})).json()
    assert {key: answer[key] for key in asked} == asked
    assert answer["reasoning"] == {"effort": "low", "summary": None}
    answer = (await ask(server)).json()
    assert {key: answer[key] for key in [*asked, "reasoning"]} == {
        "parallel_tool_calls": True, "temperature": 1.0, "top_p": 1.0, "max_output_tokens": None, "instructions": None,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0,
        "reasoning": {"effort": None, "summary": None},
    }  # fmt: skip


async def test_events_come_in_their_order_and_make_the_same_response(server):
    events = named_events_of(await ask(server, tools=[TOOL], stream=True))
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    names = [each["type"].removeprefix("response.") for each in events]
    assert (names[:2], names[-1]) == (["created", "in_progress"], "completed")
    reasoning, text, call = (
        list(dict.fromkeys(name for name, each in zip(names, events, strict=True) if each.get("output_index") == index))
        for index in range(3)
    )
    assert reasoning == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
    ]  # fmt: skip
    assert list(dict.fromkeys(text)) == [
        each.replace("reasoning_text", "output_text") for each in dict.fromkeys(reasoning)
    ]
    assert call == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    places = [each["output_index"] for each in events if "output_index" in each]
    assert places == sorted(places)
    whole = events[-1]["response"]
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert [each["item"] for each in events if each["type"] == "response.output_item.done"] == whole["output"]
    for item, field in zip(whole["output"], ("reasoning_text", "output_text", "function_call_arguments"), strict=True):
        grown = "".join(each["delta"] for each in events if each["type"] == f"response.{field}.delta")
        assert grown == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    ids = [item["id"] for item in whole["output"]]
    assert ids == [f"{kind}_{whole['id'].removeprefix('resp_')}_{i}" for i, kind in enumerate(("rs", "msg", "fc"))]
    assert all(each["item_id"] == ids[each["output_index"]] for each in events if "item_id" in each)
    assert {each["item_id"] for each in events if "delta" in each} == set(ids)
    assert {each["content_index"] for each in events if "content_index" in each} == {0}
    assert [each["item"]["id"] for each in events if each["type"] == "response.output_item.added"] == ids
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["status"] == "in_progress"


async def test_an_answer_that_is_cut_is_incomplete(server):
    whole = (await ask(server, max_output_tokens=45)).json()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]
    assert named_events_of(await ask(server, max_output_tokens=45, stream=True))[-1]["type"] == "response.incomplete"


LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


async def test_log_probabilities_are_those_of_the_tokens_of_the_text(server):
    whole = (await ask(server, tools=[TOOL], **LOGPROBS)).json()
    assert whole["top_logprobs"] == 2
    (part,) = whole["output"][1]["content"]
    assert "".join(each["token"] for each in part["logprobs"]) == "So be it."
    first = part["logprobs"][0]
    assert [each["logprob"] for each in first["top_logprobs"]] == [-1.0, -2.0]
    assert (bytes(first["bytes"]).decode(), first["logprob"]) == (first["token"], -9999.0)

    events = named_events_of(await ask(server, tools=[TOOL], stream=True, **LOGPROBS))
    told = [each["logprobs"] for each in events if each["type"] == "response.output_text.delta"]
    assert len(told) > 1
    assert [entry for each in told for entry in each] == part["logprobs"]
    (done,) = (each for each in events if each["type"] == "response.output_text.done")
    assert done["logprobs"] == part["logprobs"]
    parts = {each["type"]: each["part"] for each in events if each.get("part", {}).get("type") == "output_text"}
    assert parts["response.content_part.added"]["logprobs"] == []
    assert parts["response.content_part.done"] == part
    assert events[-1]["response"]["output"][1]["content"] == [part]


def told_of_text(events: list[Any], index: int) -> list[str]:
    """Tokens whose log-probabilities the events of one text have had."""
    ours = [each for each in events if each["type"] == "response.output_text.delta" and each["output_index"] == index]
    return [entry["token"] for each in ours for entry in each["logprobs"]]


async def test_log_probabilities_of_a_second_text_are_its_own(server):
    server.answers("So", " be it.", '\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "\nAnd", " on.")
    events = named_events_of(await ask(server, tools=[TOOL], stream=True, **LOGPROBS))
    first, call, second = events[-1]["response"]["output"]
    assert call["type"] == "function_call"
    for index, item, text in ((0, first, "So be it."), (2, second, "\nAnd on.")):
        assert "".join(told_of_text(events, index)) == item["content"][0]["text"] == text
    assert all(each["delta"] for each in events if each["type"] == "response.output_text.delta")


async def test_log_probabilities_of_the_token_that_ends_an_answer_are_its_text_s_if_it_has_one(server):
    end = [server.tokenizer.eos_token_id]
    server.answers(*THOUGHT_TEXT_AND_CALL[:5])
    server.scheduler.steps.append(end)
    whole = (await ask(server, **LOGPROBS)).json()
    assert [each["token"] for each in whole["output"][1]["content"][0]["logprobs"]] == [*"So be it.", "</s>"]
    events = named_events_of(await ask(server, stream=True, **LOGPROBS))
    assert told_of_text(events, 1) == [*"So be it.", "</s>"]
    server.scheduler.steps = [end]
    assert (await ask(server, **LOGPROBS)).json()["output"] == []
    events = named_events_of(await ask(server, stream=True, **LOGPROBS))
    assert [each["type"].removeprefix("response.") for each in events] == ["created", "in_progress", "completed"]


async def test_each_of_several_calls_is_an_item_and_the_token_behind_them_adds_nothing(server):
    server.answers(*(f'<tool_call>{{"name": "f", "arguments": {{"a": {each}}}}}</tool_call>' for each in (1, 2)))
    server.scheduler.steps.append([server.tokenizer.eos_token_id])
    events = named_events_of(await ask(server, tools=[TOOL], stream=True, **LOGPROBS))
    for answer in ((await ask(server, tools=[TOOL], **LOGPROBS)).json(), events[-1]["response"]):
        assert [each["arguments"] for each in answer["output"]] == ['{"a": 1}', '{"a": 2}']
    assert all(each["delta"] for each in events if "delta" in each)


async def test_either_field_asks_for_log_probabilities_and_each_says_what_is_wrong_with_it(server):
    ways: list[tuple[dict[str, Any], int]] = [({"include": LOGPROBS["include"]}, 0), ({"top_logprobs": 3}, 3)]
    for fields, num_top in ways:
        (part,) = (await ask(server, **fields)).json()["output"][1]["content"]
        assert {len(each["top_logprobs"]) for each in part["logprobs"]} == {num_top}
    for wrong in (-1, 21):
        response = await ask(server, include=LOGPROBS["include"], top_logprobs=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "top_logprobs")


async def test_a_conversation_is_items_of_which_several_are_one_message(server):
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": each} for each in ("be ", "brief")]},
        {"type": "message", "role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_0", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "m"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "wait"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "4"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}], "summary": []},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "no JSON"},
        {"role": "assistant", "content": "good"},
        {"role": "assistant", "content": "luck"},
        {"role": "user", "content": "bye"},
        {"type": "function_call", "call_id": "c4", "name": "g", "arguments": '{"a": 5}'},
        {"type": "function_call_output", "call_id": "c4", "output": ""},
    ]  # fmt: skip
    response = await ask(
        server, input=items, reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"]
    )
    assert response.status_code == 200, response.text
    assert server.prompt == (
        "low<system>[be brief]<user>[hi]<assistant>hm[wait]f(1)g(2)<tool>[3]<tool>[4]<assistant>so[]f()"
        "<assistant>[good]<assistant>[luck]<user>[bye]<assistant>[]g(5)<tool>[]True"
    )


async def test_parameters_arrive_and_fields_without_effect_are_named(server):
    response = await ask(server, temperature=0.5, top_p=0.25, max_output_tokens=9, metadata={"a": "b"}, odd=1)
    params = server.scheduler.asked[0][1]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.25, 9)
    assert response.headers["x-hbserve-ignored"] == "metadata,odd"
    assert (await ask(server, tools=[TOOL], tool_choice="none")).json()["output"][-1]["type"] == "message"
    await ask(server, tools=[TOOL], tool_choice={"type": "function", "name": "f"})
    assert server.prompt.endswith('<tool_call>\n{"name": "f", "arguments": ')


async def test_the_tokens_of_an_input_are_counted_as_its_answer_counts_them(server):
    body = {"input": "hi", "instructions": "be brief", "tools": [TOOL]}
    counted = await server.post("/v1/responses/input_tokens", **body, odd=1)
    usage = (await server.post("/v1/responses", **body)).json()["usage"]
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}
    assert counted.headers["x-hbserve-ignored"] == "odd"
    for wrong, param in (({"conversation": "x"}, "conversation"), ({"messages": []}, "messages")):
        refused = await server.post(
            "/v1/responses/input_tokens", input="hi" if "messages" not in wrong else None, **wrong
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_extensions_are_those_of_a_chat(server):
    sampling = {
        "top_k": 3, "min_p": 0.25, "seed": 4, "stop": ["x"], "include_stop_str_in_output": True, "ignore_eos": True,
        "presence_penalty": 0.5, "frequency_penalty": 0.75, "repetition_penalty": 1.25,
    }  # fmt: skip
    response = await ask(server, **sampling, logit_bias={"5": 1}, chat_template_kwargs={"enable_thinking": "maybe"})
    assert response.status_code == 200, response.text
    assert "x-hbserve-ignored" not in response.headers
    params = server.scheduler.asked[0][1]
    assert {name: getattr(params, name) for name in sampling} == sampling
    assert params.logit_bias == {5: 1.0}
    assert server.prompt.endswith("maybe")
    await ask(server, structured_outputs={"regex": "a+"})
    assert server.scheduler.asked[-1][1].structured_outputs.regex == "a+"
    both = await ask(server, structured_outputs={"regex": "a+"}, text={"format": {"type": "json_object"}})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "text.format")
    server.answers("a</s>b")
    for skip, text in ((True, "ab"), (False, "a</s>b")):
        answer = (await ask(server, skip_special_tokens=skip)).json()
        assert answer["output"][-1]["content"][0]["text"] == text


NEUTRAL = {name: [None, *values] for name, values in NOT_SERVED.items()}
WRONG = {"store": True, "background": True, "truncation": "auto", "max_tool_calls": 1, "enable_response_messages": True}


@pytest.mark.parametrize("name", NOT_SERVED)
async def test_a_field_that_is_not_served_may_have_its_neutral_values_only(server, name):
    for value in NEUTRAL[name]:
        assert (await ask(server, **{name: value})).status_code == 200
    response = await ask(server, **{name: WRONG.get(name, "x")})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "boss", "content": ""}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "contnet": "a"}]}, "input[0].content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": {"format": {"type": "odd"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "json_schema": {}}}}, "text.format"),
        ({"temperature": -1}, "temperature"),
    ],
)
async def test_what_is_wrong_is_named_as_its_client_knows_it(server, body, param):
    for stream in (False, True):
        response = await ask(server, stream=stream, **body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert error["message"].startswith(param.removesuffix(".content"))
        assert '"json_schema": {' not in error["message"], "a schema is one object less deep than in a chat"
    assert not server.scheduler.asked


async def test_an_answer_that_fails_on_its_way_ends_with_an_event_that_says_so(server):
    server.scheduler.steps[2:] = [RuntimeError("odd")]
    last = named_events_of(await ask(server, stream=True))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"][-1]["status"] == "incomplete"


async def test_a_client_that_goes_ends_its_request(server):
    server.scheduler.steps.append(asyncio.Event())
    asking = asyncio.create_task(ask(server, stream=True))
    async with asyncio.timeout(20):
        while not server.scheduler.running:
            await asyncio.sleep(0.001)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(20):
        while server.scheduler.running:
            await asyncio.sleep(0.001)
