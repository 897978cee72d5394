"""The examples under docs/ run as they are, on a small model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def run(example: str, model: Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / example, model], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"custom_kv_transfer.py", "custom_scheduler.py"}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it(example):
    assert f"python docs/examples/{example.name}" in example.read_text()
