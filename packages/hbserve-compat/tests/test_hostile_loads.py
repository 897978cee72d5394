"""Whatever options, files and servers `bench serve`, `simulate`, `plan` and `chat` are given, they give an answer, or
one error line of ours. Errors that can be known before a load are told before it."""

import asyncio
import codecs
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bench_serve import Scripted, bench
from test_hostile_commands import invoke

from hbserve.client.chat_client import ChatClient
from hbserve.load.args import BenchServeArgs, Dataset, RampUp
from hbserve.load.bench_serve import bench_serve
from hbserve.simulator.profile import OWN, load_profile
from hbserve_rpc import HBServeRpcError, InvalidAddress, InvalidRequest, RemoteError

URLS = [
    "http://[::1",
    "http://127.0.0.1:99999",
    "127.0.0.1:x",
    "http://h:0",
    "http://a\x00b",
    "a b",
    "x" * 100,
    "ftp://x",
]
LINE = '{"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": [0]}\n'
HEAD, ROW = "Timestamp,Model,Request tokens,Response tokens\n", "5,GPT-4,20,3\n"
TURNS = [{"value": "What is the capital of France?"}, {"value": "It is Paris, as ever."}]


@pytest.fixture
def scripted(small_model) -> Scripted:
    return Scripted(small_model("qwen3"))


@pytest.mark.parametrize("url", URLS)
async def test_a_url_that_is_none_is_named(url):
    with pytest.raises(InvalidAddress, match="--base-url="):
        await bench_serve(BenchServeArgs(base_url=url))
    with pytest.raises(InvalidAddress, match="--url="):
        ChatClient(url, None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"header": ["a=b\r\nX: y"]}, "--header='b"),
        ({"header": ["a b=c"]}, "--header='a b'"),
        ({"header": ["a=\udcff"]}, "--header="),
        ({"request_id_prefix": "a\nb"}, "--request-id-prefix"),
        ({"endpoint": "x"}, "--endpoint='x': expected a path"),
        ({"endpoint": "/a b"}, "--endpoint"),
        ({"extra_body": "[" * 100000}, "--extra-body="),
        ({"extra_body": '{"a": NaN}'}, "--extra-body="),
        ({"extra_body": '{"a": "\ud800"}'}, "--extra-body="),
        ({"temperature": float("nan")}, "--temperature=nan: expected a finite number"),
        ({"metadata": ["a"]}, "--metadata='a'"),
        ({"ramp_up_strategy": RampUp.LINEAR}, "--ramp-up-strategy: needs"),
        ({"ramp_up_start_rps": 5.0}, "need --ramp-up-strategy"),
        ({"ramp_up_strategy": RampUp.LINEAR, "ramp_up_start_rps": 1.0, "ramp_up_end_rps": 2.0, "request_rate": 3.0},
         "no --request-rate"),
        ({"dataset_path": Path("x")}, "--dataset-name random has no file"),
        ({"self_timed": True}, "does not say when requests came"),
        ({"save_result": True, "result_filename": "/nowhere/x.json"}, "there is no folder /nowhere"),
        ({"save_result": True, "result_filename": ".."}, "is a folder"),
        ({"save_result": True, "result_dir": Path("/etc/passwd")}, "there is no folder /etc/passwd"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_told_before_any_request(scripted, options, problem):
    with pytest.raises((HBServeRpcError, OSError), match=problem):
        await bench(scripted, **options)
    assert scripted.asked == []


def test_options_of_a_file_that_nobody_asked_for_are_refused(caplog):
    for options in (["--save-detailed"], ["--result-dir=x"], ["--result-filename=x.json"], ["--port=0"]):
        assert "--" in invoke(["bench", "serve", *options], caplog).stderr


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"{}", b'{"data": []}', b'{"data": [{}]}', b"\xff", b""])
async def test_a_server_of_something_else_is_told_as_that(content):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(RemoteError, match="expected a list of models"):
            await bench_serve(BenchServeArgs(base_url=f"http://{host}:{port}"))


@pytest.mark.parametrize("content", [b"data: <html>\n\n", b"data: {}\n\n", b'data: {"choices": [{"delta": null}]}\n\n'])
async def test_a_chat_with_a_server_of_something_else_is_told_as_that(content):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + content)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = ChatClient("{}:{}".format(*server.sockets[0].getsockname()), None)
        with pytest.raises(RemoteError, match="the server there does not answer as OpenAI's API does"):
            [text async for text in client.answer([])]


async def test_events_need_no_space_after_their_colon(scripted):
    scripted.answers = [
        [b'data:{"choices":[{"text":"a"}]}\r\n\r\n', b'data:{"choices":[],"usage":{"completion_tokens":1}}\n\n',
         b"data:[DONE]\n\n"]
    ]  # fmt: skip
    assert (await bench(scripted))["completed"] == 4


