"""/v1/messages: Anthropic's Messages API before a scheduler that answers as it is told."""

import json

import pytest
from hbserve_fake_scheduler import THOUGHT_TEXT_AND_CALL, TOOL_TEMPLATE, FakeServer, named_events_of, server_that_thinks

from hbserve.server.endpoints.anthropic_fields import NOT_SERVED
from hbserve.text.tokenizer import load_tokenizer

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
CALL = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(small_model):
    return server_that_thinks(small_model)


async def ask(server, **body):
    return await server.post("/v1/messages", **{"messages": QUESTION, "max_tokens": 200} | body)


async def test_a_message_has_thinking_text_and_tool_use_as_blocks(server):
    answer = (
        await ask(server, tools=[TOOL], system="be brief", thinking={"type": "enabled", "budget_tokens": 9})
    ).json()
    assert server.prompt == "f<system>[be brief]<user>[hi]True"
    thinking, text, call = answer.pop("content")
    assert thinking == {"type": "thinking", "thinking": "hm, f", "signature": ""}
    assert (text["type"], text["text"]) == ("text", "So be it.")
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "f", {"a": 1})
    assert answer.pop("id").startswith("msg_")
    num_prompt, num_output = len(server.scheduler.asked[0][0]), sum(len(step) for step in server.scheduler.steps)
    assert answer == {
        "type": "message", "role": "assistant", "model": "small", "stop_reason": "tool_use", "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt - 7, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 0,
            "output_tokens": num_output,
            "output_tokens_details": {"thinking_tokens": len("<think>\nhm, f</think>\n\nSo")},
        },
    }  # fmt: skip


async def test_events_come_in_their_order_and_make_the_same_message(server):
    whole = (await ask(server, tools=[TOOL])).json()
    events = named_events_of(await ask(server, tools=[TOOL], stream=True))
    assert [each["type"] for each in (events[0], *events[-2:])] == ["message_start", "message_delta", "message_stop"]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["output_tokens"] == 0
    for index, (block, field) in enumerate(zip(whole["content"], ("thinking", "text", "partial_json"), strict=True)):
        mine = [each for each in events if each.get("index") == index]
        assert [each["type"] for each in (mine[0], mine[-1])] == ["content_block_start", "content_block_stop"]
        grown = "".join(each["delta"][field] for each in mine[1:-1])
        assert (json.loads(grown) == block["input"]) if field == "partial_json" else (grown == block[field])
        assert len(mine) > 3, "it came in pieces"
    places = [each["index"] for each in events if "index" in each]
    assert places == sorted(places)
    assert events[-2]["usage"] == whole["usage"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize(
    ("body", "reason", "sequence"),
    [
        ({"max_tokens": 26}, "max_tokens", None),
        ({"stop_sequences": ["x", " be"]}, "stop_sequence", " be"),
        ({}, "end_turn", None),
    ],
)
async def test_an_answer_says_why_it_stopped(server, body, reason, sequence):
    server.answers(*THOUGHT_TEXT_AND_CALL[:5])
    whole = (await ask(server, **body)).json()
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    delta = named_events_of(await ask(server, stream=True, **body))[-2]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": sequence}


async def test_a_conversation_has_thinking_tool_use_and_results(server):
    messages = [
        {"role": "user", "content": [
            {"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}
        ]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "h", "signature": ""}, {"type": "thinking", "thinking": "m"},
            {"type": "text", "text": "wait"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "g", "input": {"a": 2}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "3"},
            {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "4"}], "is_error": True},
            {"type": "text", "text": "so?"},
        ]},
    ]  # fmt: skip
    body = {"messages": messages, "system": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]}
    body |= {"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}
    assert (await ask(server, **body)).status_code == 200
    assert server.prompt == (
        "low<system>[be brief]<user>[ab]<assistant>hm[wait]f(1)g(2)<tool>[3]<tool>[4]<user>[so?]False"
    )
    counted = (await server.post("/v1/messages/count_tokens", **body)).json()
    assert counted == {"input_tokens": len(server.scheduler.asked[0][0])}
    hidden = (await ask(server, thinking={"type": "adaptive", "display": "omitted"})).json()
    assert [block["type"] for block in hidden["content"]] == ["text"]


async def test_an_answer_goes_on_with_its_beginning(server):
    beginning = {"role": "assistant", "content": "The answer"}
    server.answers(" is", " five")
    answer = (await ask(server, messages=[*QUESTION, beginning])).json()
    assert answer["content"][0]["text"] == " is five"
    assert server.prompt.endswith("<assistant>[The answer")
    counted = (await server.post("/v1/messages/count_tokens", messages=[*QUESTION, beginning])).json()
    assert counted == {"input_tokens": len(server.scheduler.asked[0][0])}


async def test_parameters_arrive_and_fields_without_effect_are_named(server):
    response = await ask(server, temperature=0.5, top_p=0.25, top_k=3, stop_sequences=["x"], metadata={}, odd=1)
    params = server.scheduler.asked[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.stop, params.max_tokens) == (
        0.5,
        0.25,
        3,
        ["x"],
        200,
    )
    assert response.headers["x-hbserve-ignored"] == "metadata,odd"
    for kind in ("any", "tool"):
        await ask(server, tools=[TOOL], tool_choice={"type": kind, "name": "f"})
        assert ('<tool_call>\n{"name": "' + "f" * (kind == "tool")) in server.prompt
    server.answers('<tool_call>{"name": "f", "arguments": "odd"}</tool_call>' * 2)
    answer = (await ask(server, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})).json()
    (call,) = answer["content"]
    assert call["input"] == {"arguments": "odd"}, "what is no JSON object is not lost"
    server.answers(*(f'<tool_call>{{"name": "f", "arguments": {each}}}</tool_call>' for each in ("[1]", '{"a": 2}')))
    answer = (await ask(server, tools=[TOOL])).json()
    assert [each["input"] for each in answer["content"]] == [{"arguments": "[1]"}, {"a": 2}]
    assert (await ask(server, tools=[TOOL], tool_choice={"type": "none"})).json()["content"][0]["type"] == "text"


