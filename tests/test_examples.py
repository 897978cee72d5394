"""The examples under docs/ run as they are, on a small model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def run(example: str, model: Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / example, model], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_custom_kv_transfer_carries_the_kv_of_a_pd_run(small_model):
    moved = re.search(r"(\d+) bytes of KV moved by TcpTransfer", run("custom_kv_transfer.py", small_model("qwen3")))
    assert moved
    assert int(moved[1]) > 0


def test_a_custom_scheduler_reorders_requests(small_model):
    out = run("custom_scheduler.py", small_model("qwen3"))
    long, short, middle = (int(each) for each in re.findall(r"after (\d+) ms", out))
    assert short <= middle <= long


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"custom_kv_transfer.py", "custom_scheduler.py"}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it(example):
    assert f"python docs/examples/{example.name}" in example.read_text()
