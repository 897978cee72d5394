"""The engine's benchmark runs, and says what was reached."""

import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from hbserve_core import InstanceConfig
from hbserve_core.bench import workloads as engine_bench
from hbserve_core.bench.batch_sweep import BatchSweep
from hbserve_core.bench.simulated_device import H100_8B, SimulatedDevice
from hbserve_core.bench.workloads import WORKLOADS, Sizes, bench_config, run_bench
from hbserve_core.ranks.make_runner import make_runner
from hbserve_rpc import LogitsNotFinite

pytestmark = pytest.mark.usefixtures("little_to_measure")


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


def test_how_long_before_a_steps_end_the_next_one_is_launched_is_known_with_and_without_prompts():
    class SlowWithPrompts(SimulatedDevice):
        def launch(self, batch):
            num_tokens = sum(chunk.num_new_tokens for chunk in batch)
            self._host_time_s = lambda: 0.020 if num_tokens > 2304 else 0.004 if num_tokens > len(batch) else 0.0005
            return super().launch(batch)

    def sleep(time_s: float) -> None:
        device.now += time_s

    model: Any = SimpleNamespace(vocab_size=1000, max_model_len=3000, reach=0, eos_token_ids=())
    config = InstanceConfig(
        model_path="", chunk_size=16384, max_chunk_prefill_tokens=16384, max_num_batched_tokens=16384
    )
    device = SlowWithPrompts(model, 20_000, H100_8B)
    sweep = BatchSweep(config, device, device.clock, sleep)
    decodes_s = sweep.launched_ahead_s(16, 512)
    assert 0.0005 < decodes_s < 0.0015
    assert 0.004 < sweep.launched_ahead_s(16, 512, 2048) < 0.006
    assert sweep.launched_ahead_s(16, 512) == pytest.approx(decodes_s, abs=0.0005), "prompts are forgotten"
    assert 0.020 < sweep.launched_ahead_of_prompts_s(2048) < 0.022, "those of two prompts do, behind one"
    assert not sweep._engine.has_work()
    assert sweep.launched_ahead_s(1, 16) > 0
    device._time_s = lambda _: 0.002
    assert sweep.launched_ahead_s(16, 512) == 0.0, "each is followed at once, and those before are forgotten"
    device._time_s = H100_8B
    sweep.launched_ahead_of_prompts_s(2048)
    assert all(begin == end for (_, end, _), (begin, _, _) in pairwise(device.steps[-40:])), "the device never waited"
    device.overlaps = False
    assert sweep.launched_ahead_s(16, 512) == sweep.launched_ahead_of_prompts_s(2048) == 0.0