async def test_the_template_is_told_what_a_request_says_and_thinking_goes_before_it(server):
    for more, said in (
        ({"chat_template_kwargs": {"enable_thinking": "maybe"}}, "maybe"),
        ({"chat_template_kwargs": {"enable_thinking": "maybe"}, "thinking": {"type": "disabled"}}, "False"),
        ({"output_config": {"effort": "high"}}, "True"),
        ({"thinking": {"type": "adaptive"}}, "[hi]"),
        ({"output_config": {"effort": "high"}, "thinking": {"type": "disabled"}}, "False"),
    ):
        assert (await ask(server, **more)).status_code == 200
        assert server.prompt.endswith(said)


def error_of(response, status):
    assert response.status_code == status, response.text
    answer = response.json()
    assert (answer["type"], answer["request_id"]) == ("error", response.headers["x-request-id"])
    assert set(answer["error"]) == {"type", "message"}
    return answer["error"]


@pytest.mark.parametrize("name", NOT_SERVED)
async def test_a_field_that_is_not_served_may_have_its_neutral_values_only(server, name):
    for value in (None, *NOT_SERVED[name]):
        assert (await ask(server, **{name: value})).status_code == 200
    assert error_of(await ask(server, **{name: "x"}), 400)["message"].startswith(f"{name}='x': is not served")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages: 0 of them"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role='tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type='image'"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]=5"),
        ({"messages": [{"role": "user", "contnet": "a"}]}, "messages[0]: has no content, but 'contnet, role'"),
        ({"messages": [{"role": "user", "content": []}, *QUESTION]}, "messages[0]: has no content"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [CALL]}]}, "messages[1].content"),
        ({"system": [{"type": "image"}]}, "system[0].type='image'"),
        (
            {"tools": [{"type": "bash_20250124", "name": "bash"}]},
            "tools[0].type='bash_20250124': is not served; expected none or custom",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice="),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences="),
        ({"output_config": {"format": {"type": "odd"}}}, "output_config.format="),
        (
            {"output_config": {"format": {"type": "json_schema"}}},
            'output_config.format={\'type\': \'json_schema\'}: expected {"type": "json_schema", "schema": {...}}',
        ),
        ({"thinking": {"type": "odd"}}, "thinking.type"),
    ],
)
async def test_what_is_wrong_is_named_as_its_client_knows_it(server, body, message):
    for stream in (False, True):
        error = error_of(await ask(server, stream=stream, **body), 400)
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(message)
    assert not server.scheduler.asked


async def test_errors_have_the_shape_of_anthropic_s(server):
    assert error_of(await ask(server, model="odd"), 404)["type"] == "not_found_error"
    counted = await server.post("/v1/messages/count_tokens", messages=QUESTION, model="odd")
    assert error_of(counted, 404)["type"] == "not_found_error"
    assert error_of(await server.client.get("/v1/messages"), 405)["type"] == "invalid_request_error"
    assert error_of(await server.client.post("/v1/messages", content=b"{"), 400)["message"].startswith(
        "the body is not"
    )
    server.scheduler.most_running = 0
    busy = await ask(server)
    assert (error_of(busy, 503)["type"], "retry-after" in busy.headers) == ("overloaded_error", True)


async def test_a_failure_on_its_way_is_an_event(server):
    server.scheduler.steps[2:] = [RuntimeError("odd")]
    response = await ask(server, stream=True)
    last = named_events_of(response)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert last["request_id"] == response.headers["x-request-id"]


async def test_a_key_may_come_as_clients_of_anthropic_send_it(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=TOOL_TEMPLATE, api_key="k")
    server.answers("a")
    for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
        response = await server.client.post(
            "/v1/messages", json={"messages": QUESTION, "max_tokens": 9}, headers=headers
        )
        assert response.status_code == 200
    wrong = await server.client.post("/v1/messages", json={}, headers={"x-api-key": "j"})
    assert error_of(wrong, 401)["type"] == "authentication_error"
