"""Programs from PyPI that people point at `hbserve serve`: those of the dependency group `clients`.

`uv sync` does not install them, and without them these tests are skipped. .ci/run runs them in a leg of its own, by
`make clients`. Each test runs over both transfer backends.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hbserve_served import Served, served

openai = pytest.importorskip("openai", reason="needs the dependency group clients")
from openai.types import Completion, Model  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402

HERE = Path(__file__).resolve().parent
NAME = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"max_tokens": 12, "temperature": 0}
ANSWER = "The capital of France is Paris."


# Each backend has its server, and a process of pytest for itself.
@pytest.fixture(
    scope="module", params=[pytest.param(each, marks=pytest.mark.xdist_group(each)) for each in ("nccl", "mooncake")]
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served"), kv_transfer={"backend": request.param}) as server:
        assert server.url
        yield server
        server.until_empty()


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ---- openai ------------------------------------------------------------------------------------------------------


def test_openai_lists_models_and_chats_whole_and_streamed(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == NAME
    answer = client.chat.completions.create(model=NAME, messages=QUESTION, **GREEDY)
    assert answer.choices[0].message.content == ANSWER
    assert answer._request_id == answer.id.removeprefix("chatcmpl-")
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=NAME, messages=QUESTION, stream=True, stream_options=options, **GREEDY)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the same prompt was answered before"


def test_openai_completes_batches_of_text_and_ids(client):
    whole = client.completions.create(model=NAME, prompt=["Once upon", [504, 506]], n=2, echo=True, **GREEDY)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text.startswith("Once upon")
    streamed = client.completions.create(model=NAME, prompt="Once upon", stream=True, **GREEDY)
    assert "Once upon" + "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_openai_raises_the_errors_that_it_has_for_what_is_refused(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=QUESTION, extra_body={"guided_regex": "a"})
    assert refused.value.param == "guided_regex"
    schema: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match=r"response_format\.json_schema\.schema: Unimpl") as refused:
        client.chat.completions.create(model=NAME, messages=QUESTION, response_format=schema)
    assert refused.value.param == "response_format"


def test_openai_makes_responses_whole_and_streamed(client):
    settings = {"model": NAME, "input": QUESTION[0]["content"], "max_output_tokens": 12, "temperature": 0}
    answer = client.responses.create(**settings)
    assert (answer.output_text, answer.status) == (ANSWER, "completed")
    with client.responses.stream(**settings) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == ANSWER
        streamed = stream.get_final_response()
    assert streamed.output_text == ANSWER
    assert streamed.usage.input_tokens_details.cached_tokens > 0, "the same prompt was answered before"
    counted = client.responses.input_tokens.count(model=NAME, input=settings["input"])
    assert counted.input_tokens == answer.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="previous_response_id") as refused:
        client.responses.create(**settings, previous_response_id=answer.id)
    assert refused.value.param == "previous_response_id"


def test_anthropic_makes_messages_whole_and_streamed_and_counts_tokens(server):
    anthropic = pytest.importorskip("anthropic")
    # This client does not know the temperature any more; the API does.
    settings = {"model": NAME, "messages": QUESTION, "max_tokens": 12, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(**settings)
        assert (answer.content[0].text, answer.stop_reason) == (ANSWER, "end_turn")
        with client.messages.stream(**settings) as stream:
            assert "".join(stream.text_stream) == ANSWER
            usage = stream.get_final_message().usage
        assert usage.cache_read_input_tokens > 0, "the same prompt was answered before"
        counted = client.messages.count_tokens(model=NAME, messages=QUESTION)
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
        stopped = client.messages.create(**settings, stop_sequences=[" of"])
        assert (stopped.content[0].text, stopped.stop_sequence) == ("The capital", " of")
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            client.messages.create(**settings | {"model": "other"})


BODIES = {
    "a chat": ("/v1/chat/completions", {"messages": QUESTION, "n": 2, **GREEDY}),
    "a chat with token ids": ("/v1/chat/completions", {"messages": QUESTION, "return_token_ids": True, **GREEDY}),
    "a chat with logprobs": (
        "/v1/chat/completions",
        {"messages": QUESTION, "logprobs": True, "top_logprobs": 3, **GREEDY},
    ),
    "a chat with what is known of its prompt": (
        "/v1/chat/completions",
        {"messages": QUESTION, "prompt_logprobs": 1, **GREEDY},
    ),
    "a completion with logprobs": ("/v1/completions", {"prompt": "Once", "logprobs": 2, **GREEDY}),
    "a completion": ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "echo": True, **GREEDY}),
}


@pytest.mark.parametrize("case", BODIES)
def test_every_answer_is_what_the_types_of_openai_say(server, case):
    path, body = BODIES[case]
    whole, part = (ChatCompletion, ChatCompletionChunk) if "chat" in path else (Completion, Completion)
    whole.model_validate(httpx.post(server.url + path, json=body, timeout=60).json(), strict=True)
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = httpx.post(server.url + path, json=body | {"stream": True, "stream_options": options}, timeout=60)
    events = [event.removeprefix("data: ") for event in streamed.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    for chunk in map(json.loads, events[:-2]):
        for choice in chunk["choices"]:
            # OpenAI streams null until the last chunk; its type of a completion does not say so.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        part.model_validate(chunk, strict=True)
    for model in httpx.get(f"{server.url}/v1/models").json()["data"]:
        Model.model_validate(model, strict=True)


BLOCKS = [
    block
    for page in ("README.md", "docs/openai-server.md")
    for block in re.findall(r"```python\n(.*?)```", (HERE.parent.parent / page).read_text(), re.S)
    if block.startswith(("from openai", "from anthropic"))
]


@pytest.mark.parametrize("number", range(3))
def test_a_block_of_a_page_that_uses_a_client_runs(server, capsys, number):
    exec(BLOCKS[number].replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.rstrip("\n") == ANSWER
    assert len(BLOCKS) == 3


# ---- others ------------------------------------------------------------------------------------------------------


def test_langchain_chats_streams_and_completes(server):
    from langchain_openai import ChatOpenAI, OpenAI

    settings: Any = {"model": NAME, "base_url": f"{server.url}/v1", "api_key": "none", **GREEDY}
    chat = ChatOpenAI(**settings)
    assert chat.invoke("What is the capital of France?").content == ANSWER
    assert "".join(str(chunk.content) for chunk in chat.stream("What is the capital of France?")) == ANSWER
    assert OpenAI(**settings).invoke("Once upon")


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_litellm_chats_and_streams(server, provider, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    settings = {"api_base": f"{server.url}/v1", "api_key": "none", "messages": QUESTION, **GREEDY}
    answer = litellm.completion(f"{provider}/{NAME}", **settings)
    assert answer.choices[0].message.content == ANSWER
    chunks = litellm.completion(f"{provider}/{NAME}", stream=True, **settings)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


def run(*command: str | Path, **environment: str) -> str:
    words, env = [str(word) for word in command], os.environ | environment
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=env, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lm_eval(server: Served, folder: Path, name: str, *options: str | Path, **settings: str | Path) -> str:
    # Tasks name their files by the current folder, and the hub is not asked for anything.
    for file in (*HERE.glob("*.yaml"), *HERE.glob("*.jsonl")):
        shutil.copy(file, folder)
    task = (folder / f"{name}.yaml").read_text().replace("questions.jsonl", str(folder / "questions.jsonl"))
    (folder / f"{name}.yaml").write_text(task)
    settings = {"model": NAME, "base_url": f"{server.url}/v1/completions", "num_concurrent": "2", **settings}
    return run(
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
        ",".join(f"{key}={value}" for key, value in settings.items()), "--tasks", name, "--include_path", folder,
        *options, HF_HUB_OFFLINE="1", HF_HOME=str(folder), OPENAI_API_KEY="none",
    )  # fmt: skip


def test_lm_eval_generates(server, tmp_path):
    assert "exact_match" in lm_eval(server, tmp_path, "hbserve_gen")


def test_lm_eval_has_the_log_likelihoods_of_transformers(server, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hbserve.models.demo_model import demo_model_path

    folder = demo_model_path()
    lm_eval(server, tmp_path, "hbserve_mc", "--log_samples", "--output_path", tmp_path / "out", tokenizer=folder)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_compared = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        context = f"{sample['doc']['question']}\nAnswer:"
        num_context = len(tokenizer(context).input_ids)
        for choice, (found, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            ids = torch.tensor([tokenizer(f"{context} {choice}").input_ids])
            with torch.inference_mode():
                logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            of_tokens = logprobs.gather(1, ids[0, 1:, None])[num_context - 1 :, 0]
            assert float(found) == pytest.approx(float(of_tokens.sum()), abs=1e-4), (context, choice)
            num_compared += 1
    assert num_compared >= 4


def test_inspect_evaluates(server, tmp_path):
    out = run(
        Path(sys.executable).parent / "inspect", "eval", "inspect_task.py", "--model",
        f"openai-api/hbserve/{NAME}", "--display", "plain", "--log-dir", tmp_path,
        HBSERVE_BASE_URL=f"{server.url}/v1", HBSERVE_API_KEY="none",
    )  # fmt: skip
    assert "accuracy" in out
