"""The engine's benchmark runs, and says what was reached."""

import re
from typing import Any

import pytest

from hbserve_core.bench import workloads as engine_bench
from hbserve_core.bench.workloads import WORKLOADS, Sizes, bench_config, run_bench
from hbserve_core.ranks.make_runner import make_runner
from hbserve_rpc import LogitsNotFinite


def test_all_workloads_run_and_say_what_they_reached(model_folder):
    sizes = Sizes().scaled(1 / 256)
    lines: list[str] = []
    run_bench(bench_config(str(model_folder("qwen3")), sizes, device="cpu"), sizes, WORKLOADS, lines.append)
    number = r"[\d.e+-]+"
    limits = f"reads {number} GB/s, copies {number} GB/s \\(read and written\\), products {number} TFLOP/s"
    assert re.fullmatch(f"limits of this device: {limits}", lines[1])
    assert [line.split()[0] for line in lines[2:]] == [name for name in WORKLOADS for _ in range(2)]
    assert all(re.search(r"= \d+% of", line) for line in lines[6:8])
    assert all(re.search(r"share [\d.]+ \([\d.]+ of a copy's\)$", line) for line in lines[4:6] + lines[8:])


def test_a_model_without_numbers_has_no_speed_and_its_runner_is_closed(numberless_model, monkeypatch):
    sizes, lines, closed = Sizes().scaled(1 / 256), list[str](), list[Any]()

    def runner_that_tells(config):
        runner = make_runner(config)
        monkeypatch.setattr(runner, "close", lambda: closed.append(runner))
        return runner

    monkeypatch.setattr(engine_bench, "make_runner", runner_that_tells)
    with pytest.raises(LogitsNotFinite, match="not finite at output token 0: its weights are broken"):
        run_bench(bench_config(str(numberless_model), sizes, device="cpu"), sizes, WORKLOADS, lines.append)
    assert lines == []
    assert len(closed) == 1
