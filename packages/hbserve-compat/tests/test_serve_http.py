"""`hbserve serve` over HTTP, with real instances: it returns the same text as an LLM, and ends in order."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hbserve_served import Served, served, until
from hbserve_traces import check_trace, read_trace

from hbserve import LLM, SamplingParams
from hbserve.models.demo_model import demo_model_path
from hbserve_testing.processes import processor_time_s
from hbserve_testing.small_models import write_small_model

pytestmark = pytest.mark.warm
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
NUM_TOKENS = 12
NEUTRAL = {
    "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": {}, "min_p": 0, "top_p": 1,
    "min_tokens": 0, "top_k": -1, "seed": None, "stop": [], "stop_token_ids": [], "ignore_eos": False, "n": 1,
    "include_stop_str_in_output": False, "best_of": None, "logprobs": None, "stream_options": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random model with the tokenizer and template of the demo model, which is twenty times as large
    and no better for what is tested here."""
    folder = tmp_path_factory.mktemp("model")
    write_small_model(folder, "llama", vocab_size=49152, max_position_embeddings=8192)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(demo_model_path() / name, folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the model, with separate prefill and decode instances."""
    with served(tmp_path_factory.mktemp("served"), model={"path": str(model)}) as server:
        assert server.url
        yield server


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Any]:
    """Greedy answers of an LLM in this process, to the question as a prompt and as a message."""
    with LLM(model, num_kvcache_blocks=64) as llm:
        chat = llm.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
        prompts = [QUESTION[0]["content"], chat]
        params = SamplingParams(0, NUM_TOKENS, logprobs=2, prompt_logprobs=2)
        answers = llm.generate(prompts, params, use_tqdm=False)
    logprobs = [list(each.values())[:2] for each in answers[1]["logprobs"]]
    of_prompt = [list(each.values())[:2] for each in answers[0]["prompt_logprobs"][1:]]
    return {
        "/v1/completions": answers[0]["text"], "/v1/chat/completions": answers[1]["text"],
        "logprobs": logprobs, "prompt_logprobs": of_prompt,
    }  # fmt: skip


def ask(server: Served, path: str, **body: Any) -> list[str]:
    """Send a request, and return the texts of the greedy answer's choices."""
    question = {"messages": QUESTION} if "chat" in path else {"prompt": QUESTION[0]["content"]}
    # An LLM shows special tokens, as nano-vllm does.
    body = {"temperature": 0, "max_tokens": NUM_TOKENS, "skip_special_tokens": False, **question, **body}
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as response:
        response.read()
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return [each["message"]["content"] if "chat" in path else each["text"] for each in response.json()["choices"]]
    texts: dict[int, str] = {}
    for event in response.text.split("\n\n")[:-2]:
        for each in json.loads(event.removeprefix("data: "))["choices"]:
            new = each["delta"].get("content", "") if "chat" in path else each["text"]
            texts[each["index"]] = texts.get(each["index"], "") + new
    return [texts[index] for index in sorted(texts)]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_greedy_text_is_that_of_an_llm_whole_and_streamed_once_and_four_times(server, expected, path, stream):
    assert ask(server, path, stream=stream) == [expected[path]]
    assert ask(server, path, stream=stream, **NEUTRAL) == [expected[path]]
    assert ask(server, path, stream=stream, **NEUTRAL | {"n": 4}) == [expected[path]] * 4
    server.until_empty()


def test_it_says_that_it_serves_when_all_instances_are_ready(server):
    assert server.url
    log = server.log.read_text()
    (served,) = re.findall(r"^.*INFO hbserve\.commands\.serve: serving .* on [\d.]+:\d+$", log, re.MULTILINE)
    before, _, after = log.partition(served)
    assert len(re.findall(r"INFO hbserve_scheduler\.instances: \S+ at \S+ is ready", before)) == 2
    assert "OpenAI's API at" in after


def test_logprobs_over_http_are_those_of_an_llm(server, expected):
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": NUM_TOKENS, "logprobs": True, "top_logprobs": 2}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    found = [[each["logprob"] for each in entry["top_logprobs"]] for entry in entries]
    assert len(found) == answer["usage"]["completion_tokens"]
    for place, (each, there) in enumerate(zip(found, expected["logprobs"], strict=True)):
        assert each == pytest.approx(there, abs=1e-4), place
        assert entries[place]["logprob"] == each[0], "greedy: the most likely one"


@pytest.mark.parametrize("max_tokens", [0, 1, 16])
def test_echo_with_logprobs_has_those_of_the_prompt_although_its_kv_moves(server, expected, max_tokens):
    body = {"prompt": QUESTION[0]["content"], "temperature": 0, "ignore_eos": True}
    body |= {"echo": True, "logprobs": 2, "max_tokens": max_tokens}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    found, usage = answer["choices"][0]["logprobs"]["top_logprobs"], answer["usage"]
    assert found[0] is None
    assert len(found) == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == max_tokens
    for place, there in enumerate(expected["prompt_logprobs"]):
        likely = sorted(found[1 + place].values(), reverse=True)[:2]
        assert likely == pytest.approx(there, abs=1e-4), place
    if max_tokens == 16:
        assert answer["metrics"]["kv_bytes"] > 0


def test_clients_of_the_rpc_are_served_beside_those_of_http(server, expected):
    command = [sys.executable, "-m", "hbserve", "generate", QUESTION[0]["content"], "--connect", server.rpc_address]
    done = subprocess.run([*command, f"--max-tokens={NUM_TOKENS}"], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected["/v1/chat/completions"].removesuffix("<|im_end|>") + "\n"


def test_its_figures_are_shown_in_a_terminal_and_to_programs(server):
    command = [sys.executable, "-m", "hbserve", "stats", "--connect", server.rpc_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"requests: 0 waiting, 0 running; \d+ completed, 0 failed, \d+ aborted, .*", lines[0])
    assert any(re.fullmatch(r"TTFT: p50 <= [\d.]+ ms, p90 .* ms, p99 .*", line) for line in lines)
    assert [line.split()[:3] for line in lines[-2:]] == [
        ["prefill-0", "prefill", "ready"],
        ["decode-0", "decode", "ready"],
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=90)
    found = json.loads(done.stdout)
    assert found["output_tokens"] == server.metrics()["hbserve:generation_tokens_total"] > 0
    assert found["histograms"]["e2e_request_latency_seconds"]["total"] > 0
    assert server.log.read_text().count(" INFO hbserve_scheduler.figures: request ") == sum(
        found["ended_requests"].values()
    )


def test_its_last_requests_are_shown_as_a_timeline(server, tmp_path):
    body = {"prompt": "word " * 300, "max_tokens": 5, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    slices = check_trace(read_trace(httpx.get(f"{server.url}/debug/trace?last_s=600").content))
    last = max(slices["decode-0"], key=lambda each: each["ts"] if each["name"].startswith("decode ") else 0)
    request_id = last["name"].removeprefix("decode ")
    command = [sys.executable, "-m", "hbserve", "trace", "--connect", server.rpc_address, "-o", tmp_path / "t.json.gz"]
    done = subprocess.run([*command, "--request", request_id], capture_output=True, text=True, timeout=90)
    assert done.stderr == f"1 requests in {tmp_path / 't.json.gz'}; ui.perfetto.dev opens it\n"
    alone = check_trace(read_trace((tmp_path / "t.json.gz").read_bytes()))
    names = {process: [each["name"].split()[0] for each in found] for process, found in alone.items()}
    assert names["decode-0"] == ["reserve", "wait", "decode"]
    assert names["prefill-0"][0] == "prefill"
    assert set(names["prefill-0"][1:]) == {"chunk"}
    assert names["prefill-0 KV"][0] == "KV"
    assert {each["name"].split()[-1] for each in alone["prefill-0 KV"][1:]} == {"blocks"}
    done = subprocess.run([*command, "--request", "nobody's"], capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    assert "has no record of it" in done.stderr


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_follows_its_schema_and_what_cannot_be_followed_is_a_400(server: Served, path: str) -> None:
    """The grammar is applied to a real tokenizer, whose tokens are words and more."""
    cities = {"type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"],
              "additionalProperties": False}  # fmt: skip
    for streamed in (False, True):
        texts = ask(server, path, structured_outputs={"json": cities}, max_tokens=100, stream=streamed, n=2)
        assert len(texts) == 2
        for text in texts:
            answer = json.loads(text.removesuffix("<|im_end|>").removesuffix("<|endoftext|>"))
            assert answer in ({"capital": "Paris"}, {"capital": "Rome"})
    asked = {"name": "it", "schema": {"not": {"type": "string"}}}
    question = {"messages": QUESTION} if "chat" in path else {"prompt": "hi"}
    body = question | {"response_format": {"type": "json_schema", "json_schema": asked}}
    error = httpx.post(server.url + path, json=body, timeout=60)
    assert (error.status_code, error.json()["error"]["param"]) == (400, "response_format")
    assert 'response_format.json_schema.schema: Unimplemented keys: ["not"]' in error.json()["error"]["message"]


def test_clients_that_go_away_while_their_answers_come_leave_nothing(server):
    # Known elsewhere: vLLM #50425.
    body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True, "n": 3}
    for num_chunks in (0, 1, 5):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            chunks = response.iter_raw()
            for _ in range(num_chunks):
                next(chunks)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body | {"stream": False}, timeout=0.5)
    server.until_empty()


def test_it_tells_at_once_that_it_starts_and_in_three_lines_what_runs_and_how_to_ask_it(tmp_path):
    """Uses the demo model, which is served if no other is given."""
    with served(tmp_path) as server:
        url = server.url
        lines = server.log.read_text().splitlines()
        assert lines[0] == "hbserve: starting prefill-0, decode-0"
        (place,) = [number for number, line in enumerate(lines) if line.startswith("OpenAI's API at ")]
        what, where, how = lines[place - 1 : place + 2]
        name = "SmolLM2-135M-Instruct"
        assert what.startswith(f"{name}: prefill-0 on cpu, decode-0 on cpu; KV over nccl; RPC at 127.0.0.1:")
        assert where.startswith(f"OpenAI's API at {url}/v1, model '{name}'")
        done = subprocess.run(["sh", "-c", how], capture_output=True, text=True, timeout=60)
        assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_an_address_in_use_is_one_line_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "hbserve", "serve", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    *_, error = done.stderr.splitlines()
    assert error.startswith(f"error: 127.0.0.1:{port} is in use: give another server.port or --port")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.cold
def test_a_sign_of_life_comes_within_two_seconds(tmp_path):
    """Two seconds of its own processor time, so that other processes do not count."""
    command = [sys.executable, "-m", "hbserve", "serve", "--model", str(tmp_path / "nowhere"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        took_s = processor_time_s(process.pid)
        rest = process.communicate(timeout=60)[1]
    assert line == "hbserve: starting prefill-0, decode-0\n"
    assert 0 < took_s < 2
    assert "nowhere' does not exist" in rest


@pytest.fixture
def small(tmp_path: Path, small_model: Any) -> Iterator[Served]:
    with served(tmp_path, "--drain-timeout=300", model={"path": str(small_model("qwen3"))}) as server:
        assert server.url
        yield server


def test_sigterm_lets_answers_that_have_begun_end_and_refuses_others(small):
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    url = small.url
    with httpx.Client() as other, httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        assert other.get(f"{url}/health").status_code == 200
        events = response.iter_lines()
        next(events)
        small.process.send_signal(signal.SIGTERM)
        until(lambda: other.get(f"{url}/health").status_code == 503)
        refused = other.post(f"{url}/v1/completions", json=body)
        rest = [line for line in events if line]
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is ending")
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert small.process.wait(timeout=60) == 0


def test_a_second_signal_ends_answers_at_once(small):
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "n": 64}
    failed: list[int | type[httpx.HTTPError]] = []

    def ask() -> None:
        try:
            failed.append(httpx.post(f"{small.url}/v1/completions", json=body, timeout=60).status_code)
        except httpx.HTTPError as error:
            failed.append(type(error))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: small.metrics()["hbserve:num_requests_running"] > 0)
    small.process.send_signal(signal.SIGTERM)
    small.found("(answers are still on their way)")
    small.process.send_signal(signal.SIGTERM)
    assert small.process.wait(timeout=60) == 0
    asking.join()
    assert failed != [200]
