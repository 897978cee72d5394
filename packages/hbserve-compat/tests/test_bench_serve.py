"""`hbserve bench serve`: what it sends, when, and which figures it computes from the answers."""

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hbserve_fake_scheduler import FakeServer
from typer.testing import CliRunner

from hbserve.__main__ import app
from hbserve.client.http_stream import HttpClient
from hbserve.load import prompts
from hbserve.load.args import Backend, BenchServeArgs, CompareArgs, Dataset
from hbserve.load.arrivals import arrival_times
from hbserve.load.asking import AnswerReader, Outcome
from hbserve.load.bench_serve import bench_serve
from hbserve.load.compare import Measured, Server, compare
from hbserve.load.compare import lines as compared
from hbserve.load.generator import Load, Watch
from hbserve.load.report import Wanted, figures, goals_of, handoff_s, percentile
from hbserve.server.http.http_server import HttpServer
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import InvalidRequest, PeerLost, RemoteError, RequestTimeout
from hbserve_testing.waits import until

VLLM_KEYS = """
date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration
completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput
total_token_throughput max_output_tokens_per_s max_concurrent_requests mean_ttft_ms median_ttft_ms std_ttft_ms
p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms
input_lens output_lens ttfts itls latencies start_times queue_times generated_texts errors server_queue_times
server_ttfts
"""
"""Keys of the JSON file that vLLM 0.33 writes with --save-detailed."""


# ---- a server of which every byte is known ------------------------------------------------------------------------


