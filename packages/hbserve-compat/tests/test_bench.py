"""`hbserve bench engine` as a user runs it."""

import json
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.warm


def test_bench_engine_prints_each_workload_of_a_model_folder(small_model):
    command = [sys.executable, "-m", "hbserve", "bench", "engine", "--model", str(small_model("qwen3"))]
    options = ["--scale", "0.004", "--workload", "single", "--workload", "decode", "--random-weights"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == ["single", "single", "decode", "decode"]


def test_bench_engine_says_what_is_wrong_with_its_options(tmp_path):
    command = [sys.executable, "-m", "hbserve", "bench", "engine"]
    done = subprocess.run([*command, "--model", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "config.json" in done.stderr.splitlines()[-1]
    done = subprocess.run([*command, "--dtype", "int8"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "int8" in done.stderr


def test_a_sweep_prints_a_row_for_each_batch_size_and_ends_with_its_cliffs(small_model, tmp_path):
    command = [sys.executable, "-m", "hbserve", "bench", "engine", "--sweep", "--model", str(small_model("qwen3"))]
    rows_file = tmp_path / "rows.jsonl"
    options = ["--batch-sizes", "2,1,3", "--contexts", "32,100000", "--json", str(rows_file), "--random-weights"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [line for line in lines if re.match(r" +\d", line)]
    assert [int(line.split()[0]) for line in rows] == [1, 2, 3, 1, 2, 3]
    assert all("of a copy's" in line for line in rows[:3])
    assert all("skipped: " in line for line in rows[3:])
    assert lines[-1].startswith("cliffs: ")
    kept = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [(row["batch"], row["context"]) for row in kept] == [(1, 32), (2, 32), (3, 32)]
    assert all(row["share"] == row["limit_s"] / row["step_s"] > 0 for row in kept)


def test_options_of_the_sweep_and_of_the_workloads_do_not_mix():
    command = [sys.executable, "-m", "hbserve", "bench", "engine"]
    for options, named in [
        (["--sweep", "--scale", "0.5"], "--scale"),
        (["--contexts", "64"], "--sweep"),
        (["--sweep", "--batch-sizes", "1,x"], "1,x"),
    ]:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert named in done.stderr
