"""Structured outputs of LLM, and of the OpenAI server in front of a scheduler that answers as it is told."""

import json
from typing import Any

import jsonschema
import pytest
from hbserve_fake_scheduler import FakeServer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hbserve import LLM, SamplingParams
from hbserve.sampling_params import StructuredOutputsParams
from hbserve.server.chat.tool_calls import FORMATS, Format
from hbserve.text.tokenizer import load_tokenizer
from hbserve_core.grammars.compiler import GrammarCompiler
from hbserve_core.grammars.trials import Trials
from hbserve_rpc import InvalidRequest
from hbserve_testing.narrowing import present

NUM_SCHEMAS = 500
NAMES = st.text("abcdxyz_é ", min_size=1, max_size=4)
LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{1,4}$"}]),
    st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": sum(ends)}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda ends: {"type": "string", "minLength": ends[0], "maxLength": sum(ends)}
    ),
    st.lists(st.none() | st.booleans() | st.integers(-9, 99) | NAMES, min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    NAMES.map(lambda value: {"const": value}),
)


def _object(properties: dict, num_optional: int) -> dict:
    required = list(properties)[: len(properties) - num_optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=2), st.integers(0, 1)),
        st.builds(
            lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
            inner, st.integers(0, 1), st.integers(0, 1),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda kinds: {"anyOf": kinds}),
        inner.map(lambda schema: {"$defs": {"it": schema}, "type": "array", "items": {"$ref": "#/$defs/it"},
                                  "maxItems": 2}),
    )  # fmt: skip


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=4).filter(lambda schema: json.dumps(schema).count("$defs") <= 2)


