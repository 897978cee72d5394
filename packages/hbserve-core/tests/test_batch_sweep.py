"""Decode steps by batch size: what counts as a cliff, what does not fit, and what is timed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hbserve_core.bench import batch_sweep
from hbserve_core.bench.batch_sweep import (
    BATCH_SIZES,
    BatchSweep,
    Cliff,
    SweepPlan,
    SweepRow,
    find_cliffs,
    run_sweep,
    sweep_config,
)
from hbserve_core.bench.model_work import DecodeLimit, decode_limit
from hbserve_core.engine.step import StepResult
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.model_config import load_model_config
from hbserve_core.ranks.make_runner import make_runner
from hbserve_rpc import LogitsNotFinite

pytestmark = pytest.mark.usefixtures("little_to_measure")


def row(batch: int, step_ms: float, share: float, context: int = 512, longest_ms: float = 0.0) -> SweepRow:
    limit = DecodeLimit(limit_s=share * step_ms / 1e3, copy_s=1.07 * share * step_ms / 1e3, read_bytes=1e10, flops=1e9)
    return SweepRow(context, batch, step_ms / 1e3, (longest_ms or step_ms) / 1e3, limit)


# Qwen3-8B on an H100, when products of 3 and 4 rows did not keep their sums in registers.
MEASURED = [
    row(1, 6.42, 0.80), row(2, 7.80, 0.66), row(3, 63.96, 0.08), row(4, 63.98, 0.08), row(5, 6.85, 0.77),
    row(8, 6.96, 0.77), row(9, 7.10, 0.75), row(16, 7.33, 0.76), row(32, 7.81, 0.77), row(64, 8.91, 0.77),
]  # fmt: skip


def test_a_batch_is_a_cliff_if_a_larger_one_takes_less_time():
    assert find_cliffs(MEASURED) == [
        Cliff(512, 2, "7.8 ms, batch 5 takes 6.85"),
        Cliff(512, 3, "63.96 ms, batch 5 takes 6.85"),
        Cliff(512, 4, "63.98 ms, batch 5 takes 6.85"),
    ]


def test_the_order_of_rows_does_not_matter():
    assert find_cliffs(MEASURED[::-1]) == find_cliffs(MEASURED)


def test_three_percent_are_noise():
    assert find_cliffs([row(4, 10.30, 0.5), row(5, 10.0, 0.5)]) == []
    assert find_cliffs([row(4, 10.31, 0.5), row(5, 10.0, 0.5)]) == [Cliff(512, 4, "10.31 ms, batch 5 takes 10")]


def test_a_batch_is_a_cliff_if_its_share_is_below_four_fifths_of_a_neighbours():
    steps = [row(16, 7.0, 0.70), row(17, 9.0, 0.55), row(24, 9.1, 0.60), row(31, 9.2, 0.65)]
    assert find_cliffs(steps) == [Cliff(512, 17, "share 0.55, batch 16 has 0.70")]
    assert find_cliffs([row(16, 7.0, 0.70), row(17, 8.7, 0.57)]) == []


def test_only_the_next_sizes_within_a_factor_of_two_are_neighbours():
    # A model that launches bound has a share that grows with the batch.
    assert find_cliffs([row(1, 1.0, 0.2), row(3, 1.0, 0.6), row(7, 1.0, 0.9)]) == []
    assert find_cliffs([row(2, 1.0, 0.40), row(3, 1.1, 0.50), row(4, 1.2, 0.60)]) == []
    assert find_cliffs([row(2, 1.0, 0.2), row(4, 1.0, 0.4)]) == [Cliff(512, 2, "share 0.20, batch 4 has 0.40")]


def test_contexts_are_not_compared_with_each_other():
    assert find_cliffs([row(4, 20.0, 0.5, context=16000), row(5, 7.0, 0.8, context=512)]) == []


def test_a_row_says_how_uneven_its_steps_were():
    assert str(row(4, 10.0, 0.5, longest_ms=15.0)).endswith("share 0.50 (0.54 of a copy's)")
    assert str(row(4, 10.0, 0.5, longest_ms=15.1)).endswith("share 0.50 (0.54 of a copy's)  uneven")


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (1, 1)])
def test_a_plan_that_cannot_be_is_refused_by_name(sizes):
    with pytest.raises(InvalidInstanceConfig, match="batch_sizes="):
        SweepPlan(batch_sizes=sizes)
    with pytest.raises(InvalidInstanceConfig, match="contexts="):
        SweepPlan(contexts=sizes)


def test_the_usual_plan_is_one_that_can_be():
    assert SweepPlan().batch_sizes == BATCH_SIZES


def test_steps_are_chosen_as_for_an_instance_of_usual_size_even_if_few_sequences_are_asked_for(model_folder):
    config = sweep_config(str(model_folder("qwen3")), SweepPlan((1, 3), (64,)))
    assert config.max_num_seqs == 256


def test_a_sweep_says_its_rows_and_what_did_not_fit(model_folder):
    plan, lines, kept = SweepPlan((1, 2, 5), (20, 100, 500)), list[str](), list[Any]()
    # A sequence has up to 20 + 56, or 100 + 56 tokens: 5, and 10 blocks of 16.
    config = sweep_config(str(model_folder("qwen3")), plan, device="cpu", num_blocks=25)
    run_sweep(config, plan, lines.append, kept.append)
    assert [(row.context, row.batch) for row in kept] == [(20, 1), (20, 2), (100, 1), (100, 2)]
    text = "\n".join(lines)
    said = [(int(batch), "skipped" in rest) for batch, rest in re.findall(r"^ +(\d+) (.*)$", text, re.M)]
    assert said == [(batch, (context, batch) not in {(row.context, row.batch) for row in kept})
                    for context in plan.contexts for batch in plan.batch_sizes]  # fmt: skip
    assert "5 skipped: 5 x 76 tokens do not fit the pool of 400\n" in text
    assert "1 skipped: 556 tokens a sequence, the model takes 512\n" in text
    assert lines[-1].startswith("cliffs: ")


def test_a_sweep_in_which_nothing_fits_does_not_say_that_there_are_no_cliffs(model_folder):
    plan, lines = SweepPlan((1,), (500,)), list[str]()
    run_sweep(sweep_config(str(model_folder("qwen3")), plan, device="cpu"), plan, lines.append, lambda row: None)
    assert lines[-1] == "cliffs: nothing was measured"


def test_a_model_without_numbers_has_no_speed(numberless_model):
    plan, kept = SweepPlan((2,), (20,)), list[Any]()
    config = sweep_config(str(numberless_model), plan, device="cpu")
    with pytest.raises(LogitsNotFinite, match="not finite at output token 0: its weights are broken"):
        run_sweep(config, plan, lambda line: None, kept.append)
    assert kept == []


def test_all_requests_of_a_batch_decode_together_and_are_gone_afterwards(model_folder):
    # Prompts join one by one: a step computes 40 tokens at most.
    settings = {"device": "cpu", "max_num_batched_tokens": 40, "chunk_size": 40, "max_chunk_prefill_tokens": 40}
    config = sweep_config(str(model_folder("qwen3")), SweepPlan((3,), (64,)), **settings)
    runner = make_runner(config)
    sweep = BatchSweep(config, runner)
    assert sweep.obstacle(3, 64) is None
    measured = sweep.measure(3, 64)
    assert 0 < measured.step_s <= measured.longest_step_s
    # The timed steps are the 6th to the 53rd of the last request: it has read 64 + 29.5 tokens on average, the others,
    # which began before it, some more.
    least, most = (decode_limit(runner.model_config, runner.dtype, 3, 64 + n, sweep.limits) for n in (29.5, 34))
    assert least.read_bytes < measured.limit.read_bytes < most.read_bytes
    engine = sweep._engine
    assert not engine.has_work()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    engine.check_integrity()


class ClockedRunner:
    """By its own clock, steps with prompt tokens take a second, the 30th of the others 0.04 s, and the rest 0.01 s."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str, overlaps: bool) -> None:
        self.model_config = load_model_config(folder)
        self.pool = torch.zeros(100, 1)
        self.overlaps = overlaps
        self.now_s = 0.0
        self.num_decodes = 0

    def launch(self, batch: Any) -> Callable[[], StepResult]:
        if any(chunk.num_new_tokens > 1 for chunk in batch):
            time_s = 1.0
        else:
            self.num_decodes += 1
            time_s = 0.04 if self.num_decodes == 30 else 0.01
        result = [5 if chunk.samples else None for chunk in batch]

        def read() -> StepResult:
            self.now_s += time_s
            return StepResult(result)

        return read

    def is_idle(self) -> bool:
        return False


