"""Reasoning and tool calls in an answer's text, in whatever pieces that comes."""

import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hbserve_fake_scheduler import FakeServer, chunks_of
from hypothesis import example, given
from hypothesis import strategies as st

from hbserve.server.chat import call_parts, tool_calls
from hbserve.server.chat.message_parts import MessageParts, PlainText, merged
from hbserve.server.chat.reasoning import SEED_THINK, ReasoningSplit
from hbserve.server.chat.tool_calls import (
    HermesCalls,
    ListCalls,
    LlamaCalls,
    MistralCalls,
    PhiCalls,
    SeedCalls,
    XmlCalls,
    format_of,
)
from hbserve.text.tokenizer import load_tokenizer

WEATHER = '{"name": "weather", "arguments": {"city": "Paris {\\"x\\"}", "days": [1, 2]}}'
ARGUMENTS = '{"city": "Paris {\\"x\\"}", "days": [1, 2]}'
TIME = '{"name": "time", "arguments": {}}'


def read(make: Callable[[], MessageParts], text: str, places: list[int] | None = None) -> tuple[Any, str | None]:
    """Read a text that is cut at these places. Returns the whole message, and how it ended."""
    parts, deltas = make(), []
    cuts = [0, *sorted(place % (len(text) + 1) for place in places or []), len(text)]
    for begin, end in pairwise(cuts):
        deltas += parts.feed(text[begin:end], final=False)
    deltas += parts.feed("", final=True)
    assert all(deltas), "a delta without anything"
    message = merged(deltas)
    calls = [(each["function"]["name"], each["function"]["arguments"]) for each in message.get("tool_calls", [])]
    fields = {name: value for name, value in message.items() if name != "tool_calls"}
    return (fields | {"calls": calls} if calls else fields), parts.reason("stop")


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


CODER_TOOLS = [
    {"type": "function", "function": {"name": "edit", "parameters": {"type": "object", "properties": {
        "path": {"type": "string"}, "line": {"type": "integer"}, "all": {"type": "boolean"},
        "to": {"type": ["string", "null"]}, "more": {"anyOf": [{"type": "array"}]}}}}},
    {"type": "function", "function": {"name": "time"}},
]  # fmt: skip


def coder(name: str, **parameters: str) -> str:
    """Write a call as Qwen3-Coder does."""
    given = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def coder_calls(**more: Any) -> MessageParts:
    return XmlCalls(tools=CODER_TOOLS, **more)


