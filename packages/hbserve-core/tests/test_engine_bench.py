"""The engine's benchmark runs, and says what was reached."""

import re

from hbserve_core.engine_bench import WORKLOADS, Sizes, bench_config, run_bench


def test_all_workloads_run_and_say_what_they_reached(model_folder):
    sizes = Sizes().scaled(1 / 256)
    lines = []
    run_bench(bench_config(str(model_folder("qwen3")), sizes, device="cpu"), sizes, WORKLOADS, lines.append)
    number = r"[\d.e+-]+"
    limits = f"reads {number} GB/s, copies {number} GB/s \\(read and written\\), products {number} TFLOP/s"
    assert re.fullmatch(f"limits of this device: {limits}", lines[1])
    assert [line.split()[0] for line in lines[2:]] == [name for name in WORKLOADS for _ in range(2)]
    assert all(re.search(r"= \d+% of", line) for line in lines[6:8])
    assert all(re.search(r"share [\d.]+ \([\d.]+ of a copy's\)$", line) for line in lines[4:6] + lines[8:])
