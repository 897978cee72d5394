"""Tool calls that their answer's end cuts, in every format and API, in one piece and streamed."""

import json
from typing import Any

import pytest
from hbserve_fake_scheduler import FakeServer, chunks_of, named_events_of

from hbserve.server.chat.tool_calls import FORMATS, format_of
from hbserve.text.tokenizer import load_tokenizer

COMPLETE = '{"line": 5, "path": "a"}'
JSON_CALL = f'{{"name": "edit", "arguments": {COMPLETE}}}'
XML_CALL = (
    "<function=edit>\n<parameter=line>\n5\n</parameter>\n<parameter=path>\na\n</parameter>\n</function>\n</tool_call>"
)
WRITTEN = {
    "hermes": ("<tool_call>", f"<tool_call>\n{JSON_CALL}\n</tool_call>"),
    "llama3_json": ('"parameters"', JSON_CALL.replace("arguments", "parameters")),
    "qwen3_coder": ("<tool_call><function=", "<tool_call>\n" + XML_CALL),
    "seed_oss": ("<seed:tool_call>", "<seed:tool_call>\n" + XML_CALL.replace("/tool", "/seed:tool")),
    "mistral": ("[TOOL_CALLS][ARGS]", f"[TOOL_CALLS]edit[ARGS]{COMPLETE}"),
    "mistral_json": ("[TOOL_CALLS]", f"[TOOL_CALLS][{JSON_CALL}]"),
    "granite": ("<|tool_call|>", f"<|tool_call|>[{JSON_CALL}]"),
    "phi4_mini": ("functools[", f"functools[{JSON_CALL}]"),
}
"""For each format: words of a template that has it, and a call."""
SCHEMA = {"type": "object", "properties": {"line": {"type": "integer"}, "path": {"type": "string"}}}
Told = tuple[str | None, str]
"""The arguments of a call, None if there is none; and why the answer ended, in the words of chat completions."""


async def chat(server: FakeServer, num_tokens: int) -> list[Told]:
    tools = [{"type": "function", "function": {"name": "edit", "parameters": SCHEMA}}]
    body: dict[str, Any] = {"tools": tools, "max_tokens": num_tokens}
    whole = (await server.chat(**body)).json()["choices"][0]
    calls = [each["function"]["arguments"] for each in whole["message"].get("tool_calls", [])]
    chunks = [chunk["choices"][0] for chunk in chunks_of(await server.chat(**body, stream=True))]
    pieces = [call["function"]["arguments"] for each in chunks for call in each["delta"].get("tool_calls", [])]
    content = "".join(each["delta"].get("content") or "" for each in chunks)
    assert (whole["message"]["content"] or "") == content
    assert all(each["finish_reason"] is None for each in chunks[:-1])
    streamed = "".join(pieces) if pieces else None
    return [(calls[0] if calls else None, whole["finish_reason"]), (streamed, chunks[-1]["finish_reason"])]


async def responses(server: FakeServer, num_tokens: int) -> list[Told]:
    tools = [{"type": "function", "name": "edit", "parameters": SCHEMA}]
    body: dict[str, Any] = {"input": "hi", "tools": tools, "max_output_tokens": num_tokens}
    whole = (await server.post("/v1/responses", **body)).json()
    events = named_events_of(await server.post("/v1/responses", **body, stream=True))
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    pieces = [each["delta"] for each in events if each["type"] == "response.function_call_arguments.delta"]
    told = []
    for response, items in ((whole, whole["output"]), (events[-1]["response"], done)):
        calls = [item for item in items if item["type"] == "function_call"]
        reason = "tool_calls" if calls and calls[0]["status"] == "completed" else "stop"
        is_cut = (response["incomplete_details"] or {}).get("reason") == "max_output_tokens"
        assert (response["status"] == "incomplete") == is_cut
        assert reason == "stop" or calls[0]["arguments"] == COMPLETE
        told.append((calls[0]["arguments"] if calls else None, "length" if is_cut else reason))
    assert "".join(pieces) == (told[0][0] or "")
    return told


async def messages(server: FakeServer, num_tokens: int) -> list[Told]:
    question = [{"role": "user", "content": "hi"}]
    tools = [{"name": "edit", "input_schema": SCHEMA}]
    body: dict[str, Any] = {"messages": question, "tools": tools, "max_tokens": num_tokens}
    whole = (await server.post("/v1/messages", **body)).json()
    events = named_events_of(await server.post("/v1/messages", **body, stream=True))
    begun = [each["content_block"]["type"] for each in events if each["type"] == "content_block_start"]
    pieces = [each["delta"].get("partial_json", "") for each in events if each["type"] == "content_block_delta"]
    streamed = "".join(pieces) if "tool_use" in begun else None
    inputs = [block["input"] for block in whole["content"] if block["type"] == "tool_use"]
    assert inputs == ([] if streamed is None else [as_input(streamed)])
    reasons = {"max_tokens": "length", "tool_use": "tool_calls", "end_turn": "stop"}
    return [(streamed, reasons[stopped]) for stopped in (whole["stop_reason"], events[-2]["delta"]["stop_reason"])]


def as_input(arguments: str) -> dict[str, Any]:
    """Return the object that /v1/messages makes of arguments that may be cut."""
    try:
        return dict(json.loads(arguments or "{}"))
    except ValueError:
        return {"arguments": arguments}


@pytest.mark.parametrize("ends_by", ["length", "stop"])
@pytest.mark.parametrize("name", FORMATS)
async def test_a_call_that_is_cut_has_its_beginning_and_no_reason_that_says_to_run_it(small_model, name, ends_by):
    words, text = WRITTEN[name]
    template = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}{# " + words + " #}"
    assert format_of(template) == name
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=template)
    end_tag = text.find("</function>") + len("</function>")
    complete = end_tag if "<function=" in text else text.index(COMPLETE) + len(COMPLETE)
    for place in sorted({*range(4, len(text), 4), complete - 1, complete, len(text)}):
        server.answers(*(text[:place] if ends_by == "stop" else text))
        num_tokens = 300 if ends_by == "stop" else place
        told = [each for ask in (chat, responses, messages) for each in await ask(server, num_tokens)]
        arguments, reason = told[0]
        assert told == [(arguments, reason)] * 6, text[:place]
        assert COMPLETE.startswith(arguments or "")
        assert (arguments == COMPLETE) == (place >= complete)
        assert reason == ("tool_calls" if ends_by == "stop" and place >= complete else ends_by)