CASES: dict[str, tuple[Callable[[], MessageParts], str, dict[str, Any]]] = {
    "text": (HermesCalls, "Hello <tool world\n", {"content": "Hello <tool world\n"}),
    "a call": (HermesCalls, hermes(WEATHER), {"content": None, "calls": [("weather", ARGUMENTS)]}),
    "text and two calls": (
        HermesCalls,
        "Let me see.\n\n" + hermes(WEATHER, TIME),
        {"content": "Let me see.", "calls": [("weather", ARGUMENTS), ("time", "{}")]},
    ),
    "a call that is cut": (
        HermesCalls, '<tool_call>\n{"name": "f", "arguments": {"a": 1', {"content": None, "calls": [("f", '{"a": 1')]},
    ),
    "a call in another order": (
        HermesCalls, hermes('{"arguments": {"a": 1}, "name": "f"}'), {"content": None, "calls": [("f", '{"a":1}')]},
    ),
    "no call at all": (HermesCalls, hermes("nonsense"), {"content": "\nnonsense\n"}),
    "one call of several": (
        lambda: HermesCalls(most_calls=1), hermes(TIME, WEATHER), {"content": None, "calls": [("time", "{}")]},
    ),
    "Llama's call": (
        LlamaCalls, ' {"name": "f", "parameters": {"a": "}"}}', {"content": None, "calls": [("f", '{"a": "}"}')]},
    ),
    "Llama's calls": (
        LlamaCalls, f"{TIME}; {WEATHER}", {"content": None, "calls": [("time", "{}"), ("weather", ARGUMENTS)]},
    ),
    "Llama's text": (LlamaCalls, 'It is {"name": 5}.', {"content": 'It is {"name": 5}.'}),
    "Llama's JSON": (LlamaCalls, '{"answer": 5}', {"content": '{"answer": 5}'}),
    "Qwen3-Coder's calls": (
        coder_calls, "Now.\n" + coder("edit", path="a <b>\n", line="5", all="True") + "\n" + coder("time"),
        {"content": "Now.",
         "calls": [("edit", r'{"path": "a <b>\n", "line": 5, "all": true}'), ("time", "{}")]},
    ),
    "Qwen3-Coder's values, as their schemas say": (
        coder_calls, coder("edit", path="5", line="five", to="None", more='["x"]', odd="7", obj='{"a": 1}'),
        {"content": None, "calls": [("edit", '{"path": "5", "line": "five", "to": null, "more": ["x"], "odd": "7", '
                                             '"obj": {"a":1}}')]},
    ),
    "Qwen3-Coder's call that is cut": (
        coder_calls, coder("edit", line="5", path="abc")[:-50], {"content": None, "calls": [("edit", '{"line": 5')]},
    ),
    "Qwen3-Coder's one call of several": (
        lambda: coder_calls(most_calls=1), coder("time") + coder("edit"), {"content": None, "calls": [("time", "{}")]},
    ),
    "no call of Qwen3-Coder": (coder_calls, hermes("nonsense"), {"content": "\nnonsense\n"}),
    "Mistral's list, with ids": (
        MistralCalls, f'So. [TOOL_CALLS] [{TIME[:-1]}, "id": "a}}3456789"}}, {WEATHER}]',
        {"content": "So.", "calls": [("time", "{}"), ("weather", ARGUMENTS)]},
    ),
    "Mistral's names": (
        MistralCalls, f"So.[TOOL_CALLS]time[ARGS]{{}}[TOOL_CALLS]weather[CALL_ID]a3[ARGS]{ARGUMENTS}",
        {"content": "So.", "calls": [("time", "{}"), ("weather", ARGUMENTS)]},
    ),
    "Mistral's name without a mark": (
        MistralCalls, '[TOOL_CALLS]f{"a": "[TOOL_CALLS]"}',
        {"content": None, "calls": [("f", '{"a": "[TOOL_CALLS]"}')]},
    ),
    "no call of Mistral": (MistralCalls, "[TOOL_CALLS] nonsense", {"content": " nonsense"}),
    "Mistral's call behind a tag that begins none": (
        MistralCalls, "So [TOOL_CALLS] if it may be [TOOL_CALLS]time[ARGS]{}",
        {"content": "So  if it may be", "calls": [("time", "{}")]},
    ),
    "a tag of Mistral's behind a word": (
        MistralCalls, "[TOOL_CALLS]if[TOOL_CALLS]time[ARGS]{}", {"content": "if", "calls": [("time", "{}")]},
    ),
    "a list of Mistral's that has no calls": (
        MistralCalls, 'a [TOOL_CALLS] [{"b": 1}, 2] c\n', {"content": 'a  [{"b": 1}, 2] c\n'},
    ),
    "text between Mistral's calls": (
        MistralCalls, f"[TOOL_CALLS]time[ARGS]{{}} and [TOOL_CALLS][{TIME}] or",
        {"content": " and or", "calls": [("time", "{}")] * 2},
    ),
    "several calls between Hermes' tags": (
        HermesCalls, f"<tool_call>{TIME}\n{WEATHER}, {TIME}}}</tool_call>",
        {"content": None, "calls": [("time", "{}"), ("weather", ARGUMENTS), ("time", "{}")]},
    ),
    "tags of Hermes that have no call": (
        HermesCalls, 'a <tool_call>{"b": 1} c</tool_call> d', {"content": 'a {"b": 1} c d'},
    ),
    "several functions between Qwen3-Coder's tags": (
        coder_calls, coder("edit", line="5").replace("</tool_call>", "") + coder("time").replace("<tool_call>", ""),
        {"content": None, "calls": [("edit", '{"line": 5}'), ("time", "{}")]},
    ),
    "functions of Qwen3-Coder without their ends": (
        coder_calls,
        "<tool_call><function=edit><parameter=line>5</parameter><function=time>\n<function=edit>\n</tool_call>",
        {"content": None, "calls": [("edit", '{"line": 5}'), ("time", "{}"), ("edit", "{}")]},
    ),
    "a function and a parameter that their tags end": (
        coder_calls, "<tool_call><function=edit><parameter=line>\n5\n</function>\n</tool_call>",
        {"content": None, "calls": [("edit", '{"line": 5}')]},
    ),
    "a parameter that the next one ends, and one that the next function ends": (
        coder_calls,
        "<tool_call><function=edit><parameter=path>\na\n\n<parameter=line>5<parameter=all>\nTrue\n</function>\n"
        "<function=edit><parameter=to>b<function=time></tool_call>",
        {"content": None, "calls": [
            ("edit", '{"path": "a\\n", "line": 5, "all": true}'), ("edit", '{"to": "b"}'), ("time", "{}"),
        ]},
    ),
    "tags in a parameter that are part of its value": (
        coder_calls,
        coder("edit", line="5", to="</function><function=f><parameter=line><parameter=f> <parameter=to>\n</function>"),
        {"content": None, "calls": [(
            "edit",
            '{"line": 5, "to": "</function><function=f><parameter=line><parameter=f> <parameter=to>\\n</function>"}',
        )]},
    ),
    "parameters of a function without a schema that end one another": (
        coder_calls, "<tool_call><function=time><parameter=a>1<parameter=b>[2]</function></tool_call>",
        {"content": None, "calls": [("time", '{"a": "1", "b": [2]}')]},
    ),
    "one of several functions": (
        lambda: coder_calls(most_calls=1),
        "<tool_call><function=time></function><function=edit></function></tool_call>",
        {"content": None, "calls": [("time", "{}")]},
    ),
    "Seed-OSS' functions without their ends": (
        lambda: SeedCalls(tools=CODER_TOOLS),
        "<seed:tool_call><function=edit><parameter=line>5</parameter><function=time></seed:tool_call>",
        {"content": None, "calls": [("edit", '{"line": 5}'), ("time", "{}")]},
    ),
    "Seed-OSS' parameters without their ends": (
        lambda: SeedCalls(tools=CODER_TOOLS),
        "<seed:tool_call><function=edit><parameter=path>a<parameter=line>5</function></seed:tool_call>",
        {"content": None, "calls": [("edit", '{"path": "a", "line": 5}')]},
    ),
    "white space in Llama's format": (LlamaCalls, " \n", {"content": " \n"}),
    "Llama's JSON, twice": (LlamaCalls, '{"a": 5} {"b": 6}\n', {"content": '{"a": 5} {"b": 6}\n'}),
    "Granite's calls": (
        ListCalls, f"<|tool_call|>[{TIME}, {WEATHER}]",
        {"content": None, "calls": [("time", "{}"), ("weather", ARGUMENTS)]},
    ),
    "Granite's calls, as 3.1 has them": (
        ListCalls, f"<tool_call>[{TIME}]\n", {"content": None, "calls": [("time", "{}")]},
    ),
    "Phi-4-mini's calls": (
        PhiCalls, f"functools[{WEATHER},{TIME}]", {"content": None, "calls": [("weather", ARGUMENTS), ("time", "{}")]},
    ),
    "Phi-4-mini's text": (PhiCalls, "functools is Python's.", {"content": "functools is Python's."}),
    "a word of Phi-4-mini's text": (
        PhiCalls, "Use functools[a] or functools [b] or {functools[{1}]}",
        {"content": "Use functools[a] or functools [b] or {functools[{1}]}"},
    ),
    "a word before Phi-4-mini's call": (
        PhiCalls, f"Of functools functools[{TIME}]", {"content": "Of functools", "calls": [("time", "{}")]},
    ),
    "one of a list's calls": (
        lambda: PhiCalls(most_calls=1), f"functools[{TIME}, {WEATHER}]", {"content": None, "calls": [("time", "{}")]},
    ),
    "Seed-OSS' calls": (
        lambda: SeedCalls(tools=CODER_TOOLS),
        "Now.\n<seed:tool_call>\n<function=edit>\n<parameter=line>5</parameter>\n</function>\n</seed:tool_call>",
        {"content": "Now.", "calls": [("edit", '{"line": 5}')]},
    ),
    "reasoning": (
        lambda: ReasoningSplit(PlainText(), has_begun=False),
        "\n<think>\nI think <b>.\n</think>\n\nYes </think>.",
        {"reasoning_content": "I think <b>.", "reasoning": "I think <b>.", "content": "Yes </think>."},
    ),
    "reasoning that the prompt began": (
        lambda: ReasoningSplit(PlainText(), has_begun=True), "I\nthink</think>a",
        {"reasoning_content": "I\nthink", "reasoning": "I\nthink", "content": "a"},
    ),
    "reasoning that is cut": (
        lambda: ReasoningSplit(PlainText(), has_begun=False), "<think>I th",
        {"reasoning_content": "I th", "reasoning": "I th", "content": ""},
    ),
    "no reasoning": (lambda: ReasoningSplit(PlainText(), has_begun=False), " <thin air", {"content": " <thin air"}),
    "what might have become reasoning": (
        lambda: ReasoningSplit(PlainText(), has_begun=False), " <thi", {"content": " <thi"},
    ),
    "nothing but white space": (lambda: ReasoningSplit(PlainText(), has_begun=False), " \n", {"content": " \n"}),
    "empty reasoning": (
        lambda: ReasoningSplit(PlainText(), has_begun=False), "<think>\n\n</think>\n\na", {"content": "a"},
    ),
    "reasoning that is not wanted": (
        lambda: ReasoningSplit(PlainText(), has_begun=False, is_shown=False), "<think>I</think>a", {"content": "a"},
    ),
    "reasoning of Seed-OSS, and a call": (
        lambda: ReasoningSplit(SeedCalls(), has_begun=False, tags=SEED_THINK),
        "<seed:think>hm</think></seed:think>\n<seed:tool_call><function=time></function></seed:tool_call>",
        {"reasoning_content": "hm</think>", "reasoning": "hm</think>", "content": None, "calls": [("time", "{}")]},
    ),
    "reasoning and a call": (
        lambda: ReasoningSplit(HermesCalls(), has_begun=False), f"<think>hm</think>\n{hermes(TIME)}",
        {"reasoning_content": "hm", "reasoning": "hm", "content": None, "calls": [("time", "{}")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@given(places=st.lists(st.integers(0, 200), max_size=12))
def test_a_message_is_the_same_in_whatever_pieces_its_text_comes(case, places):
    make, text, expected = CASES[case]
    message, reason = read(make, text, places)
    assert message == expected
    assert reason == ("tool_calls" if "calls" in expected and "call that is cut" not in case else "stop")
    assert read(make, text, list(range(len(text)))) == (message, reason)


class CountedPattern:
    """A pattern that counts the characters that it is given to look at."""

    def __init__(self, pattern: re.Pattern[str], counts: list[int]) -> None:
        self._pattern = pattern
        self._counts = counts

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def look(text: str, begin: int = 0, end: int = sys.maxsize) -> Any:
            self._counts.append(min(len(text), end) - begin)
            return getattr(self._pattern, method)(text, begin, end)

        return look


PARAMETER = "<tool_call><function=edit><parameter=path>"


@pytest.mark.parametrize(
    ("make", "beginning", "piece"),
    [
        (coder_calls, PARAMETER, "words "),
        (coder_calls, PARAMETER + "if a < b:\n", "words "),
        (coder_calls, PARAMETER + "<parameter=", "word"),
        (coder_calls, PARAMETER + "</parameter>", " \n"),
        (coder_calls, "<tool_call><function=", "word"),
        (HermesCalls, '<tool_call>{"name": "edit", "arguments": {"path": "', "words "),
        (HermesCalls, '<tool_call>{"name": "', "word"),
        (MistralCalls, "[TOOL_CALLS]", "word"),
        (MistralCalls, "[TOOL_CALLS]", " "),
        (PhiCalls, "functools", " "),
    ],
)
def test_a_long_call_takes_work_that_grows_with_its_length(monkeypatch, make, beginning, piece):
    counts: list[int] = []
    for owner in (
        call_parts,
        tool_calls,
        call_parts.XmlCall,
        call_parts.NamedCall,
        call_parts.JsonCall,
        ListCalls,
        PhiCalls,
    ):
        for name, value in list(vars(owner).items()):
            if isinstance(value, re.Pattern):
                monkeypatch.setattr(owner, name, CountedPattern(value, counts))

    def looked_at(num_pieces: int) -> int:
        counts.clear()
        parts = make()
        for text in [beginning, *[piece] * num_pieces]:
            parts.feed(text, final=False)
        return sum(counts)

    assert looked_at(4000) < 2.5 * looked_at(2000)


HEAD = '{"name": "f", "arguments": '


TAGS = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "functools[", "<|tool_call|>", "<seed:tool_call>", "</seed:tool_call>"]
XML = ["<function=time>", "<function=", "<parameter=a>", "<parameter=b>", "b>", "</parameter>", "</function>"]
WRITTEN = ["<tool_call>", "</tool_call>", HEAD, *'{}"a\\[],; \nä𝄞', *TAGS, *XML, "functools", "<think>", "</think>"]


@given(st.lists(st.sampled_from(WRITTEN)))
@example([HEAD, HEAD, "}", "<tool_call>", HEAD])  # what looks like a call after what is none
@example(["[TOOL_CALLS]", "a", "[CALL_ID]", "a", "{", "[ARGS]", "{", "}"])
@example(["<tool_call>", "<tool_call>", HEAD, "{", "}", "}", "}", HEAD])
def test_whatever_a_model_writes_becomes_a_message(pieces):
    readers = (HermesCalls, LlamaCalls, coder_calls, ListCalls, PhiCalls, MistralCalls, SeedCalls)
    for make in (*readers, lambda: ReasoningSplit(HermesCalls(), has_begun=True)):
        whole, _ = read(make, "".join(pieces))
        cut, _ = read(make, "".join(pieces), list(range(len("".join(pieces)))))
        assert whole == cut


@pytest.mark.parametrize("make", [HermesCalls, LlamaCalls, ListCalls, PhiCalls, MistralCalls, coder_calls, SeedCalls])
@given(st.lists(st.sampled_from(["{", "}", '"', "a", " ", "\n", "[", "]", ",", "functools", "<", "tool", "ä"])))
def test_text_without_a_call_is_returned_as_it_was_written(make, pieces):
    assert read(make, "".join(pieces), list(range(len("".join(pieces)))))[0] == {"content": "".join(pieces)}


# ---- over HTTP ---------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]
MESSAGES = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATE = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + MESSAGES
HERMES = TEMPLATE + "{# <tool_call> #}"


def new_server(small_model: Callable[[str], Path], *texts: str, template: str = HERMES) -> FakeServer:
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=template)
    server.answers(*texts)
    return server


@pytest.mark.parametrize(
    ("tools", "param", "problem"),
    [
        ([{"type": "function"}], "tools[0]", "expected a function with a name"),
        ([TOOLS[0], {"type": "function", "function": "f"}], "tools[1]", "expected a function with a name"),
        ([{"type": "function", "function": {"name": ""}}], "tools[0]", "expected a function with a name"),
        ([TOOLS[0] | {"type": "custom"}], "tools[0]", "expected a function with a name"),
        (TOOLS * 129, "tools", "tools: 258 of them; expected at most 256"),
    ],
)
async def test_tools_that_are_none_and_too_many_are_refused(small_model, tools, param, problem):
    server = new_server(small_model, "yes", template="<tool_call>" + MESSAGES)
    response = await server.chat(tools=tools)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert problem in error["message"]


async def test_calls_are_streamed_with_their_arguments_as_these_come(small_model):
    server = new_server(
        small_model, "<tool_call>", '{"name": "weather", "arg', 'uments": {"a"', ": 5}}", "</tool_call>"
    )
    chunks = chunks_of(await server.chat(tools=TOOLS, stream=True))
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["function"].get("name") for call in calls] == ["weather", None, None]
    assert [call["function"]["arguments"] for call in calls] == ["", '{"a"', ": 5}"]
    assert (calls[0]["type"], {call["index"] for call in calls}) == ("function", {0})
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    choice = (await server.chat(tools=TOOLS)).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert call["function"] == {"name": "weather", "arguments": '{"a": 5}'}
    prompts = [server.tokenizer.decode(prompt) for prompt, _ in server.scheduler.asked]
    assert prompts == ["weather time hi"] * 2


async def test_a_template_of_qwen3_coder_has_its_calls_read_streamed_and_begun(small_model):
    server = new_server(small_model, coder("edit", line="5"), template=HERMES + "{# <function=name> #}")
    message = (await server.chat(tools=CODER_TOOLS)).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "edit", "arguments": '{"line": 5}'}
    server.answers("<parameter=line>\n5", "\n</parameter>\n", "</function>\n</tool_call>")
    chosen = {"type": "function", "function": {"name": "edit"}}
    chunks = chunks_of(await server.chat(tools=CODER_TOOLS, tool_choice=chosen, stream=True))
    assert server.prompt.endswith("<tool_call>\n<function=edit>\n")
    functions = [call["function"] for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert functions == [{"name": "edit", "arguments": ""}, {"arguments": '{"line": 5'}, {"arguments": "}"}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_of_tools_that_must_not_be_called_nothing_is_said(small_model):
    server = new_server(small_model, hermes(TIME))
    choice = (await server.chat(tools=TOOLS, tool_choice="none")).json()["choices"][0]
    assert choice["message"]["content"] == hermes(TIME)
    assert [server.tokenizer.decode(prompt) for prompt, _ in server.scheduler.asked] == ["hi"]


@pytest.mark.parametrize(
    ("choice", "beginning", "rest"),
    [
        ("required", '<tool_call>\n{"name": "', 'time", "arguments": {"a": 1}}\n</tool_call>'),
        (
            {"type": "function", "function": {"name": "time"}},
            '<tool_call>\n{"name": "time", "arguments": ',
            '{"a": 1}}\n</tool_call>' + hermes(WEATHER),
        ),
    ],
)
async def test_a_call_that_must_be_is_begun_for_the_model(small_model, choice, beginning, rest):
    server = new_server(small_model, *rest)
    answer = (await server.chat(tools=TOOLS, tool_choice=choice)).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": '{"a": 1}'}
    ((prompt, _),) = server.scheduler.asked
    assert server.tokenizer.decode(prompt) == f"weather time hi{beginning}"


BEGUN = {
    "mistral": ("[TOOL_CALLS] [ARGS]", "[TOOL_CALLS]", 'time[ARGS]{"a": 1}'),
    "mistral_json": ("[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "', 'time", "arguments": {"a": 1}}'),
    "granite": ("<|tool_call|>", '<|tool_call|>[{"name": "', 'time", "arguments": {"a": 1}}'),
    "phi4_mini": ("functools[", 'functools[{"name": "', 'time", "arguments": {"a": 1}}'),
    "seed_oss": (
        "<seed:tool_call>", "<seed:tool_call>\n<function=",
        "time>\n<parameter=a>1</parameter>\n</function>\n</seed:tool_call>",
    ),
}  # fmt: skip
"""For each format: words of a template that has it, the beginning of a call, and the rest of that call."""


@pytest.mark.parametrize("name", BEGUN)
async def test_calls_of_other_formats_are_known_by_their_template_and_begun_for_the_model(small_model, name):
    shown, beginning, rest = BEGUN[name]
    assert format_of("{{ tools }}" + shown) == name
    tools = [
        TOOLS[0],
        TOOLS[1] | {"function": {"name": "time", "parameters": {"properties": {"a": {"type": "number"}}}}},
    ]
    server = new_server(small_model, rest, template=TEMPLATE + "{# " + shown + " #}")
    head = rest.partition("{")[0] if "{" in rest else rest.partition("<")[0]
    for choice in ("required", {"type": "function", "function": {"name": "time"}}):
        text = rest if choice == "required" else rest.removeprefix(head)
        server.answers(text)
        answer = (await server.chat(tools=tools, tool_choice=choice)).json()["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        assert call["function"] == {"name": "time", "arguments": '{"a": 1}'}
        assert answer["finish_reason"] == "tool_calls"
        assert (len(call["id"]) == 9) == name.startswith("mistral"), "Mistral's templates refuse other ids"
        begun = beginning if choice == "required" else beginning + head
        assert server.prompt == f"weather time hi{begun}"


async def test_tags_of_calls_that_are_special_tokens_are_read_and_others_are_not_shown(small_model):
    tokenizer = load_tokenizer(small_model("qwen3"))
    tokenizer.add_tokens(["[TOOL_CALLS]", "[ARGS]", "<|other|>"], special_tokens=True)
    server = FakeServer(tokenizer, chat_template=TEMPLATE + "{# [TOOL_CALLS] [ARGS] #}")
    server.answers("So.<|other|>[TOOL_CALLS]time[ARGS]{}")
    message = (await server.chat(tools=TOOLS)).json()["choices"][0]["message"]
    assert (message["content"], message["tool_calls"][0]["function"]) == ("So.", {"name": "time", "arguments": "{}"})
    assert (await server.chat()).json()["choices"][0]["message"]["content"] == "So.time{}"


async def test_tags_of_other_formats_that_are_special_tokens_are_not_shown(small_model):
    tokenizer = load_tokenizer(small_model("qwen3"))
    tokenizer.add_tokens(["[TOOL_CALLS]", "<tool_call>"], special_tokens=True)
    server = FakeServer(tokenizer, chat_template=HERMES)
    server.answers("So.[TOOL_CALLS]<tool_call>" + TIME)
    message = (await server.chat(tools=TOOLS)).json()["choices"][0]["message"]
    assert (message["content"], message["tool_calls"][0]["function"]["name"]) == ("So.", "time")


async def test_reasoning_of_seed_oss_is_read_where_its_tags_are_special_tokens(small_model):
    tokenizer = load_tokenizer(small_model("qwen3"))
    tokenizer.add_tokens(["<seed:think>", "</seed:think>"], special_tokens=True)
    server = FakeServer(tokenizer, chat_template=MESSAGES + "{{ end }}{# <seed:think></seed:think> #}")
    for begun, text in (("", "<seed:think>hm</seed:think>yes"), ("<seed:think>", "hm</seed:think>yes")):
        server.answers(text)
        answer = (await server.chat(chat_template_kwargs={"end": begun})).json()
        message = answer["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "yes", "reasoning_content": "hm", "reasoning": "hm"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ],
)
async def test_tools_that_cannot_be_are_a_400_that_names_them(small_model, changes, param):
    response = await new_server(small_model, "a").chat(**changes)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_model_whose_template_knows_no_tools_refuses_them(small_model):
    server = new_server(small_model, "a", template="{{ messages }}")
    response = await server.chat(tools=TOOLS)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert format_of('{{ tools }} "parameters"') == "llama3_json"


async def test_reasoning_is_a_field_of_its_own_by_both_of_its_names(small_model):
    template = MESSAGES + "{{ end }}{# </think> #}"
    server = new_server(small_model, "<think>h", "m</think>", "yes", template=template)
    message = (await server.chat()).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "yes", "reasoning_content": "hm", "reasoning": "hm"}
    server.answers("h", "m</think>", "yes")
    begun = {"chat_template_kwargs": {"end": "<think>\n"}}
    assert (await server.chat(**begun)).json()["choices"][0]["message"] == message
    chunks = chunks_of(await server.chat(stream=True, **begun))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "hm"
    assert json.dumps(deltas).count('"yes"') == 1
    hidden = await server.chat(include_reasoning=False, **begun)
    assert hidden.json()["choices"][0]["message"] == {"role": "assistant", "content": "yes"}


async def test_an_answer_that_follows_a_grammar_is_not_searched_for_reasoning_and_one_that_has_begun_is_ended(
    small_model,
):
    server = new_server(small_model, "<think>{}", template=MESSAGES + "{{ end }}{# </think> #}")
    for end, prompt_end in (("", "hi"), ("<think>\n", "<think>\n\n</think>\n\n")):
        body = {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"end": end}}
        message = (await server.chat(**body)).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "<think>{}"}
        assert server.prompt.endswith(prompt_end)


@pytest.mark.parametrize("body", [{}, {"stream": True, "stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("steps", "num_reasoning"),
    [
        (["<thi", "nk>h", "m</think>", "yes"], len("<think>hm</think>")),
        (["<think>hm"], len("<think>hm")),
        (["<think>hm</think>", "yes </think>"], len("<think>hm</think>")),
        (["<", "b>hm"], 0),
        (["<thi"], 0),
    ],
)
async def test_usage_says_how_many_tokens_were_reasoning_shown_or_not(small_model, steps, num_reasoning, body):
    server = new_server(small_model, *steps, template=MESSAGES + "{# </think> #}")
    bodies: list[dict[str, Any]] = [{}, {"include_reasoning": False}, {"n": 2}]
    for more in bodies:
        response = await server.chat(**body, **more)
        usage = (chunks_of(response)[-1] if body else response.json())["usage"]
        expected = num_reasoning * more.get("n", 1)
        assert usage["completion_tokens_details"] == {"reasoning_tokens": expected}


def test_of_tokens_that_come_together_those_up_to_the_end_of_reasoning_are_counted():
    split = ReasoningSplit(PlainText(), has_begun=True, end_id=9)
    split.feed("hm</think>yes", final=False)
    assert split.num_reasoning([5, 6, 9, 7, 9]) == 3
    split.feed(" no", final=True)
    assert split.num_reasoning([8]) == 0


async def test_an_effort_switches_thinking_on_or_off_unless_the_template_is_told_so_itself(small_model):
    template = MESSAGES + "[{{ enable_thinking }}]"
    by_default = {"enable_thinking": True}
    server = FakeServer(
        load_tokenizer(small_model("qwen3")), chat_template=template, default_chat_template_kwargs=by_default
    )
    server.answers("a")
    asked: list[tuple[dict[str, Any], str]] = [
        ({"reasoning_effort": "none"}, "False"),
        ({"reasoning_effort": "low"}, "True"),
        ({}, "True"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "True"),
    ]
    for body, said in asked:
        assert (await server.chat(**body)).status_code == 200
        assert server.prompt.endswith(f"[{said}]")