# ---- files -------------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


async def load_of(scripted: Scripted, path: Path, kind: Dataset, content: str | bytes, **options: Any) -> int:
    """Return how many requests are sent for a dataset, without the warm-up."""
    scripted.answers = [[b'data: {"choices":[{"text":"a"}]}\n\n']]
    write(path, content)
    await bench(scripted, dataset_name=kind, dataset_path=path, **options)
    return len(scripted.asked) - 1


@pytest.mark.parametrize(
    "odd",
    [{}, 5, None, {"conversations": None}, {"conversations": "abc"}, {"conversations": [["a"], ["b"]]},
     {"conversations": [{"from": "a"}, {"from": "b"}]}, {"conversations": [{"value": 5}, {"value": None}]}],
)  # fmt: skip
async def test_odd_entries_of_sharegpt_are_passed_over(scripted, tmp_path, odd):
    content = codecs.BOM_UTF8 + json.dumps([odd, {"conversations": TURNS}]).encode()
    assert await load_of(scripted, tmp_path / "file", Dataset.SHAREGPT, content, num_prompts=2) == 2


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        (Dataset.SHAREGPT, "[" * 100000, "not ShareGPT's format"),
        (Dataset.SHAREGPT, b"\xff" * 100000, "not ShareGPT's format"),
        (Dataset.SHAREGPT, '[{"conversations": [{"value": "\\ud800"}, {"value": "x"}]}]', "not ShareGPT's format"),
        (Dataset.MOONCAKE, LINE.encode() + b"\xff\xfe\n", "file:2: not a line"),
        (Dataset.MOONCAKE, LINE.encode("utf-16"), "file:1: not a line"),
        (Dataset.MOONCAKE, LINE + "[" * 100000, "file:2: not a line"),
        (Dataset.MOONCAKE, LINE.replace("20", "1" + "0" * 15), "file:1: .*`\\$.input_length`"),
        (Dataset.MOONCAKE, LINE.replace("3", "9" * 30), "file:1: .*`\\$.output_length`"),
        (Dataset.MOONCAKE, LINE.replace("20", "20.7"), "file:1: .*`\\$.input_length`"),
        (Dataset.MOONCAKE, LINE.replace(": 0", ": 5000") + LINE, "file:2: timestamp 0 after 5000"),
        (Dataset.MOONCAKE, gzip.compress(LINE.encode() * 2, mtime=0)[:-9], "file: cannot be unpacked; is it cut off"),
        (Dataset.SHAREGPT, b"\x1f\x8b[]", "file: cannot be unpacked"),
        (Dataset.BURSTGPT, gzip.compress((HEAD + ROW).encode(), mtime=0)[:-12], "file: cannot be unpacked"),
        (Dataset.BURSTGPT, HEAD + "x" * 200000, "file:.*field larger"),
        (Dataset.BURSTGPT, HEAD.replace(",", ";") + ROW, "there is no 'Model'"),
        (Dataset.BURSTGPT, "", "there is no 'Model'"),
        (Dataset.BURSTGPT, HEAD + ROW + "5,GPT-4\n", "file:3: not a row"),
        (Dataset.BURSTGPT, HEAD + ROW.replace("5", "inf"), "file:2: .*`\\$.Timestamp`"),
        (Dataset.BURSTGPT, HEAD + ROW.replace("20", "-20"), "file:2: .*`\\$.Request tokens`"),
        (Dataset.BURSTGPT, HEAD + ROW.replace("20", "1" + "0" * 15), "file:2: .*`\\$.Request tokens`"),
    ],
)
async def test_what_is_odd_in_a_dataset_is_told_in_a_few_words_with_its_line(
    scripted, tmp_path, kind, content, problem
):
    with pytest.raises(InvalidRequest, match=problem) as caught:
        await load_of(scripted, tmp_path / "file", kind, content)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 200
    assert scripted.asked == []


async def test_excel_s_byte_order_mark_and_rows_out_of_order_are_no_obstacle(scripted, tmp_path):
    content = codecs.BOM_UTF8 + (HEAD + ROW + ROW.replace("5", "4.9") + "odd\n").encode()
    assert await load_of(scripted, tmp_path / "file", Dataset.BURSTGPT, content, self_timed=True) == 2


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Dataset.MOONCAKE, LINE * 4),
        (Dataset.BURSTGPT, HEAD + ROW * 4),
        (Dataset.SHAREGPT, json.dumps([{"conversations": TURNS}] * 4)),
    ],
)
async def test_a_dataset_may_be_packed_and_come_through_a_pipe(scripted, tmp_path, kind, content):
    packed = gzip.compress(content.encode())
    assert await load_of(scripted, tmp_path / "file.gz", kind, packed) == 4
    os.mkfifo(tmp_path / "pipe")
    written = asyncio.create_task(asyncio.to_thread((tmp_path / "pipe").write_bytes, packed))
    result = await bench(scripted, dataset_name=kind, dataset_path=tmp_path / "pipe")
    await written
    assert result["completed"] == 4