@pytest.mark.parametrize("overlaps", [False, True], ids=["computed at once", "overlapping"])
def test_only_steps_of_decodes_are_timed(model_folder, overlaps):
    folder = str(model_folder("qwen3"))
    config = sweep_config(folder, SweepPlan((4,), (64,)), max_num_batched_tokens=100)
    runner = ClockedRunner(folder, overlaps)
    sweep = BatchSweep(config, runner, lambda: runner.now_s)  # type: ignore[arg-type]
    for _ in range(2):
        measured = sweep.measure(4, 64)
        assert measured.step_s == pytest.approx(0.01)
        assert measured.longest_step_s == pytest.approx(0.04)
        runner.num_decodes = 0


def test_steps_that_take_long_are_timed_a_few_times_and_limits_only_where_they_are_asked_for(model_folder, monkeypatch):
    folder = str(model_folder("qwen3"))
    runner = ClockedRunner(folder, overlaps=False)
    monkeypatch.setattr(batch_sweep, "measure_limits", lambda *_: pytest.fail("nobody needs them"))
    config = sweep_config(folder, SweepPlan((4,), (64,)))
    sweep = BatchSweep(config, runner, lambda: 50 * runner.now_s)  # type: ignore[arg-type]
    assert sweep.step_s(4, 64) == pytest.approx(0.5)
    assert runner.num_decodes == 4 + 1 + 8, "warm, the end that the first is timed from, and the fewest"
    assert not sweep._engine.has_work()


@pytest.mark.parametrize(("overlaps", "behind_s"), [(False, 1.2), (True, 1.0)], ids=["computed at once", "overlapping"])
def test_a_prompt_takes_less_behind_another_where_launches_overlap(model_folder, monkeypatch, overlaps, behind_s):
    """The host takes 0.2 s to launch one: beside the step before it, if there is one in flight."""
    folder = str(model_folder("qwen3"))
    runner = ClockedRunner(folder, overlaps)
    launch, device_free_s = runner.launch, 0.0

    def launch_on_a_host(batch: Any) -> Callable[[], StepResult]:
        nonlocal device_free_s
        read = launch(batch)
        runner.now_s += 0.2
        device_free_s = max(device_free_s, runner.now_s) + 1.0

        def read_at_its_end(end_s: float = device_free_s) -> StepResult:
            result = read()
            runner.now_s = end_s
            return result

        return read_at_its_end

    monkeypatch.setattr(runner, "launch", launch_on_a_host)
    config = sweep_config(folder, SweepPlan((4,), (64,)))
    sweep = BatchSweep(config, runner, lambda: runner.now_s)  # type: ignore[arg-type]
    assert sweep.prompt_s(64) == (pytest.approx(1.2), pytest.approx(behind_s))
    assert not sweep._engine.has_work()