def random_requests(count: int) -> list[tuple[dict, str]]:
    """Draw schemas and prompts, all before the first request, so that they can be answered together."""
    found: list[tuple[dict, str]] = []

    @settings(max_examples=count, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(SCHEMAS, st.text(min_size=1, max_size=20))
    def draw(schema: dict, prompt: str) -> None:
        found.append((schema, prompt))

    draw()
    return found[:count]


@pytest.fixture(scope="module")
def llm(small_model):
    with LLM(small_model("qwen3"), num_kvcache_blocks=4000, kvcache_block_size=16, max_num_seqs=256) as llm:
        yield llm


def test_answers_to_random_prompts_parse_and_validate_against_random_schemas(llm, monkeypatch):
    # None of them is slow, which would be tried out in another process.
    monkeypatch.setattr(Trials, "problem_of", lambda *_: "")
    requests = [(_root(schema), prompt) for schema, prompt in random_requests(NUM_SCHEMAS)]
    assert len(requests) == NUM_SCHEMAS
    # What a model writes at random ends rarely: these make lists, strings and numbers end.
    closing = {llm.tokenizer.encode(each)[0]: 4.0 for each in '"]},'}
    params = [
        SamplingParams(1.0, 400, seed=seed, logit_bias=closing, structured_outputs=StructuredOutputsParams(json=schema))
        for seed, (schema, _) in enumerate(requests)
    ]
    answers = llm.generate([prompt for _, prompt in requests], params, use_tqdm=False)
    for (schema, _), answer in zip(requests, answers, strict=True):
        text = answer["text"].removesuffix("</s>")
        assert text != answer["text"], f"{schema}: {text} did not end"
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


def _root(schema: dict) -> dict:
    """Move a schema's definitions to the root, where its references expect them."""
    definitions: dict[str, dict] = {}

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [moved(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$defs" in part:
            name = f"it{len(definitions)}"
            definitions[name] = {}
            definitions[name] = moved(part["$defs"]["it"])
            return {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": part["maxItems"]}
        return {key: each if key in ("enum", "const") else moved(each) for key, each in part.items()}

    found = moved(schema)
    return {**found, "$defs": definitions} if definitions else found


def test_a_schema_that_cannot_be_served_is_named_before_anything_runs(llm):
    good = SamplingParams(0, 3)
    bad = SamplingParams(0, 3, structured_outputs=StructuredOutputsParams(json={"not": {}}))
    with pytest.raises(InvalidRequest, match=r'prompts\[1\]: structured_outputs\.json: Unimplemented keys: \["not"\]'):
        llm.generate(["a", "b"], [good, bad])
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.json: Unimplemented"):
        llm.add_request("a", bad)
    assert llm.is_finished()
    assert len(llm.generate(["a"], good)[0]["token_ids"]) <= 3


# ---- the server --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")))
    server.answers("{}")
    return server


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA}}},
         {"json": SCHEMA}),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json": json.dumps(SCHEMA)}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, {"json_object": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_both_endpoints_hand_on_what_an_answer_must_be(server, path, body, asked):
    response = await getattr(server, path)(**body)
    assert response.status_code == 200, response.text
    ((_, params),) = server.scheduler.asked
    assert params.structured_outputs == (StructuredOutputsParams(**asked) if asked else None)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "it"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "stop": "b"}, "stop"),
        ({"response_format": {"type": "json_object"}, "stop_token_ids": [3]}, "stop_token_ids"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_what_cannot_be_is_a_400_that_names_its_field(server, path, body, named):
    response = await getattr(server, path)(**body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named
    assert not server.scheduler.asked


async def test_what_an_instance_refuses_is_a_400_too(server):
    server.scheduler.steps = [InvalidRequest("decode-0: structured_outputs.json: Unimplemented keys")]
    for stream in (False, True):
        response = await server.chat(structured_outputs={"json": SCHEMA}, stream=stream)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "structured_outputs")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "path_of_schema", "param"),
    [
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
         "response_format.json_schema.schema", "response_format"),
        ("/v1/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
         "response_format.json_schema.schema", "response_format"),
        ("/v1/chat/completions", {"structured_outputs": {"json": SCHEMA}},
         "structured_outputs.json", "structured_outputs"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}},
         "text.format.schema", "text.format"),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
         "output_config.format.schema", None),
    ],
)  # fmt: skip
async def test_what_an_instance_finds_in_a_schema_is_named_as_its_client_sent_it(
    server, path, body, path_of_schema, param, late
):
    """The error may come before the first token, or as an event of a stream that has begun."""
    refused = InvalidRequest('decode-0: structured_outputs.json: Unimplemented keys: ["response_format"]')
    server.answers("a")
    server.scheduler.steps = [*server.scheduler.steps, refused] if late else [refused]
    asked = {"prompt": "hi", "input": "hi", "messages": [{"role": "user", "content": "hi"}]}
    own = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    more = {"max_tokens": 9} if path == "/v1/messages" else {}
    response = await server.post(path, **{own: asked[own], "stream": late, **more, **body})
    assert response.status_code == (200 if late else 400)
    error = response.text.replace('\\"', '"')
    assert f'"message":"decode-0: {path_of_schema}: Unimplemented keys: ["response_format"]"' in error
    if param is not None and not (late and path == "/v1/responses"):  # whose event has no place for it
        assert f'"param":"{param}"' in error


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}, "stop": "a"},
         "stop=['a']: not with response_format, whose"),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": {}}}, "stop_sequences": ["a"],
                          "max_tokens": 9}, "stop_sequences=['a']: not with output_config.format, whose"),
    ],
)  # fmt: skip
async def test_an_end_that_a_grammar_does_not_leave_free_is_refused_in_the_words_of_its_client(
    server, path, body, message
):
    response = await server.post(path, messages=[{"role": "user", "content": "hi"}], **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)


TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {**SCHEMA, "required": ["a"],
                                                                     "additionalProperties": False, "not": {}}}},
    {"type": "function", "function": {"name": 'q"é'}},
]  # fmt: skip
TOOL_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools }}{{ '<tool_call>' }}"


@pytest.mark.parametrize(
    ("choice", "fits", "does_not_fit"),
    [
        ({"type": "function", "function": {"name": "look"}}, ['{"a": 5}}'], ['{"a": "5"}}', "{}}", 'look", "ar']),
        ({"type": "function", "function": {"name": 'q"é'}}, ["{}}", '{"b": [1]}}'], ["[]}"]),
        ("required", ['look", "arguments": {"a": 5}}', 'q\\"é", "arguments": {}}'], ['look", "arguments": {}}', "{}"]),
    ],
)  # fmt: skip
async def test_a_call_that_must_be_made_follows_the_tools_schema(small_model, choice, fits, does_not_fit):
    folder = small_model("qwen3")
    tokenizer = load_tokenizer(folder)
    server = FakeServer(tokenizer, chat_template=TOOL_TEMPLATE)
    server.answers('{"a": 5}}')
    response = await server.chat(tools=TOOLS, tool_choice=choice)
    assert response.status_code == 200, response.text
    ((_, params),) = server.scheduler.asked
    grammars = GrammarCompiler(str(folder), 320, [2])
    for text in fits:
        matcher = present(grammars.matcher(params, tokenizer.encode(text)))
        assert matcher._matcher.is_accepting(), text
    for text in does_not_fit:
        with pytest.raises(InvalidRequest, match="do not follow"):
            grammars.matcher(params, tokenizer.encode(text))