async def test_a_multiplier_of_nothing_sends_a_trace_at_once(scripted, tmp_path):
    content = LINE + LINE.replace(": 0", ": 3600000", 1)
    options = {"timed_trace_sec_multiplier": 0.0, "num_prompts": None}
    assert await load_of(scripted, tmp_path / "file", Dataset.MOONCAKE, content, **options) == 2


# ---- profiles, simulations, plans --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensor_parallel_size", 0), ("kv_bytes_per_token", 10**30), ("kv_tokens", -1), ("message_s", -1),
        ("handoff_s", 1e308), ("launched_ahead_s", -5), ("prefill", [[0, 1]]), ("prefill", [[5, 0]]),
        ("prefill", [[5, 1], [5, 2]]), ("prefill", []), ("decode", [[1, 5, -1]]), ("decode", [[1, 5, 1], [1, 5, 2]]),
        ("transfer", [[5, 1], [5, 2]]), ("prefill_behind", [[1, 1e308]]),
    ],
)  # fmt: skip
def test_figures_that_no_profile_has_are_refused_by_name(tmp_path, field, value):
    profile = json.loads((OWN / "h100-qwen3-0.6b.json").read_text())
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile | {field: value}))
    with pytest.raises(InvalidRequest, match=f"--profile=.*{field}"):
        load_profile(str(path))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100000, b'{"name": "', b'{"name": "\xff"}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="--profile="):
        load_profile(str(path))


@pytest.mark.parametrize(
    "options",
    ["--burstiness=1e308", "--conversations --rate=inf", "--conversations --rate=1e308", "--input-len=" + "9" * 30,
     "--output-len=" + "9" * 30, "--json=/", "--rate=inf --burstiness=inf", "--fault=prefill-0@" + "9" * 400],
)  # fmt: skip
def test_whatever_a_simulation_is_given_is_figures_or_one_line(options, caplog):
    invoke(["simulate", "--num-requests=3", *options.split(" ")], caplog)


@pytest.mark.parametrize(
    ("options", "said"),
    [("--trace=PATH --rate=5", "--rate=5: has no effect with --trace"),
     ("--trace=PATH --num-requests=7", "--num-requests=7: has no effect with --trace"),
     ("--conversations --input-len=9", "--input-len=9: has no effect with --conversations"),
     ("--conversations --repeat=2", "--repeat=2: has no effect with --conversations"),
     ("--speed=0.5", "--speed=0.5: has no effect without --trace"),
     ("--trace=PATH --conversations", "--trace and --conversations: expected one of them")],
)  # fmt: skip
def test_an_option_of_another_load_is_refused(options, said, caplog, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 9, "output_length": 5}\n')
    result = invoke(["simulate", *options.replace("PATH", str(path)).split(" ")], caplog)
    assert (result.exit_code, result.stderr) == (2, f"error: {said}\n")


@pytest.mark.parametrize(
    "words",
    ["bench serve --num-prompts", "bench compare --rates=1 --num-prompts", "simulate --num-requests",
     "simulate --prefill", "simulate --decode", "simulate --hybrid", "simulate --cells", "simulate --repeat"],
)  # fmt: skip
def test_a_number_that_no_memory_holds_is_refused(words, caplog):
    result = invoke([*words.split(" "), str(10**12)], caplog)
    assert (result.exit_code, "less than or equal to" in result.stderr) == (2, True)


@pytest.mark.parametrize("option", ["--ttft-ms=inf", "--tpot-ms=1e308", "--itl-ms=1e400"])
def test_a_plan_for_goals_that_are_none_is_refused(option, caplog):
    goals = {"--ttft-ms": "300", "--tpot-ms": "15"} | dict([option.split("=")])
    words = [f"{name}={value}" for name, value in goals.items()]
    result = invoke(["plan", "--input-len=64", "--output-len=8", "--rate=2", *words], caplog)
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("words", "closed", "problem"),
    [
        (["simulate", "--num-requests=3"], 1, b"stdout is closed"),
        (["bench", "serve"], 1, b"stdout is closed"),
        (["chat", "--url", "127.0.0.1:1"], 1, b"stdout is closed"),
        (["chat", "--url", "127.0.0.1:1"], 0, b"stdin is closed"),
    ],
)
def test_streams_that_are_closed_are_told_before_anything_is_done(words, closed, problem):
    command = f"exec {sys.executable} -m hbserve {' '.join(words)} {closed}>&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, timeout=90)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line[:7]) == (1, b"error: ")
    assert problem in line
