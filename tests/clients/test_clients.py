"""Programs that people point at `hbserve serve`, as they come from PyPI: the dependency group `clients`.

`uv sync` does not install them, and without them these tests are skipped; .ci/run has a leg of its own for them:
`make clients`. Each runs over both transfer backends.
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


@pytest.fixture(scope="module", params=["nccl", "mooncake"])
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


BODIES = {
    "a chat": ("/v1/chat/completions", {"messages": QUESTION, "n": 2, **GREEDY}),
    "a chat with token ids": ("/v1/chat/completions", {"messages": QUESTION, "return_token_ids": True, **GREEDY}),
    "a chat with logprobs": (
        "/v1/chat/completions",
        {"messages": QUESTION, "logprobs": True, "top_logprobs": 3, **GREEDY},
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


def test_the_block_of_the_readme_runs(server, capsys):
    (block,) = re.findall(r"```python\n(from openai.*?)```", (HERE.parent.parent / "README.md").read_text(), re.S)
    exec(block.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out == f"{ANSWER}\n"


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


def test_lm_eval_generates(server, tmp_path):
    # Tasks name their files by the current folder, and the hub is not asked for anything.
    for file in (*HERE.glob("*.yaml"), *HERE.glob("*.jsonl")):
        shutil.copy(file, tmp_path)
    task = (tmp_path / "hbserve_gen.yaml").read_text().replace("questions.jsonl", str(tmp_path / "questions.jsonl"))
    (tmp_path / "hbserve_gen.yaml").write_text(task)
    arguments = f"model={NAME},base_url={server.url}/v1/completions,num_concurrent=2"
    out = run(
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
        "--tasks", "hbserve_gen", "--include_path", tmp_path,
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), OPENAI_API_KEY="none",
    )  # fmt: skip
    assert "exact_match" in out


def test_inspect_evaluates(server, tmp_path):
    out = run(
        Path(sys.executable).parent / "inspect", "eval", "inspect_task.py", "--model",
        f"openai-api/hbserve/{NAME}", "--display", "plain", "--log-dir", tmp_path,
        HBSERVE_BASE_URL=f"{server.url}/v1", HBSERVE_API_KEY="none",
    )  # fmt: skip
    assert "accuracy" in out
