"""The examples run as they are, on a small model."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve_testing.narrowing import present

pytestmark = pytest.mark.warm

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEADLINE_S = 180


def run(example: str, *arguments: Path | str) -> str:
    command = [sys.executable, EXAMPLES / example, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_has_its_prompts_answered_together(small_model):
    lines = run("offline.py", small_model("qwen3")).splitlines()
    assert [re.findall(r"^'(\S+)", line)[0] for line in lines] == ["The", "机器学习是':", "A"]
    assert all(1 <= int(re.findall(r"\((\d+) tokens\)$", line)[0]) <= 32 for line in lines)


def test_one_reader_has_a_whole_answer_and_the_other_leaves_early(small_model):
    out = run("streaming.py", small_model("qwen3"))
    assert out.splitlines()[-1] == "1 completed, 1 aborted"
    assert re.search(r"^patient length: ", out, re.M)
    assert re.search(r"^hasty left: ", out, re.M)
    assert sum(int(each) for each in re.findall(r"^patient: \+(\d+) tokens", out, re.M)) == 100


def test_kv_moves_between_two_engines_that_have_hbserve_kv_alone():
    source = (EXAMPLES / "kv_between_engines.py").read_text()
    assert set(re.findall(r"^(?:import|from) (hbserve\w*)", source, re.M)) == {"hbserve_kv"}
    out = run("kv_between_engines.py")
    assert "sent 81920 bytes: COMPLETED" in out
    assert "received 'first token: 42' and blocks [40, 41, 7, 8, 55]: COMPLETED" in out


MOST_LINES_OF_AN_ENGINE = 20
WITHOUT_TORCH = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"


@pytest.mark.cold
@pytest.mark.parametrize("backend", ["auto", "ipc", "mooncake"])
def test_layers_of_plain_memory_move_as_they_are_computed_without_torch(backend, tmp_path, monkeypatch):
    """`.ci/wheels_alone.py` runs the example where torch is not installed, and then over nccl where it is."""
    (engine,) = (
        node
        for node in ast.parse((EXAMPLES / "kv_own_memory.py").read_text()).body
        if isinstance(node, ast.AsyncFunctionDef)
    )
    assert present(engine.end_lineno) - engine.lineno <= MOST_LINES_OF_AN_ENGINE
    if backend == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake or its libraries are missing", exc_type=ImportError)
    (tmp_path / "torch.py").write_text(WITHOUT_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = run("kv_own_memory.py", backend)
    assert "sent 49152 bytes: COMPLETED" in out
    assert "[[7, 8, 3], [17, 18, 13], [27, 28, 23], [37, 38, 33]]: COMPLETED" in out
    assert "received 'first token: 42' and " in out


@pytest.mark.cold
def test_layers_of_plain_memory_that_ipc_moves_do_not_wait_for_torch_where_it_is_installed(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "sent 49152 bytes: COMPLETED" in run("kv_own_memory.py")


async def test_the_server_answers_mounted_in_an_application_of_ones_own(small_model):
    """Tests what examples/ray_serve.py gives to Ray Serve; Ray Serve itself was tried by hand (docs/ray.md)."""
    example: dict[str, Any] = runpy.run_path(str(EXAMPLES / "ray_serve.py"))
    application = example["application"](small_model("qwen3"))
    async with (
        application.router.lifespan_context(application),
        httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://mounted") as client,
    ):
        body = {"prompt": "Where?", "max_tokens": 8, "ignore_eos": True}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["metrics"]["kv_bytes"] > 0, "prefill and decode are apart"
        assert "hbserve:prompt_tokens_total" in (await client.get("/metrics")).text


@pytest.fixture
def two_hosts(request: pytest.FixtureRequest) -> dict[str, tuple[str, list[str]]]:
    """The address here of each address in the example, and the words that run a command there.

    If there are no network namespaces, both hosts are this one, at loopback addresses that no other test has.
    """
    hosts = {"host1": "10.0.0.1", "host2": "10.0.0.2"}
    try:
        network = request.getfixturevalue("make_network")(hosts)
    except pytest.skip.Exception:
        here = f"127.{1 + os.getpid() // 250 % 250}.{1 + os.getpid() % 250}"
        return {"10.0.0.1": (f"{here}.1", []), "10.0.0.2": (f"{here}.2", [])}
    return {at: (at, ["ip", "netns", "exec", network.namespace(host)]) for host, at in hosts.items()}


def test_two_hosts_answer_by_the_commands_at_the_top_of_their_file(two_hosts, small_model, tmp_path):
    text = (EXAMPLES / "two_hosts.yaml").read_text()
    commands = re.findall(r"^# on (\S+): hbserve (.*)$", text, re.M)
    for documented, (address, _) in two_hosts.items():
        text = text.replace(documented, address)
        commands = [(at, command.replace(documented, address)) for at, command in commands]
    text = text.replace("path: null", f"path: {small_model('qwen3')}")
    (tmp_path / "two_hosts.yaml").write_text(text + "engine: {num_blocks: 64, num_threads: 1}\n")

    def on(at: str, command: str) -> list[str]:
        return [*two_hosts[at][1], sys.executable, "-m", "hbserve", *shlex.split(command)]

    assert "`hbserve keys keys` makes them" in text
    assert subprocess.run([sys.executable, "-m", "hbserve", "keys", "keys"], cwd=tmp_path, timeout=60).returncode == 0
    *servers, client = commands
    assert [command.split()[0] for _, command in commands] == ["scheduler", "instance", "instance", "generate"]
    with (tmp_path / "log").open("w") as log:
        processes = [subprocess.Popen(on(*each), cwd=tmp_path, stdout=log, stderr=log) for each in servers]
        try:
            answer = subprocess.run(on(*client), cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S)
            assert answer.returncode == 0, answer.stderr + (tmp_path / "log").read_text()
            assert "KV moved" in answer.stderr
        finally:
            for process in processes:
                process.terminate()
            ends = [process.wait(timeout=60) for process in processes]
    assert ends == [0, 0, 0], (tmp_path / "log").read_text()


def test_a_custom_kv_transfer_carries_the_kv_of_a_pd_run(small_model):
    moved = re.search(r"(\d+) bytes of KV moved by TcpTransfer", run("custom_kv_transfer.py", small_model("qwen3")))
    assert moved
    assert int(moved[1]) > 0


async def test_a_custom_kv_transfer_is_found_by_the_name_of_its_entry_point(small_model, tmp_path, monkeypatch):
    installed = tmp_path / "tcp_transfer-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tcp-transfer\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[hbserve_kv.backends]\ntcp = custom_kv_transfer:TcpTransfer\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(EXAMPLES)]))
    prompts, params = [[5] * 100, [6, 7, 8]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    hybrid = LLM(small_model("qwen3"), num_kvcache_blocks=64)
    expected = hybrid.generate(prompts, params, use_tqdm=False)
    hybrid.exit()
    config = PdDisaggConfig(model_path=small_model("qwen3"), kv_transfer_backend="tcp", num_blocks=64)
    async with DisaggregatedLLM(config) as llm:
        results = await llm.generate(prompts, params)
    assert [result["token_ids"] for result in results] == [each["token_ids"] for each in expected]
    assert all(result["kv_bytes"] > 0 for result in results)


def test_a_custom_scheduler_reorders_requests(small_model):
    out = run("custom_scheduler.py", small_model("qwen3"))
    long, short, middle = (int(each) for each in re.findall(r"after (\d+) ms", out))
    assert short <= middle <= long


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.*")), ids=lambda path: path.name)
def test_an_example_says_how_to_run_it_and_is_tested_and_listed(example):
    own_words = example.read_text()
    assert f"uv run python examples/{example.name}" in own_words or f"--config {example.name}" in own_words
    assert f'"{example.name}"' in Path(__file__).read_text()
    for readme in ("README.md", "README.zh-CN.md"):
        assert f"(examples/{example.name})" in (EXAMPLES.parent / readme).read_text()