def event(text: str | None = None, **more: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


class Scripted:
    """A server that answers each request with the parts of the next one of `answers`, over connections that it keeps.

    A float is a pause, an exception breaks the connection, and an integer at the beginning is a status other than 200.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: list[list[Any]] = []
        self.refuses_all = False
        """Whether every request is refused because it has no API key."""
        self.asked: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections: list[tuple[asyncio.StreamWriter, asyncio.Task[None] | None]] = []
        self.running = self.most_running = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield "http://{}:{}".format(*server.sockets[0].getsockname())
        finally:
            server.close()
            for writer, _ in self.connections:
                writer.transport.abort()
            await asyncio.gather(*(task for _, task in self.connections if task is not None))
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append((writer, asyncio.current_task()))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0] or 0)
                await self._answer(head, await reader.readexactly(length), writer)

    async def _answer(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if head.startswith("GET /v1/models") and self.refuses_all:
            writer.write(b"HTTP/1.1 401 No\r\nContent-Length: 10\r\n\r\nno API key")
            return
        if head.startswith("GET /v1/models"):
            models = json.dumps({"data": [{"id": "m", "root": str(self.folder)}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(models), models))
            return
        self.heads.append(head)
        self.asked.append(json.loads(body))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            parts = self.answers[(len(self.asked) - 1) % len(self.answers)]
            if isinstance(parts[0], int):
                writer.write(b"HTTP/1.1 %d Oh\r\nContent-Length: %d\r\n\r\n%b" % (parts[0], len(parts[1]), parts[1]))
                return
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in parts:
                if isinstance(part, Exception) or writer.is_closing():
                    writer.transport.abort()
                    raise ConnectionError
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            writer.write(b"0\r\n\r\n")
        finally:
            self.running -= 1


ANSWER = [
    event("a"),
    event("b"),
    event("", metrics={"queue_time_ms": 7, "time_to_first_token_ms": 20, "handoff_ms": 4, "kv_bytes": 100,
                       "prefill_instance": "p0", "decode_instance": "d0", "num_attempts": 1}),
    event(usage={"prompt_tokens": 5, "completion_tokens": 3}),
    b"data: [DONE]\n\n",
]  # fmt: skip


@pytest.fixture
def scripted(small_model: Callable[[str], Path]) -> Scripted:
    server = Scripted(small_model("qwen3"))
    server.answers = [ANSWER]
    return server


async def bench(server: Scripted, **options: Any) -> dict[str, Any]:
    settings = {"num_prompts": 4, "random_input_len": 5, "random_output_len": 3, "disable_tqdm": True} | options
    async with server.serving() as url:
        return await bench_serve(BenchServeArgs(base_url=url, **settings))


async def test_the_file_has_the_keys_of_vllm_and_those_of_prefill_and_decode_apart(scripted, tmp_path, capsys):
    options = {"save_result": True, "save_detailed": True, "goodput": ["ttft:60000"], "more": ["tpot:60000"]}
    await bench(scripted, result_dir=tmp_path / "new", result_filename="r.json", metadata=["host=a=b"], **options)
    result = json.loads((tmp_path / "new/r.json").read_text())
    assert result.keys() >= set(VLLM_KEYS.split())
    assert (result["completed"], result["failed"], result["host"], result["model_id"]) == (4, 0, "a=b", "m")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 12), "as the server counts them"
    assert result["slo_attainment"] == result["ttft_attainment"] == 1
    assert result["request_goodput"] == pytest.approx(4 / result["duration"])
    assert (result["server_queue_times"], result["server_ttfts"]) == ([0.007] * 4, [0.02] * 4)
    assert (result["median_handoff_ms"], result["kv_bytes"]) == (4, 400)
    assert result["requests_by_instances"] == {"p0 > d0": 4}
    assert result["generated_texts"] == ["ab"] * 4
    assert "Successful requests:                     4" in capsys.readouterr().out


async def test_what_is_asked_is_what_the_options_say(scripted):
    await bench(scripted, ignore_eos=True, temperature=0.0, extra_body='{"n": 1}', header=["X-A=b"])
    for asked in scripted.asked:
        assert len(asked["prompt"]) == 5
        assert {**asked, "prompt": 0} == {
            "model": "m", "prompt": 0, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True},
            "ignore_eos": True, "temperature": 0.0, "n": 1,
        }  # fmt: skip
    assert all("X-A: b\r\n" in head for head in scripted.heads)
    assert "X-Request-Id: bench-3\r\n" in "".join(scripted.heads)


@pytest.mark.parametrize(
    ("backend", "extra"),
    [(Backend.OPENAI, {"max_tokens": 9}), (Backend.OPENAI_CHAT, {"max_completion_tokens": 9})],
)
async def test_an_extra_body_goes_before_what_the_load_would_send_as_in_vllm(scripted, backend, extra):
    await bench(scripted, backend=backend, extra_body=json.dumps(extra))
    assert all(extra.items() <= asked.items() for asked in scripted.asked)


async def test_chats_are_asked_with_text_and_their_deltas_are_read(scripted):
    deltas: list[dict[str, str]] = [
        {"role": "assistant", "content": ""}, {"reasoning": "v"}, {"reasoning_content": "w"}, {"content": "x"}, {},
    ]  # fmt: skip
    bodies = [json.dumps({"choices": [{"delta": each}]}) for each in deltas]
    scripted.answers = [[f"data: {body}\n\n".encode() for body in bodies]]
    result = await bench(scripted, backend=Backend.OPENAI_CHAT, save_detailed=True)
    assert "POST /v1/chat/completions" in scripted.heads[0]
    assert isinstance(scripted.asked[0]["messages"][0]["content"], str)
    assert scripted.asked[0]["max_completion_tokens"] == 3
    assert result["generated_texts"] == ["vwx"] * 4
    assert [len(each) for each in result["itls"]] == [2] * 4, "what says only whose turn it is is no token"


async def test_no_more_requests_run_than_are_allowed_and_their_wait_is_not_the_server_s(scripted):
    scripted.answers = [[event("a"), 0.02, *ANSWER[1:]]]
    result = await bench(scripted, num_prompts=12, max_concurrency=3)
    assert scripted.most_running == 3
    assert len(scripted.connections) <= 4, "connections are kept"
    assert result["p99_client_queue_time_ms"] > 2 * 20, "the last ones have waited for three others"
    assert result["median_e2el_ms"] < result["p99_client_queue_time_ms"]


async def test_one_that_is_cut_short_tells_of_the_requests_that_have_ended(scripted, tmp_path, capsys):
    scripted.answers = [ANSWER, ANSWER, ANSWER, [event("a"), *[0.02, b": on\n\n"] * 10_000]]  # the first one warms up
    files = {"save_result": True, "result_dir": tmp_path, "result_filename": "r.json"}
    running = asyncio.create_task(bench(scripted, num_prompts=9, max_concurrency=1, **files))
    async with asyncio.timeout(30):
        while len(scripted.asked) < 4:
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    said = capsys.readouterr()
    assert "cut short: of 9 requests 2 have ended" in said.err
    assert "Successful requests:                     2" in said.out
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["was_cut"], result["completed"], result["failed"], result["num_prompts"]) == (True, 2, 0, 9)
    assert result["total_output_tokens"] == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_one_that_still_makes_its_prompts_ends_at_once_by_a_signal(scripted, tmp_path, number):
    dataset = tmp_path / "never_written"
    os.mkfifo(dataset)
    command = [sys.executable, "-m", "hbserve", "bench", "serve", "--dataset-name", "custom"]
    async with scripted.serving() as url:
        options = ["--base-url", url, "--dataset-path", str(dataset)]
        process = await asyncio.create_subprocess_exec(*command, *options, stderr=asyncio.subprocess.PIPE)
        writer: list[int] = []

        def is_read() -> bool:
            with contextlib.suppress(OSError):  # nobody has opened the other end
                writer.append(os.open(dataset, os.O_WRONLY | os.O_NONBLOCK))
            return bool(writer) or process.returncode is not None

        try:
            await until(is_read)
            process.send_signal(number)
            async with asyncio.timeout(30):
                _, errors = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            for each in writer:
                os.close(each)
    assert (process.returncode, errors) == (-number, b"")


async def test_what_fails_is_counted_and_said_and_is_in_no_latency(scripted, capsys):
    broken = [event("a"), OSError()]
    refused = [429, b'{"error": "later"}']
    told = [event("a"), b'data: {"error": {"message": "it died"}}\n\n']
    scripted.answers = [ANSWER, broken, refused, told, [b"data: {no JSON\n\n"], [b": a comment\n\n", *ANSWER]]
    result = await bench(scripted, num_prompts=5, max_concurrency=1, save_detailed=True)  # after the first, alone
    assert (result["completed"], result["failed"]) == (1, 4)
    errors = capsys.readouterr().err
    for said in ("ended its answer too early", "HTTP 429", "it died", "JSON"):
        assert said in errors
    assert result["output_lens"] == [0, 0, 0, 0, 3]


async def test_a_server_that_tells_no_usage_has_its_tokens_counted_in_its_text(scripted, capsys):
    scripted.answers = [[event("Hello"), event(" world"), b"data: [DONE]\n\n"]]
    result = await bench(scripted)
    of_each = len(load_tokenizer(scripted.folder).encode("Hello world", add_special_tokens=False))
    assert (result["total_output_tokens"], result["completed"]) == (4 * of_each, 4)
    assert result["mean_tpot_ms"] > 0
    assert "4 answers had no usage" in capsys.readouterr().err
    scripted.answers = [ANSWER]
    await bench(scripted)
    assert "usage" not in capsys.readouterr().err


async def test_a_load_of_which_nothing_is_answered_is_an_error_without_latencies(scripted, tmp_path, capsys):
    scripted.answers = [ANSWER, *[[429, b"busy"]] * 4]
    with pytest.raises(RemoteError, match="all of 4 requests have failed"):
        await bench(scripted, save_result=True, result_dir=tmp_path, result_filename="r.json")
    assert json.loads((tmp_path / "r.json").read_text())["failed"] == 4
    said = capsys.readouterr()
    assert "TTFT" not in said.out
    assert "error: HTTP 429: busy" in said.err
    assert "warning" not in said.err, "nothing was measured that the client could have disturbed"


async def test_an_answer_that_is_no_stream_is_told_as_that(scripted):
    scripted.answers = [[b'{"choices": [{"text": "a"}]}']]
    with pytest.raises(RemoteError, match=r'expected server-sent events, and it begins with .\{"choices'):
        await bench(scripted)


async def test_a_server_that_refuses_the_first_request_is_an_error_before_the_load(scripted):
    scripted.answers = [[400, b"no such model"]]
    with pytest.raises(RemoteError, match="the first request: HTTP 400: no such model"):
        await bench(scripted)
    assert len(scripted.asked) == 1


async def test_a_server_that_wants_a_key_is_told_with_where_to_put_it(scripted):
    scripted.refuses_all = True
    with pytest.raises(RemoteError, match="HTTP 401: no API key; OPENAI_API_KEY or HBSERVE_API_KEY has the one"):
        await bench(scripted)


async def test_nobody_there_is_said_at_once_without_a_wait_of_no_seconds():
    with pytest.raises(RequestTimeout, match=r"^no server at "):
        await bench_serve(BenchServeArgs(base_url="http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"goodput": ["itl:5"]}, "--goodput='itl'"),
        ({"goodput": ["ttft"]}, "--goodput='ttft': expected METRIC:MS"),
        ({"goodput": ["ttft:x"]}, "--goodput='ttft:x'"),
        ({"metric_percentiles": "9,x"}, "expected numbers"),
        ({"metric_percentiles": "101"}, "from 0 to 100"),
        ({"percentile_metrics": "ttft,tpt"}, "--percentile-metrics='tpt'"),
        ({"extra_body": "[]"}, "expected a JSON object"),
        ({"header": ["a"]}, "--header='a'"),
        ({"request_rate": 0.0}, "--request-rate=0"),
        ({"dataset_name": Dataset.SHAREGPT}, "--dataset-path"),
        ({"self_timed": True}, "does not say when requests came"),
        ({"tokenizer": Path("/nowhere")}, "'/nowhere' is not a folder with a tokenizer"),
    ],
)
async def test_options_that_cannot_be_are_refused_by_name(scripted, options, problem):
    with pytest.raises(InvalidRequest, match=problem):
        await bench(scripted, **options)


async def test_the_server_of_this_project_tells_the_handoff_of_each_request(small_model):
    fake = FakeServer(load_tokenizer(small_model("qwen3")), port=0)
    fake.answers("a", "b", "c")
    http = HttpServer(fake.service.settings, fake.app)
    await http.start()
    try:
        result = await bench_serve(
            BenchServeArgs(base_url=http.url, tokenizer=small_model("qwen3"), num_prompts=3, random_input_len=8,
                           random_output_len=3, disable_tqdm=True)
        )  # fmt: skip
    finally:
        await http.stop()
    assert (result["completed"], result["total_output_tokens"]) == (3, 9)
    assert result["median_handoff_ms"] == pytest.approx(4)
    assert result["requests_by_instances"] == {"p0 > d0": 3}


# ---- what comes over the socket ------------------------------------------------------------------------------------


def test_an_answer_that_comes_in_pieces_of_any_size_is_the_same():
    whole = b"".join(ANSWER).replace(b"\n\n", b"\r\n\r\n")
    for size in (1, 7, len(whole)):
        outcome = Outcome(0)
        answering = AnswerReader(outcome)
        for begin in range(0, len(whole), size):
            answering.feed(whole[begin : begin + size])
        answering.end()
        assert (outcome.text, outcome.output_tokens, outcome.prompt_len, outcome.error) == ("ab", 3, 5, "")
        assert len(outcome.arrivals) == 3
        assert outcome.latency_s == outcome.arrivals[-1], "what comes behind the last token is not waited for"


def test_each_choice_of_an_answer_has_its_own_second_token():
    outcome = Outcome(0)
    reader = AnswerReader(outcome)
    for index, text in ((0, b"a"), (1, b"x"), (0, b"b"), (1, b"y")):
        reader.feed(b'data: {"choices": [{"index": %d, "text": "%s"}]}\n\n' % (index, text))
    reader.feed(b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}\n\n')
    reader.end()
    (a, b), (x, y) = outcome.by_choice[0], outcome.by_choice[1]
    assert (outcome.text, outcome.arrivals) == ("abxy", [a, x, b, y])
    assert outcome.itls_s == [b - a, y - x]
    assert outcome.tpot_s == pytest.approx((b - a + y - x) / 2)
    assert handoff_s(outcome) == b - a


async def test_what_speaks_no_http_and_an_answer_cut_off_are_errors():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        writer.write(b"hello\r\n\r\n" if b"/hello" in line else b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        client = HttpClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", {})
        with pytest.raises(RemoteError, match="does not speak HTTP"):
            await client.request("GET", "/hello")
        with pytest.raises(PeerLost, match="has ended its answer too early"):
            await client.request("GET", "/cut-off")
        client.close()


async def test_a_connection_that_its_server_has_closed_meanwhile_is_not_used_again():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = HttpClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", {})
        for _ in range(2):
            assert (await client.request("GET", "/"))[:2] == (200, b"ab")
            await until(lambda: not any(each.is_open for each in client._idle))
        client.close()


# ---- when ----------------------------------------------------------------------------------------------------------


def test_requests_come_at_the_rate_that_was_asked_for():
    assert arrival_times(4, math.inf) == [0, 0, 0, 0]
    assert arrival_times(4, 2, burstiness=math.inf) == pytest.approx([0.5, 1, 1.5, 2])
    assert arrival_times(1, 2) == pytest.approx([0.5])
    assert arrival_times(0, 2) == []
    for burstiness in (0.3, 1, 5):
        times = arrival_times(2000, 10, burstiness=burstiness, seed=1)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(200)
        gaps = [after - before for before, after in pairwise(times)]
        variance = sum((gap - 0.1) ** 2 for gap in gaps) / len(gaps)
        assert variance * 100 == pytest.approx(1 / burstiness, rel=0.2), "of a gamma distribution of this shape"


@pytest.mark.parametrize(("ramp", "middle"), [("linear", 5.5), ("exponential", math.sqrt(10))])
def test_a_ramp_leads_from_one_rate_to_the_other(ramp, middle):
    times = arrival_times(201, 0, burstiness=math.inf, ramp=ramp, ramp_rates=(1, 10))
    gaps = [times[0], *(after - before for before, after in pairwise(times))]
    assert [1 / gaps[0], 1 / gaps[100], 1 / gaps[200]] == pytest.approx([1, middle, 10])


def test_the_second_of_two_requests_is_at_the_end_of_a_ramp():
    assert arrival_times(2, 0, burstiness=math.inf, ramp="linear", ramp_rates=(1, 4)) == [1, 1.25]


def test_a_ramp_whose_gaps_are_random_keeps_its_rates_on_average():
    """With a ramp, the times are not stretched to the rate that was asked for."""
    for burstiness in (0.5, 4):
        times = arrival_times(4000, 0, burstiness=burstiness, ramp="linear", ramp_rates=(20, 20), seed=1)
        assert times[-1] == pytest.approx(4000 / 20, rel=0.1)


# ---- what is asked for ---------------------------------------------------------------------------------------------

VOCABULARY = prompts.Vocabulary(tuple(range(10, 1000)))


def test_the_same_seed_gives_the_same_prompts_in_every_process():
    code = (
        "from hbserve.load.prompts import *; v = Vocabulary(tuple(range(10, 1000)));"
        "print(random_prompts(v, 2, 3, 2, spread=0.0, prefix_len=2, seed=4),"
        "prefix_repetition(v, 2, prefix_len=2, suffix_len=1, num_prefixes=1, output_len=2, seed=4))"
    )
    found = {
        subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": each}, timeout=60) for each in "12"
    }
    assert len(found) == 1


def test_random_prompts_share_their_prefix_and_are_as_long_as_wanted():
    made = prompts.random_prompts(VOCABULARY, 300, 100, 20, spread=0.5, prefix_len=7, seed=0)
    assert len({tuple(each.token_ids[:7]) for each in made}) == 1
    assert {len(each.token_ids) - 7 for each in made} <= set(range(50, 151))
    assert min(each.output_len for each in made) < 13 < 27 < max(each.output_len for each in made)
    assert {
        len(each.token_ids) for each in prompts.random_prompts(VOCABULARY, 5, 9, 1, spread=0, prefix_len=0, seed=0)
    } == {9}


def test_prefixes_repeat():
    made = prompts.prefix_repetition(VOCABULARY, 20, prefix_len=8, suffix_len=3, num_prefixes=4, output_len=2, seed=0)
    assert len({tuple(each.token_ids[:8]) for each in made}) == 4
    assert len({tuple(each.token_ids) for each in made}) == 20


def test_equal_blocks_of_a_mooncake_trace_are_equal_tokens_and_times_are_milliseconds(tmp_path):
    lines = [
        {"timestamp": 27000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 28500, "input_length": 600, "output_length": 0, "hash_ids": [0, 9]},
        {"timestamp": 30000, "input_length": 3, "output_length": 1, "hash_ids": []},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    one, other, third = prompts.timed_trace(path, VOCABULARY, None, block_size=512, unit_s=1e-3)
    assert [one.at_s, other.at_s, third.at_s] == [0, 1.5, 3]
    assert [len(each.token_ids) for each in (one, other, third)] == [1100, 600, 3]
    assert one.token_ids[:512] == other.token_ids[:512]
    assert one.token_ids[512:600] != other.token_ids[512:]
    assert other.output_len == 1, "a request asks for a token at least"
    assert len(prompts.timed_trace(path, VOCABULARY, 2, block_size=512, unit_s=1e-3)) == 2
    path.write_text('{"timestamp": 1, "input_length": 3, "output_length": 1}\n{"timestamp": 2}')
    with pytest.raises(InvalidRequest, match=r"trace\.jsonl:2: not a line of a timed trace"):
        prompts.timed_trace(path, VOCABULARY, None, block_size=512, unit_s=1)


def test_sharegpt_s_conversations_have_the_lengths_of_their_turns(small_model, tmp_path):
    tokenizer = load_tokenizer(small_model("qwen3"))
    turns = [["question", "an answer"], ["x" * 3000, "too long"], ["hi", "y"], ["no answer"], ["another", "x" * 40]]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": [{"value": each} for each in entry]} for entry in turns]))
    made = prompts.sharegpt(path, tokenizer, 6, output_len=None, seed=0)
    assert {tokenizer.decode(each.token_ids) for each in made} == {"question", "another"}
    assert {each.output_len for each in made} == {9, 40}
    path.write_text("[1]")
    with pytest.raises(InvalidRequest, match="not ShareGPT's format"):
        prompts.sharegpt(path, tokenizer, 6, output_len=None, seed=0)


def test_sharegpt_s_conversations_are_taken_within_vllm_s_bounds(small_model, tmp_path):
    tokenizer = load_tokenizer(small_model("qwen3"))
    path = tmp_path / "sharegpt.json"

    def taken(*lengths: tuple[int, int], output_len: int | None = None) -> set[tuple[int, int]]:
        entries = [{"conversations": [{"value": "x" * each} for each in pair]} for pair in lengths]
        path.write_text(json.dumps(entries))
        made = prompts.sharegpt(path, tokenizer, 20, output_len=output_len, seed=0)
        return {(len(each.token_ids), each.output_len) for each in made}

    fitting = {(4, 4), (1024, 1024), (4, 2044)}
    assert taken(*fitting, (3, 9), (9, 3), (1025, 9), (1024, 1025), (4, 2045)) == fitting
    assert taken((9, 3), (8, 3000), output_len=5) == {(9, 5), (8, 5)}
    with pytest.raises(InvalidRequest, match="no conversation of a usable length among 1"):
        taken((3, 9))


def test_a_custom_file_s_prompts_are_asked_as_vllm_s_options_say(small_model, tmp_path):
    tokenizer = load_tokenizer(small_model("qwen3"))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "one", "output_tokens": 5}\n\n{"prompt": "two", "output_tokens": 6, "more": 1}\n')
    how: dict[str, Any] = {"output_len": None, "shuffle_seed": None, "repeats": True, "templated": False}
    made = prompts.custom(path, tokenizer, 3, **how)
    assert [(each.text, each.output_len) for each in made] == [("one", 5), ("two", 6), ("one", 5)]
    assert [tokenizer.decode(each.token_ids) for each in made] == ["one", "two", "one"]
    once = prompts.custom(path, tokenizer, 3, **how | {"repeats": False, "templated": True, "output_len": 7})
    assert [tokenizer.decode(each.token_ids) for each in once] == ["<user>one!", "<user>two!"]
    assert [each.output_len for each in once] == [7, 7]
    orders = {
        tuple(each.text for each in prompts.custom(path, tokenizer, 2, **how | {"shuffle_seed": s})) for s in range(9)
    }
    assert orders == {("one", "two"), ("two", "one")}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "a dataset without lines"),
        ('{"prompt": "a", "output_tokens": 1}\n{"text": "a"}', r"custom\.jsonl:2: .*missing required field `prompt`"),
        ('{"prompt": "a"}', r"custom\.jsonl:1: has no output_tokens, which --custom-output-len=-1 asks for"),
        ('{"prompt": "a", "output_tokens": 0}', r"custom\.jsonl:1: .*>= 1"),
        ("[", r"custom\.jsonl:1: not a line"),
        ('{"prompt": "a", "output_tokens": 1}', "no chat template; give --skip-chat-template"),
    ],
)
def test_a_custom_file_that_is_none_is_refused_by_its_line(small_model, tmp_path, content, problem):
    tokenizer = load_tokenizer(small_model("qwen3"))
    tokenizer.chat_template = None
    path = tmp_path / "custom.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=problem):
        prompts.custom(path, tokenizer, 3, output_len=None, shuffle_seed=0, repeats=True, templated=True)


async def test_a_chat_is_asked_the_text_of_a_custom_file_without_a_template_of_ours(scripted, tmp_path):
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "what?"}\n')
    of_file: dict[str, Any] = {"dataset_name": Dataset.CUSTOM, "dataset_path": path, "num_prompts": 1}
    await bench(scripted, backend=Backend.OPENAI_CHAT, **of_file)
    asked = scripted.asked[-1]
    assert (asked["messages"][0]["content"], asked["max_completion_tokens"]) == ("what?", 256)


def test_burstgpt_s_requests_are_those_to_gpt_4_that_were_answered(tmp_path):
    path = tmp_path / "burst.csv"
    rows = ["5,ChatGPT,9,9", "45,GPT-4,100,20", "47,GPT-4,50,0", "50.5,GPT-4,30,3"]
    path.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens", *rows]))
    made = prompts.burstgpt(path, VOCABULARY, 10, seed=0)
    assert [(len(each.token_ids), each.output_len, each.at_s) for each in made] == [(100, 20, 0), (30, 3, 5.5)]
    path.write_text("Timestamp,Model,Request tokens,Response tokens\n1,GPT-4,0,1\n2,GPT-4,7,2\n3,GPT-4,8,3")
    found = {tuple(len(each.token_ids) for each in prompts.burstgpt(path, VOCABULARY, 2, seed=i)) for i in range(20)}
    assert found == {(1, 7), (7, 8)}, "from any place on that has so many; a prompt has a token at least"
    path.write_text("a,b\n1,2")
    with pytest.raises(InvalidRequest, match="not BurstGPT's columns"):
        prompts.burstgpt(path, VOCABULARY, 10, seed=0)


# ---- figures -------------------------------------------------------------------------------------------------------


def outcome(ttft_s: float, gaps_s: list[float], tokens: int, error: str = "") -> Outcome:
    arrivals = [100 + ttft_s]
    for gap in gaps_s:
        arrivals.append(arrivals[-1] + gap)
    by_choice, latency_s = {0: arrivals}, arrivals[-1] - 100
    return Outcome(10, start_s=100, by_choice=by_choice, output_tokens=tokens, latency_s=latency_s, error=error)


def test_goodput_counts_requests_that_keep_all_goals_and_failures_keep_none():
    outcomes = [
        outcome(0.1, [0.01, 0.01], 3),
        outcome(0.3, [0.01, 0.01], 3),  # late
        outcome(0.1, [0.5, 0.5], 3),  # slow
        outcome(0.1, [], 1),  # one token takes no time per token
        outcome(0.1, [0.01], 2, error="it died"),
    ]
    wanted = Wanted(["ttft", "tpot", "itl", "e2el"], [50, 99.5], {"ttft": 0.2, "tpot": 0.1})
    result = figures(Load(outcomes, 2.0, Watch()), wanted)
    assert (result["completed"], result["failed"], result["request_goodput"]) == (4, 1, 1.0)
    assert (result["slo_attainment"], result["ttft_attainment"], result["tpot_attainment"]) == (0.4, 0.6, 0.6)
    assert result["mean_ttft_ms"] == pytest.approx(150)
    assert result["median_tpot_ms"] == pytest.approx(10), "of those that have a second token"
    assert result["p50_itl_ms"] == pytest.approx(10)
    assert "p99.5_e2el_ms" in result
    assert result["max_concurrent_requests"] == 4
    assert result["output_throughput"] == 5.0


def test_peaks_are_of_the_busiest_second_since_the_first_request():
    def sent(start_s: float, arrivals: list[float]) -> Outcome:
        at = [start_s + each for each in arrivals]
        return Outcome(10, start_s=start_s, by_choice={0: at}, output_tokens=len(at), latency_s=arrivals[-1])

    # Tokens in the seconds from 100.3 on: 2, 1, 4 (3 of the second request and 1 of the third), 0, 1, 1.
    outcomes = [
        sent(100.3, [0.1, 0.9, 1.2]), sent(102.4, [0.1, 0.2, 0.3]), sent(102.6, [0.1, 2.5]), sent(103.65, [2.0])
    ]  # fmt: skip
    result = figures(Load(outcomes, 4.0, Watch()), Wanted([], [], {}))
    assert (result["max_output_tokens_per_s"], result["max_concurrent_requests"]) == (4.0, 2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (40, 9)
    assert (result["request_throughput"], result["total_token_throughput"]) == (1.0, 12.25)
    assert "kv_bytes" not in result, "no server has said so"
    nothing = figures(Load([outcome(0.1, [], 1, error="no")], 4.0, Watch()), Wanted([], [], {}))
    assert (nothing["max_output_tokens_per_s"], nothing["max_concurrent_requests"], nothing["failed"]) == (0.0, 0, 1)


def test_figures_of_the_server_are_counted_over_what_has_succeeded():
    def answered(attempts: int | None, kv_bytes: int, decode: str, error: str = "") -> Outcome:
        found = outcome(0.1, [0.1], 2, error=error)
        found.server = {"prefill_instance": "p0", "decode_instance": decode, "kv_bytes": kv_bytes}
        found.server |= {} if attempts is None else {"num_attempts": attempts}
        return found

    outcomes = [answered(1, 5, "d0"), answered(2, 7, "d1"), answered(None, 11, "d0"), answered(3, 99, "d0", "it died")]
    result = figures(Load(outcomes, 2.0, Watch()), Wanted([], [], {}))
    assert (result["kv_bytes"], result["requests_tried_again"]) == (23, 1)
    assert result["requests_by_instances"] == {"p0 > d0": 2, "p0 > d1": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ttft:0", "--goodput='ttft:0': expected milliseconds above 0"),
        ("ttft", "--goodput='ttft': expected METRIC:MS"),
        ("itl:5", "--goodput='itl': expected ttft, tpot or e2el"),
    ],
)
def test_a_goal_that_is_none_is_refused(text: str, problem: str):
    with pytest.raises(InvalidRequest, match=problem):
        goals_of(["tpot:5", text])
    assert goals_of(["tpot:5", "ttft:0.5"]) == pytest.approx({"tpot": 0.005, "ttft": 0.0005})


def test_percentiles_lie_between_values_as_numpy_has_them():
    numpy = pytest.importorskip("numpy")
    values = [5.0, 1.0, 2.5, 9.0, 4.0]
    for share in (0, 12.5, 50, 90, 99, 100):
        assert percentile(values, share) == pytest.approx(float(numpy.percentile(values, share)))
    assert percentile([], 50) == 0


def test_a_client_that_is_busy_or_late_says_that_the_figures_are_its_own():
    late = Watch(lags_s=[0.0] * 90 + [0.03] * 10)
    assert "30.0 ms late" in late.complaint(0.1)
    assert late.complaint(1.0) == "", "beside a second it does not matter"
    assert "95%" in Watch(cpu_share=0.95).complaint(1.0)
    assert Watch(lags_s=[0.001] * 100, cpu_share=0.5).complaint(0.001) == "", "a timer is never exact"


def test_the_picture_is_of_the_kind_that_its_name_says(tmp_path):
    plots = pytest.importorskip("hbserve.load.plots")
    load = Load([outcome(0.1, [0.01, 0.02], 3), outcome(0.2, [], 1), outcome(0.1, [], 1, error="no")], 2.0, Watch())
    for name, begin in {"a.svg": b"<?xml", "a.png": b"\x89PNG"}.items():
        plots.plot_load(tmp_path / name, load, {"ttft": 0.15}, "a load")
        assert (tmp_path / name).read_bytes().startswith(begin)


def test_vllm_s_options_are_taken_on_the_command_line(monkeypatch):
    taken: list[BenchServeArgs] = []

    async def take(args: BenchServeArgs) -> None:
        taken.append(args)

    monkeypatch.setattr("hbserve.load.bench_serve.bench_serve", take)
    line = (
        "bench serve --backend openai-chat --base-url http://h:1/v1 --endpoint /v1/chat/completions --request-rate 2.5 "
        "--goodput ttft:1000 tpot:100 --max-concurrency 4 --ignore-eos --dataset-name prefix_repetition --self-timed "
        "--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 5 --save-result"
    )
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    (args,) = taken
    assert (args.url, args.path, args.is_chat) == ("http://h:1", "/v1/chat/completions", True)
    assert (args.goodput, args.more) == (["ttft:1000"], ["tpot:100"])
    assert (args.request_rate, args.max_concurrency, args.ramp_up_start_rps) == (2.5, 4, 1)
    assert args.self_timed
    assert args.ignore_eos
    assert CliRunner().invoke(app, ["bench", "serve", "--num-prompts", "0"]).exit_code == 2


# ---- bench compare -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_layouts(scripted, monkeypatch):
    """Replacement of `hbserve serve`. With prefill and decode apart, it answers only the request before each load of
    four, and none of the load."""
    served: list[list[str]] = []

    @contextlib.asynccontextmanager
    async def serving(_: Any, roles: list[str]) -> AsyncIterator[Server]:
        served.append(roles)
        scripted.answers = [ANSWER] if "hybrid" in roles else [ANSWER, *[[500, b"no"]] * 4]
        scripted.asked.clear()
        process = await asyncio.create_subprocess_exec("sleep", "60")
        async with scripted.serving() as url:
            server = Server(url, process)
            try:
                yield server
            finally:
                await server.end()

    monkeypatch.setattr("hbserve.load.compare.serving", serving)
    return served


async def test_the_layout_that_keeps_its_goals_for_more_requests_is_the_one_to_take(two_layouts, tmp_path, capsys):
    file, picture = tmp_path / "r.json", tmp_path / "c.svg"
    await compare(
        CompareArgs(
            goodput=["e2el:60000"],
            rates="20,10",
            layouts="3H,1p2d",
            num_prompts=4,
            input_len=5,
            output_len=3,
            json=file,
            plot=picture,
        )
    )
    assert two_layouts == [["hybrid"] * 3, ["prefill", "decode", "decode"]]
    printed = capsys.readouterr().out
    assert "Take 3H: " in printed
    assert "; 1P2D 0.00." in printed
    rows = json.loads(file.read_text())
    assert [(row["layout"], row["request_rate"]) for row in rows] == [
        ("3H", 10), ("3H", 20), ("1P2D", 10), ("1P2D", 20),
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"<?xml")


async def test_every_rate_has_other_prompts_which_no_prefix_cache_knows_and_every_layout_the_same(
    two_layouts, scripted
):
    asked = []
    for layout in ("3H", "1P2D"):
        await compare(
            CompareArgs(
                goodput=["e2el:60000"], rates="50,100", layouts=layout, num_prompts=4, input_len=5, output_len=3
            )
        )
        prompts = [tuple(each["prompt"]) for each in scripted.asked]
        assert len(prompts) == 2 * (1 + 4), "a request before each load, and the load"
        assert not {*prompts[:5]} & {*prompts[5:]}
        asked.append(sorted(prompts))
    assert asked[0] == asked[1]
    assert len(two_layouts) == 2


@pytest.mark.parametrize(
    ("apart", "advice"),
    [
        (10.2, "Take 2H: it reaches 10.00 requests a second within its goals and is simpler; 1P1D reaches 10.20."),
        (12, "Take 1P1D: 12.00 requests a second within its goals; 2H 10.00."),
        (0, "Take 2H: 10.00 requests a second within its goals; 1P1D 0.00."),
    ],
)
def test_layouts_that_are_as_good_are_decided_by_what_is_simpler(apart, advice):
    figures = {
        "slo_attainment": 1, "p90_ttft_ms": 1, "p90_tpot_ms": 1, "p99_itl_ms": 1, "client_is_bottleneck": False
    }  # fmt: skip
    found = [
        Measured("2H", 10, figures | {"request_goodput": 10}),
        Measured("1P1D", 10, figures | {"request_goodput": apart}),
    ]
    assert advice in compared(found)
    nothing = [Measured(each.layout, 1, each.figures | {"request_goodput": 0}) for each in found]
    assert any(line.startswith("None meets its goals") for line in compared(nothing))


async def test_a_server_that_ends_by_itself_ends_the_comparison():
    process = await asyncio.create_subprocess_exec("sh", "-c", "exit 3")
    server = Server("http://127.0.0.1:1", process)
    with pytest.raises(RuntimeError, match="has ended by itself, with status 3"):
        await server.during(asyncio.sleep(60))
    await server.end()


async def test_a_server_that_has_ended_unnoticed_is_ended_without_an_error():
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    await Server("http://127.0.0.1:1", process).end()


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"rates": "1,nan,2"}, "--rates='1,nan,2'"),
     ({"rates": "1,0"}, "--rates='1,0'"), ({"rates": "x"}, "--rates='x'"), ({"layouts": "2H,1P"}, "got '1P'"),
     ({"layouts": "2H,x"}, "got 'X'"), ({"layouts": "2H,1P2D"}, "the same number of instances"),
     ({"layouts": "0H"}, "got '0H'"), ({"goodput": ["x:1"]}, "--goodput='x'")],
)  # fmt: skip
async def test_a_comparison_that_cannot_be_is_refused(two_layouts, options, problem):
    with pytest.raises(InvalidRequest, match=problem):
        await compare(CompareArgs(**({"goodput": ["ttft:1"], "rates": "1"} | options)))
    assert not two_layouts
