"""Answers of the OpenAI server: their shapes, whole and in chunks, before a scheduler that answers as it is told."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hbserve_fake_scheduler import TEMPLATE, FakeScheduler, FakeServer, chunks_of
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hbserve.server.answers.chat_choices import ChatChoices
from hbserve.server.answers.completion_choices import CompletionChoices
from hbserve.server.answers.logprobs import CompletionLogprobs, TokenNames
from hbserve.server.fields.sampling import model_defaults
from hbserve.text.text_request import answer_all
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import Overloaded, SamplingParams
from hbserve_rpc.messages import GenerateRequest

TOKEN_OF_EOS = 2


@pytest.fixture
def server(small_model: Callable[[str], Path]) -> FakeServer:
    server = FakeServer(load_tokenizer(small_model("qwen3")))
    server.answers("Hel", "lo", " wör", "ld")
    return server


def text_of(chunks: list[dict], index: int = 0) -> str:
    choices = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
    return "".join(each["delta"].get("content", "") if "delta" in each else each["text"] for each in choices)


async def test_a_chat_is_answered_whole(server):
    answer = (await server.chat(model="small")).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"], type(answer["created"])) == ("chat.completion", "small", int)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello wörld"}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert answer["usage"] == {
        "prompt_tokens": len("<user>hi"), "completion_tokens": 12, "total_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 7},
    }  # fmt: skip
    assert answer["metrics"] == {
        "time_to_first_token_ms": pytest.approx(2), "generation_time_ms": pytest.approx(48),
        "queue_time_ms": pytest.approx(1), "mean_itl_ms": pytest.approx(3),
        "tokens_per_second": pytest.approx(11 / 0.048),
        "handoff_ms": pytest.approx(4), "kv_transfer_time_ms": pytest.approx(4), "kv_bytes": 4096,
        "prefill_instance": "p0", "decode_instance": "d0", "num_attempts": 1,
    }  # fmt: skip


async def test_a_streamed_chat_begins_with_its_role_and_ends_with_usage_if_that_is_asked_for(server):
    chunks = chunks_of(await server.chat(stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "Hello wörld"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1] if chunk["choices"][0]["finish_reason"]] == [
        "stop"
    ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 20
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert "usage" not in str(chunks_of(await server.chat(stream=True)))


async def test_continuous_usage_is_in_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(await server.complete(stream=True, stream_options=options, max_tokens=100))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == sorted(
        chunk["usage"]["completion_tokens"] for chunk in chunks
    )
    assert chunks[-1]["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("ask", ["chat", "complete"])
@pytest.mark.parametrize("more", [{}, {"return_token_ids": True}, {"n": 2}, {"logprobs": 1}, {"stop": ["ö"]}])
async def test_events_of_text_alone_are_those_that_are_made_like_all_others(server, monkeypatch, ask, more):
    if ask == "chat" and "logprobs" in more:
        more = {"logprobs": True}
    server.answers("He", 'l"\\', "\0\n", "w", "ör", "ld")
    answers = []
    for may_be_bare in (True, False):
        for choices in (ChatChoices, CompletionChoices):
            if not may_be_bare:
                monkeypatch.setattr(choices, "is_bare", lambda *_: False)
        chunks = chunks_of(await getattr(server, ask)(stream=True, **more))
        answers.append([{**chunk, "id": "", "created": 0} for chunk in chunks])
    assert answers[0] == answers[1]
    assert text_of(answers[0]) == 'Hel"\\\0\nwörld'[: None if "stop" not in more else 8]


async def test_completions_take_text_ids_and_batches_of_both_and_answer_each_n_times(server):
    answer = (await server.complete(prompt=["hi", [5, 6, 7], "there"], n=2)).json()
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert {choice["text"] for choice in answer["choices"]} == {"Hello wörld"}
    assert answer["usage"]["prompt_tokens"] == 2 + 3 + 5, "a prompt counts once, however often it is answered"
    assert answer["usage"]["completion_tokens"] == 6 * 12
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3 * 7}
    assert "metrics" not in answer
    for prompt, expected in [("hi", 2), ([5, 6, 7], 3), (["hi"], 2), ([[5], [6]], 2)]:
        assert (await server.complete(prompt=prompt)).json()["usage"]["prompt_tokens"] == expected


async def test_the_choices_of_a_prompt_are_one_request(server):
    await server.complete(n=3, seed=-1)
    await server.chat(n=2)
    asked = [params for _, params in server.scheduler.asked]
    assert [(params.n, params.seed) for params in asked] == [(3, 2**63 - 1), (2, None)]
    # As the engines tell them apart.
    assert [asked[0].of_choice(choice).seed for choice in range(3)] == [2**63 - 1, 0, 1]
    assert [asked[1].of_choice(choice).seed for choice in range(2)] == [None, None]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_its_own_choice_alone(server, stream):
    """All choices have the stop string here, each in its own step. One that is ended by itself gets no more tokens."""
    server.answers("Hello", " wörld", " and all")
    answer = await server.complete(n=2, stop=" w", max_tokens=100, stream=stream, logprobs=0)
    assert server.scheduler.running == {}
    assert server.scheduler.num_given == 2 * len("Hello wörld".encode()), "none of the last step"
    if stream:
        texts = ["", ""]
        for chunk in chunks_of(answer):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == ["Hello", "Hello"]
    else:
        choices = answer.json()["choices"]
        assert [(each["text"], each["finish_reason"]) for each in choices] == [("Hello", "stop")] * 2


async def test_what_is_known_of_a_prompt_is_told_with_each_of_its_choices(server):
    answer = (await server.complete(prompt=[5, 6, 7], n=2, prompt_logprobs=0, echo=True, logprobs=0)).json()
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert first == second
    assert [None if each is None else list(each) for each in first] == [None, ["6"], ["7"]]
    assert len({tuple(choice["logprobs"]["tokens"]) for choice in answer["choices"]}) == 1


async def test_an_answer_may_be_told_to_be_longer_than_the_context_and_ends_with_it(server):
    """Clients send a cap that is always the same."""
    await server.chat(max_completion_tokens=65535)
    await server.complete(max_tokens=65535)
    assert [params.max_tokens for _, params in server.scheduler.asked] == [65535, 65535]


async def test_the_length_of_an_answer_that_does_not_say_is_16_or_the_rest_of_the_context(server):
    await server.complete()
    await server.chat()
    await server.chat(max_tokens=5)
    await server.chat(max_tokens=5, max_completion_tokens=6)
    assert [params.max_tokens for _, params in server.scheduler.asked] == [16, 512 - len("<user>hi"), 5, 6]
    answer = (await server.chat(max_tokens=5)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "Hello"


async def test_parameters_arrive_and_nulls_are_as_if_they_were_not_there(server):
    given = {"temperature": 0, "top_p": 0.5, "top_k": 3, "stop": "x", "stop_token_ids": [9], "ignore_eos": True}
    given |= {"presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": {"5": 1.5}}
    given |= {"min_p": 0.25, "min_tokens": 2}
    await server.complete(**given)
    await server.complete(**dict.fromkeys(given), logprobs=None, seed=None, best_of=None)
    (_, params), (_, neutral) = server.scheduler.asked
    assert {name: getattr(params, name) for name in given} == given | {"stop": ["x"], "logit_bias": {5: 1.5}}
    assert (neutral.temperature, neutral.stop, neutral.top_k, neutral.ignore_eos) == (1.0, [], -1, False)


async def test_what_clients_always_send_is_taken(server):
    penalties = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1.0}
    neutral: dict[str, Any] = penalties | {"best_of": 1, "n": 1}
    neutral |= {"logit_bias": {}, "min_p": 0, "min_tokens": 0, "response_format": {"type": "text"}}
    response = await server.complete(**neutral, echo=False, suffix=None, user="me")
    assert response.status_code == 200
    assert response.headers["x-hbserve-ignored"] == "user"


async def test_a_stop_string_over_several_tokens_ends_the_text_and_the_request(server):
    server.scheduler.steps.append(asyncio.Event())  # who is not told to stop never does
    (choice,) = (await server.chat(stop=["o w"])).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hell", "stop")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_choices_say_which_stop_string_or_token_ended_them_and_the_text_may_include_it(server, path):
    last = server.scheduler.steps[-1][-1]
    question = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
    cases: list[tuple[dict[str, Any], str, Any]] = [
        ({"stop": ["x", "o w"]}, "Hell", "o w"),
        ({"stop": ["x", "o w"], "include_stop_str_in_output": True}, "Hello w", "o w"),
        ({"stop": ["x"], "stop_token_ids": [1, last]}, "Hello wörld", last),
        ({"stop": ["x"], "stop_token_ids": [1], "include_stop_str_in_output": True}, "Hello wörld", None),
        ({"max_tokens": 3, "stop_token_ids": [server.scheduler.steps[0][-1]]}, "Hel", None),
    ]
    for changes, text, reason in cases:
        choice = (await server.post(path, **question | changes)).json()["choices"][0]
        assert (choice["message"]["content"] if "chat" in path else choice["text"]) == text
        assert choice["stop_reason"] == reason
        chunks = chunks_of(await server.post(path, **question | changes, stream=True))
        assert text_of(chunks) == text
        told = [each for chunk in chunks for each in chunk["choices"] if "stop_reason" in each]
        assert [(each["finish_reason"], each["stop_reason"]) for each in told] == [(choice["finish_reason"], reason)]


async def test_token_ids_are_returned_when_they_are_asked_for(server):
    tokens = [token for step in server.scheduler.steps for token in step]
    whole = (await server.complete(prompt=[5, 6], return_token_ids=True)).json()["choices"][0]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == ([5, 6], tokens)
    chunks = chunks_of(await server.chat(return_token_ids=True, stream=True))
    assert [id_ for chunk in chunks for each in chunk["choices"] for id_ in each["token_ids"]] == tokens
    assert len(chunks[0]["choices"][0]["prompt_token_ids"]) == len("<user>hi")


async def test_logprobs_of_a_chat_are_entries_of_tokens_with_their_bytes(server):
    server.answers("ö", "k")
    choice = (await server.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries] == [[0xC3], [0xB6], [ord("k")]]
    assert [entry["token"] for entry in entries] == ["\ufffd", "\ufffd", "k"]
    assert {entry["logprob"] for entry in entries} == {-9999.0}, "JSON has no infinity"
    likely = [each["logprob"] for each in entries[0]["top_logprobs"]]
    assert likely == [-1.0, -2.0]
    chunks = chunks_of(await server.chat(logprobs=True, top_logprobs=2, stream=True))
    streamed = [each["choices"][0]["logprobs"] for each in chunks]
    assert [entry for each in streamed if each for entry in each["content"]] == entries
    alone = (await server.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in alone] == [[], [], []]


async def test_logprobs_of_a_completion_are_four_lists_with_a_place_for_each_token(server):
    server.answers("ab", "c")
    found = (await server.complete(logprobs=1)).json()["choices"][0]["logprobs"]
    assert (found["tokens"], found["text_offset"]) == (["a", "b", "c"], [0, 1, 2])
    assert found["token_logprobs"] == [-9999.0] * 3
    assert [set(each) for each in found["top_logprobs"]] == [{server.tokenizer.decode([3]), token} for token in "abc"]
    streamed: dict[str, list] = {name: [] for name in found}
    for chunk in chunks_of(await server.complete(logprobs=1, stream=True)):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == found
    assert (await server.complete(logprobs=None)).json()["choices"][0]["logprobs"] is None


async def test_tokens_of_one_character_have_one_offset_in_the_text(server):
    server.answers("a𝄞b", "é", "c")
    choice = (await server.complete(logprobs=1)).json()["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) > len(choice["text"]), "characters are of several tokens here"
    expected = [place for place, each in enumerate("a𝄞béc") for _ in server.tokenizer.encode(each)]
    assert found["text_offset"] == expected


@pytest.mark.parametrize("prompt", ["hi", "hi<eos>", [TOKEN_OF_EOS, 0]])
@pytest.mark.parametrize("shows_special", [False, True])
async def test_offsets_are_those_in_the_text_with_special_tokens_only_where_these_are_shown(
    server, prompt, shows_special
):
    eos = server.tokenizer.decode([TOKEN_OF_EOS])
    prompt = prompt.replace("<eos>", eos) if isinstance(prompt, str) else prompt
    server.answers("a", eos, "bc", eos)
    body = {"prompt": prompt, "skip_special_tokens": not shows_special, "logprobs": 1, "echo": True}
    choice = (await server.complete(**body)).json()["choices"][0]
    assert choice["text"].endswith(f"a{eos}bc{eos}" if shows_special else "abc")
    found = choice["logprobs"]
    ends = [*found["text_offset"][1:], len(choice["text"])]
    spelt = [choice["text"][begin:end] for begin, end in zip(found["text_offset"], ends, strict=True)]
    num_prompt = len(found["tokens"]) - 5
    shown = [*found["tokens"][:num_prompt], "a", eos * shows_special, "b", "c", eos * shows_special]
    assert spelt == shown


def test_a_special_token_that_was_added_to_a_prompt_has_no_place_in_its_text(server):
    names = TokenNames(server.tokenizer)
    token_ids = [TOKEN_OF_EOS, *server.tokenizer.encode("hi", add_special_tokens=False), TOKEN_OF_EOS]
    for echoed, offsets in (("hi", [0, 0, 1, 2]), ("hi" + names.text_of(TOKEN_OF_EOS), [0, 0, 1, 2])):
        logprobs = CompletionLogprobs(names, echoed)
        assert logprobs.add(token_ids, [None] * 4, num_prompt=4)["text_offset"] == offsets
        assert logprobs.add(token_ids[1:2], [None])["text_offset"] == [len(echoed)]


def test_offsets_are_those_in_the_text_of_a_tokenizer_that_writes_spaces_before_words():
    vocab = {"<unk>": 0, "▁one": 1, "▁two": 2}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    model.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    found = CompletionLogprobs(TokenNames(tokenizer), "one two").add([1, 2, 1, 2], [None] * 4, num_prompt=2)
    assert found["text_offset"] == [0, 3, 7, 10]


@pytest.mark.parametrize("max_tokens", [0, 1, 16])
async def test_echo_with_logprobs_begins_with_those_of_the_prompt(server, max_tokens):
    body = {"prompt": "hi ", "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    answer = (await server.complete(**body)).json()
    (choice,) = answer["choices"]
    num_output = answer["usage"]["completion_tokens"]
    assert (num_output > 0) == (max_tokens > 0)
    assert choice["text"].startswith("hi ")
    assert (choice["text"] == "hi ") == (max_tokens == 0)
    found = choice["logprobs"]
    assert found["tokens"][:3] == list("hi ")
    assert found["token_logprobs"] == [None, -2.0, -3.0, *[-9999.0] * num_output]
    assert found["top_logprobs"][:3] == [None, {"i": -2.0}, {" ": -3.0}]
    assert {len(each) for each in found.values()} == {3 + num_output}
    assert found["text_offset"][:3] == [0, 1, 2]
    streamed = chunks_of(await server.complete(**body, stream=True))
    assert text_of(streamed) == choice["text"]
    joined: dict[str, list[Any]] = {name: [] for name in found}
    for chunk in streamed:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined == found


async def test_prompt_logprobs_are_of_each_token_of_the_prompt(server):
    answer = (await server.complete(prompt=["hi", "a"], prompt_logprobs=0)).json()
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert first == [None, {str(server.tokenizer.encode("i")[0]): {"logprob": -2.0, "decoded_token": "i"}}]
    assert second == [None]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]


@pytest.mark.parametrize("n", [1, 2])
async def test_prompt_logprobs_of_a_chat_are_told_once_beside_its_choices(server, n):
    name = str(server.tokenizer.encode("i")[0])
    answer = (await server.chat(prompt_logprobs=0, n=n)).json()
    first, *others = answer["prompt_logprobs"]
    assert (first, len(others)) == (None, len("user>hi"))
    assert others[-1] == {name: {"logprob": -1.0 - len("user>hi"), "decoded_token": "i"}}
    chunks = chunks_of(await server.chat(prompt_logprobs=0, n=n, stream=True))
    assert [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk] == [[None, *others]]
    assert text_of(chunks) == "Hello wörld"
    assert "prompt_logprobs" not in (await server.chat(n=n)).json()


async def test_echo_repeats_the_prompt_as_text(server):
    answer = (await server.complete(prompt=["hi ", server.tokenizer.encode("ho ")], echo=True)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["hi Hello wörld", "ho Hello wörld"]
    assert text_of(chunks_of(await server.complete(prompt="hi ", echo=True, stream=True))) == "hi Hello wörld"
    several = (await server.complete(prompt=["a", "b"], n=2, echo=True, max_tokens=1)).json()["choices"]
    assert [(each["index"], each["text"]) for each in several] == [(0, "aH"), (1, "aH"), (2, "bH"), (3, "bH")]


async def test_special_tokens_are_shown_only_if_they_are_asked_for(server):
    server.scheduler.steps.append([TOKEN_OF_EOS])
    assert (await server.complete()).json()["choices"][0]["text"] == "Hello wörld"
    shown = await server.complete(skip_special_tokens=False)
    assert shown.json()["choices"][0]["text"] == "Hello wörld</s>"


async def test_messages_have_parts_older_tool_calls_and_whichever_role(server):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]
    assert (await server.chat(messages=messages)).status_code == 200
    ((prompt, _),) = server.scheduler.asked
    assert server.tokenizer.decode(prompt) == "<system>be brief<user>ab<assistant><tool>5"


async def test_templates_are_given_what_the_request_or_the_server_says(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")), default_chat_template_kwargs={"suffix": "!"})
    server.answers("a")
    await server.chat()
    await server.chat(chat_template_kwargs={"suffix": "?"})
    texts = [server.tokenizer.decode(prompt) for prompt, _ in server.scheduler.asked]
    assert texts == ["<user>hi!", "<user>hi?"]


async def test_models_have_cards_by_each_of_their_names(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")), served_model_names=["a/b", "c"])
    server.answers("a")
    listed = (await server.client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["a/b", "c"]
    assert (listed[0]["root"], listed[0]["max_model_len"], listed[0]["parent"]) == ("/models/small", 512, None)
    assert (await server.client.get("/v1/models/a/b")).json() == listed[0]
    assert (await server.chat(model="c")).json()["model"] == "c"
    assert (await server.chat()).json()["model"] == "a/b"
    assert (await server.post("/tokenize", model=listed[0]["root"], prompt="a")).status_code == 200


async def test_texts_and_messages_become_tokens_and_tokens_text(server):
    whole = (await server.post("/tokenize", prompt="hi", return_token_strs=True)).json()
    assert whole == {
        "count": 2,
        "max_model_len": 512,
        "tokens": server.tokenizer.encode("hi"),
        "token_strs": ["h", "i"],
    }
    messages = [{"role": "user", "content": "hi"}]
    assert (await server.post("/tokenize", messages=messages)).json()["count"] == len("<user>hi")
    text = (await server.post("/detokenize", tokens=whole["tokens"])).json()
    assert text == {"prompt": "hi", "text": "hi"}
    info = (await server.client.get("/tokenizer_info")).json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("</s>", "<s>", None)
    assert (info["tokenizer_class"], info["chat_template"]) == (type(server.tokenizer).__name__, TEMPLATE)
    assert info["model_max_length"] == 512, "of the model, whose tokenizer could do more"
    server.tokenizer.model_max_length = 100
    assert (await server.client.get("/tokenizer_info")).json()["model_max_length"] == 100


async def test_what_is_wrong_with_texts_and_tokens_is_named(server):
    for body in ({}, {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}):
        response = await server.post("/tokenize", **body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "prompt")
        assert error["message"] == "prompt, messages: expected one of the two"
    for path, given in (("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [319]})):
        response = await server.post(path, **given, odd=1)
        assert (response.status_code, response.headers["x-hbserve-ignored"]) == (200, "odd")
        assert (await server.post(path, **given, model="other")).status_code == 404


async def test_tokens_by_another_chat_template_are_refused_and_not_those_of_the_models(server):
    body = {"messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ messages }}"}
    response = await server.post("/tokenize", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")


async def test_probes_answer_and_health_says_what_is_missing(server):
    for path in ("/health", "/ping", "/version", "/openapi.json", "/"):
        assert (await server.client.get(path)).status_code == 200, path
    assert (await server.client.get("/version")).json() == {"version": version("hbserve-compat")}
    described = (await server.client.get("/openapi.json")).json()["components"]["schemas"]
    assert described["ChatBody"]["properties"]["echo"]["description"] == "Not served; may be null or one of [False]."
    server.scheduler.role = "prefill"
    response = await server.client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "there is no decode instance"
    server.scheduler.status = "lost"
    down = (await server.client.get("/health")).json()["error"]
    assert (down["message"], down["code"]) == ("h0 is lost, there is no decode instance", "not_ready")
    server.scheduler.status = "ready"
    server.scheduler.role = "decode"
    assert (await server.client.get("/health")).status_code == 200, "as long as requests are served"
    server.service.model = None
    assert (await server.client.get("/ping")).status_code == 200
    starting = await server.chat()
    assert (starting.status_code, starting.headers["retry-after"]) == (503, "1")
    assert starting.json()["error"]["message"] == "the model is being loaded"


HI, LONG = [{"role": "user", "content": "hi"}], "long " * 1000
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": LONG})}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": LONG}),
        ("/v1/completions", {"prompt": [LONG[:50]] * 40}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        (
            "/tokenize",
            {"messages": HI, "tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]},
        ),
        ("/tokenize", {"messages": [{"role": "assistant", "tool_calls": [CALL]}]}),
    ],
    ids=["a text", "many texts", "a message", "tools", "calls"],
)
async def test_long_prompts_are_encoded_beside_the_event_loop(server, path, body):
    encoder = server.service.require_model().encoder
    assert (await server.post("/tokenize", prompt="short")).status_code == 200
    assert (await server.complete(prompt=["short", "too"])).status_code == 200
    assert not encoder._thread._threads
    await server.post(path, **body)
    assert encoder._thread._threads, "it was encoded here"


async def test_others_go_on_between_the_prompts_of_one_request(server, monkeypatch):
    num_turns, seen = 0, list[int]()

    async def turn() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    def noted(request: GenerateRequest) -> Any:
        seen.append(num_turns)
        return FakeScheduler.submit(server.scheduler, request)

    monkeypatch.setattr(server.scheduler, "submit", noted)
    turning = asyncio.create_task(turn())
    assert (await server.complete(prompt=[[7], [8], [9]])).status_code == 200
    turning.cancel()
    assert len(set(seen)) == 3


GENERATION = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 7, "do_sample": True, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, (0.6, 20, 0.95, 7)), ({"generation_config": "none"}, (1.0, -1, 0.95, 16))]
)
async def test_what_a_request_does_not_say_is_the_models_own_unless_that_is_switched_off(
    small_model, tmp_path, settings, expected
):
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    server = FakeServer(load_tokenizer(small_model("qwen3")), tmp_path, **settings)
    server.answers("Hel")
    await server.complete(top_p=0.95)
    params = server.scheduler.asked[-1][1]
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == expected
    await server.complete(temperature=0, max_tokens=9)
    params = server.scheduler.asked[-1][1]
    assert (params.temperature, params.max_tokens) == (0, 9)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, None], ids=["cut off", "a list", "too deep", "a folder"])
def test_a_file_of_defaults_that_cannot_be_read_is_said(tmp_path, content, caplog):
    path = tmp_path / "generation_config.json"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    assert model_defaults(tmp_path) == {}
    assert "its sampling defaults are not used" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("top_p", 7), ("top_k", 2.5), ("min_p", -1), ("max_new_tokens", 0), ("top_p", [0.5])],
)
def test_of_the_models_defaults_one_that_cannot_be_is_named_and_the_others_are_used(tmp_path, name, value, caplog):
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION | {"top_p": 0.9} | {name: value}))
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "max_tokens": 7}
    expected.pop("max_tokens" if name == "max_new_tokens" else name, None)
    assert model_defaults(tmp_path) == expected
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"generation_config.json: its {name} is not used as a default: " in line
    assert "expected" in line


class FullAtFirst(FakeScheduler):
    """A remote scheduler, which refuses when the stream is read, and has room a moment later."""

    num_refusals = 3

    async def wait_for_room(self, priority: int = 0) -> None: ...

    def submit(self, request: GenerateRequest) -> Any:
        if self.num_refusals and len(request.prompt_token_ids) == 2:
            self.num_refusals -= 1
            return Refusal()
        return super().submit(request)


class Refusal:
    async def __aiter__(self) -> AsyncIterator[Any]:
        raise Overloaded("full", 0.01)
        yield

    async def aclose(self) -> None: ...


async def test_who_wants_many_answers_is_not_refused_but_waits_and_gets_them_in_order(server):
    scheduler = FullAtFirst()
    scheduler.steps = server.scheduler.steps
    params = [SamplingParams(max_tokens=5 + number) for number in range(3)]
    results = await answer_all(scheduler, server.tokenizer, [[7], [7, 8], [7, 8, 9]], params, [None] * 3, lambda: None)
    assert [len(each["token_ids"]) for each in results] == [5, 6, 7]
    assert scheduler.num_refusals == 0
    assert not scheduler.running
