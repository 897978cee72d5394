"""`hbserve bench engine` as a user runs it."""

import subprocess
import sys


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