SHOWN: dict[Format, str] = {
    "hermes": "<tool_call>",
    "llama3_json": '"parameters"',
    "mistral": "[TOOL_CALLS] [ARGS]",
    "mistral_json": "[TOOL_CALLS]",
    "granite": "<|tool_call|>",
    "phi4_mini": "functools[",
}
"""What a template shows of a format."""


@pytest.mark.parametrize("name", SHOWN)
async def test_an_answer_that_must_call_may_call_several_times_and_end_after_each(small_model, tmp_path, name):
    tokenizer = load_tokenizer(small_model("qwen3"))
    tokenizer.add_tokens(["[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    server = FakeServer(tokenizer, chat_template="{{ messages }}{{ tools }}{# " + SHOWN[name] + " #}")
    server.answers("{}")
    named = {"type": "function", "function": {"name": "look"}}
    for more in ({}, {"parallel_tool_calls": False}, {"tool_choice": named}):
        response = await server.chat(**{"tools": TOOLS, "tool_choice": "required", **more})
        assert response.status_code == 200, response.text
    several, one, of_name = [params for _, params in server.scheduler.asked]
    begun, closing, between, end = (getattr(FORMATS[name], part) for part in ("arguments", "closing", "between", "end"))
    call, other = f'look{begun}{{"a": 5}}{closing}', f'look{begun}{{"a": 6}}{closing}'
    grammars = GrammarCompiler(str(tmp_path), len(tokenizer), [2])

    def is_whole(params: SamplingParams, text: str) -> bool:
        matcher = present(grammars.matcher(params, tokenizer.encode(text, add_special_tokens=False)))
        return bool(matcher._matcher.is_accepting())

    for text in (call, call + end, call + between + other, between.join([other] * 32) + end):
        assert is_whole(several, text), text
    assert is_whole(one, call)
    assert is_whole(of_name, call.removeprefix(f"look{begun}"))
    for params, text in (
        (several, between.join([call] * 33)), (one, call + between), (several, call + between + "see"),
        (of_name, call.removeprefix(f"look{begun}") + between),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match="do not follow"):
            is_whole(params, text)
    if name == "mistral":  # a special token, and not its letters
        spelt = [each for letter in "look[ARGS]" for each in tokenizer.encode(letter, add_special_tokens=False)]
        with pytest.raises(InvalidRequest, match="do not follow"):
            grammars.matcher(several, spelt)


async def test_a_call_in_qwen3_coders_format_that_must_be_made_is_of_a_tool_that_there_is(small_model):
    folder = small_model("qwen3")
    tokenizer = load_tokenizer(folder)
    server = FakeServer(tokenizer, chat_template=TOOL_TEMPLATE + "{# <function=name> #}")
    server.answers("look>\n</function>")
    for choice in ("required", {"type": "function", "function": {"name": "look"}}):
        assert (await server.chat(tools=TOOLS, tool_choice=choice)).status_code == 200
    (_, required), (_, named) = server.scheduler.asked
    assert named.structured_outputs is None
    grammars = GrammarCompiler(str(folder), 320, [2])
    for text in ("look>\n</function>", 'q"é>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>'):
        assert present(grammars.matcher(required, tokenizer.encode(text)))._matcher.is_accepting()
    with pytest.raises(InvalidRequest, match="do not follow"):
        grammars.matcher(required, tokenizer.encode("see>"))


async def test_what_an_instance_finds_in_the_schema_of_a_tool_is_named_as_that(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=TOOL_TEMPLATE)
    server.scheduler.steps = [InvalidRequest("prefill-0: structured_outputs.grammar: schema too large")]
    response = await server.chat(tools=TOOLS, tool_choice="required", response_format={"type": "text"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"]) == ("prefill-0: tools: schema too large", "tools")


async def test_a_call_that_may_be_made_or_has_another_end_is_not_held_to_a_schema(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=TOOL_TEMPLATE)
    server.answers("hi")
    for more in ({"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": "required", "stop": "x"}):
        assert (await server.chat(tools=TOOLS, **more)).status_code == 200
    assert [params.structured_outputs for _, params in server.scheduler.asked] == [None] * 3
    response = await server.chat(tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")
