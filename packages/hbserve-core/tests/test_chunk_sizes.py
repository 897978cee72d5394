"""`chunk_size: auto`: how much of which prompt a step computes, by what steps take and by what else waits."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hbserve_core import Engine, InstanceConfig
from hbserve_core.bench.simulated_device import H100_06B, H100_8B, SimulatedDevice
from hbserve_core.engine.step_times import (
    FEWEST_BESIDE_DECODES,
    FEWEST_TOKENS,
    LAUNCH_S,
    SHORT_TOKENS,
    STEP_S,
    ChunkSizes,
    StepTimes,
    StepWork,
)
from hbserve_rpc import SamplingParams

SIZES = ["512", "1024", "2048", "4096", "8192"]
BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks/chunk_sizes.py"


def make_engine(law: Any = H100_8B, num_blocks: int = 6000, **settings: Any) -> Engine:
    model: Any = SimpleNamespace(vocab_size=50, max_model_len=1 << 20, reach=0, eos_token_ids=())
    device = SimulatedDevice(model, num_blocks, law)
    chosen: dict[str, Any] = {"chunk_size": "auto", "max_num_batched_tokens": 8192, "max_chunk_prefill_tokens": 8192}
    config = InstanceConfig(model_path="", prefix_caching=False, **(chosen | settings))
    return Engine(config, device, device.clock)


def add(engine: Engine, name: str, length: int, count: int = 1, **kind: Any) -> None:
    engine.add(name, [1] * length, SamplingParams(0, count), **kind)


def steps_of(engine: Any) -> Any:
    """Of its simulated device: begin, end, and new tokens by request."""
    return engine._runner.steps


def run(engine: Engine) -> list[dict[str, int]]:
    """Steps until nothing is left: new tokens by request."""
    first = len(steps_of(engine))
    while engine.has_work():
        for output in engine.step():
            if output.is_last or output.token_ids:
                engine.hold(output.request_id)
                engine.release(output.request_id)
    engine.check_integrity()
    return [tokens for _, _, tokens in steps_of(engine)[first:]]


def warmed(law: Any = H100_8B, **settings: Any) -> Engine:
    """It knows how long steps take."""
    engine = make_engine(law, **settings)
    for number in range(40):
        add(engine, str(number), 40_000 if number % 4 == 0 else 8000)
        run(engine)
    return engine


def test_a_step_has_as_many_prompt_tokens_as_take_its_time_and_not_too_few():
    for law, expected in ((H100_8B, FEWEST_TOKENS), (H100_06B, 3100)):
        engine = warmed(law)
        add(engine, "r", 8000)
        assert run(engine)[0]["r"] == pytest.approx(expected, rel=0.1)
    work = StepWork(0, 0, 0).with_chunk(0, 3100)
    assert H100_06B(work) == pytest.approx(STEP_S, rel=0.1)


def test_before_anything_is_known_a_step_has_the_fewest_tokens():
    engine = make_engine()
    add(engine, "r", 3000)
    assert run(engine)[0] == {"r": FEWEST_TOKENS}


def test_the_more_waits_the_longer_a_step_is():
    engine = warmed()
    for number in range(6):
        add(engine, str(number), 8000)
    steps = [sum(tokens.values()) for tokens in run(engine)]
    assert steps[0] == 6 * 8000 // 8
    assert min(steps[:-1]) >= FEWEST_TOKENS
    assert steps[:10] == sorted(steps[:10], reverse=True)


def test_a_short_prompt_comes_before_long_ones_and_the_shortest_first():
    engine = warmed()
    add(engine, "long", 30_000)
    engine.step()
    for name, length in [("other long", 20_000), ("short", 700), ("shorter", 200)]:
        add(engine, name, length)
    first, second, *_ = run(engine)
    assert (first["short"], first["shorter"]) == (700, 200)
    assert "other long" not in second


def test_long_prompts_are_computed_one_after_the_other():
    engine = warmed()
    add(engine, "a", 9000)
    add(engine, "b", 9000)
    steps = run(engine)
    assert sum("a" in tokens and "b" in tokens for tokens in steps) <= 1


def test_short_prompts_leave_a_share_to_a_long_one():
    engine = warmed()
    add(engine, "long", 30_000)
    engine.step()
    for number in range(30):
        add(engine, str(number), SHORT_TOKENS)
    steps = run(engine)
    for tokens in steps[: 30_000 // 8000]:
        assert tokens["long"] >= sum(tokens.values()) // 10


def test_a_short_prompt_takes_no_blocks_that_a_longer_one_waits_for():
    engine = make_engine(num_blocks=200)
    add(engine, "runs", 150 * 16 - 1, 20)
    engine.step()
    add(engine, "waits", 100 * 16)
    add(engine, "large", 60 * 16)
    add(engine, "short", 16)
    engine.step()
    engine.step()
    assert {each.request_id for each in engine._scheduler.waiting} == {"waits", "large", "short"}
    run(engine)


def test_of_a_prompt_that_is_sent_the_last_chunk_is_half_a_step_at_most():
    engine = warmed()
    for length in (1500, 1800, 2047, 2048, 5000):
        add(engine, "r", length, prefill_only=True)
        sizes = [tokens["r"] for tokens in run(engine)]
        assert sum(sizes) == length
        assert len(sizes) == -(-length // FEWEST_TOKENS), "no more steps than otherwise"
        assert sizes[-1] <= FEWEST_TOKENS // 2
        assert max(sizes) <= 1.5 * FEWEST_TOKENS


@pytest.mark.parametrize("limit", ["max_num_batched_tokens", "max_chunk_prefill_tokens"])
def test_no_step_has_more_tokens_than_it_may(limit):
    engine = warmed(**{limit: 1100})
    add(engine, "decodes", 10, 200)
    engine.step()
    for number in range(5):
        add(engine, str(number), 1000 + 300 * number, prefill_only=True)
    assert max(sum(tokens.values()) for tokens in run(engine)) <= 1101


def test_with_a_target_for_the_time_between_tokens_steps_take_no_longer():
    engine = make_engine(itl_target_ms=15)
    for number in range(16):
        add(engine, f"decodes {number}", 500, 4000)
    for number in range(40):
        add(engine, str(number), 6000)
    durations = []
    while any(not name.startswith("decodes") for name in engine._sequences):
        for output in engine.step():
            assert output.error is None
        begin, end, tokens = steps_of(engine)[-1]
        durations.append((end - begin, sum(tokens.values())))
    known = durations[len(durations) // 2 :]
    assert max(time for time, _ in known) < 0.0165
    full = [time for time, count in known if count > 100]
    assert sorted(full)[len(full) // 2] > 0.0135, "and not much shorter: prompts are to go on"
    for number in range(16):
        engine.release(f"decodes {number}")


def test_prompts_go_on_where_decodes_alone_take_longer_than_the_target():
    engine = make_engine(lambda work: 0.02 + 1e-5 * work.num_tokens, itl_target_ms=5)
    add(engine, "decodes", 20, 3000)
    for _ in range(3):
        engine.step()
    for number in range(20):
        add(engine, str(number), 600)
    before = len(steps_of(engine))
    for _ in range(100):
        engine.step()
    steps = [tokens for _, _, tokens in steps_of(engine)[before + 20 :]]
    assert all(tokens["decodes"] == 1 for tokens in steps)
    assert min(sum(tokens.values()) for tokens in steps) >= FEWEST_BESIDE_DECODES
    for name in list(engine._sequences):
        engine.release(name)


def test_sizes_that_were_never_seen_are_taken_to_be_in_proportion():
    times = StepTimes()
    config = InstanceConfig(model_path="", chunk_size="auto", itl_target_ms=10)
    sizes, decode = ChunkSizes(config, config.role, times.predict_s), StepWork(1, 20, 20)
    assert sizes.of_step(decode, [], []) == FEWEST_BESIDE_DECODES
    for _ in range(20):
        times.learn(decode.with_chunk(0, FEWEST_BESIDE_DECODES), 0.004)
    assert FEWEST_BESIDE_DECODES < sizes.of_step(decode, [], []) <= 2.5 * FEWEST_BESIDE_DECODES


def waiting(*lengths: int) -> Any:
    return [SimpleNamespace(num_computed_tokens=0, num_uncomputed_tokens=each, prefill_only=True) for each in lengths]


def test_a_step_beyond_the_cuda_graphs_is_one_that_the_host_launches_in_less_time_than_the_device_computes():
    config = InstanceConfig(
        model_path="", role="prefill", max_num_batched_tokens=16384, max_chunk_prefill_tokens=16384, max_num_seqs=8
    )
    in_graph, nothing, many = config.most_graph_tokens, StepWork(0, 0, 0), waiting(*[2048] * 40)

    def sizes(token_s: float, has_graphs: bool = True) -> ChunkSizes:
        return ChunkSizes(config, config.role, lambda work: token_s * work.num_tokens, has_graphs=has_graphs)

    quick, slow, unknown = sizes(2.6e-6), sizes(24e-6), ChunkSizes(config, config.role, lambda _: None, has_graphs=True)
    assert quick.of_step(nothing, [], waiting(9000)) == in_graph
    assert quick.of_step(nothing, [], many) == in_graph
    assert quick.of_step(StepWork(16, 8000, 16000), [], many) == in_graph - 16
    assert sizes(2.6e-6, has_graphs=False).of_step(nothing, [], many) == 40 * 2048 // 8
    assert slow.of_step(nothing, [], many) == 40 * 2048 // 8
    assert unknown.of_step(nothing, [], many) == in_graph
    of_two = waiting(in_graph + 1000)[
        0
    ]  # its last chunk would be half a step, and the one before it longer than a graph
    assert quick.of_step(nothing, [], [of_two]) == in_graph
    assert quick.of(of_two, of_two.num_uncomputed_tokens, in_graph, 16384) == in_graph
    assert LAUNCH_S / 2.6e-6 < 16384, "of so many tokens it would be another matter"
    assert quick.of_step(nothing, [], waiting(*[2048] * 64)) == 64 * 2048 // 8


def test_a_small_model_serves_bursts_from_its_cuda_graphs():
    """Steps without one take as long as their launches, which on a busy host is five times what the device needs."""

    def law(work: StepWork) -> float:
        return max(H100_06B(work), 0.036 if work.num_tokens > engine.config.most_graph_tokens else 0.0)

    engine = make_engine(lambda work: law(work), role="prefill")
    engine._runner.device = torch.device("cuda")
    engine = Engine(engine.config, engine._runner, cast("Any", engine._runner).clock)
    for burst in range(12):
        for number in range(8):
            add(engine, f"{burst} {number}", 2048, prefill_only=True)
        run(engine)
    longest = max(sum(tokens.values()) for _, _, tokens in steps_of(engine))
    assert longest <= engine.config.most_graph_tokens


def test_where_nobody_decodes_a_target_makes_no_step_shorter():
    config = InstanceConfig(model_path="", itl_target_ms=1)
    sizes = ChunkSizes(config, config.role, lambda work: 1e-5 * work.num_tokens)
    assert sizes.of_step(StepWork(0, 0, 0), [], []) == FEWEST_TOKENS
    assert sizes.of_step(StepWork(1, 20, 20), [], []) < 2 * FEWEST_BESIDE_DECODES


@pytest.mark.warm
@pytest.mark.parametrize("device", ["8b", "0.6b"])
def test_over_mixed_lengths_no_fixed_size_gives_a_first_token_sooner(device):
    command = [sys.executable, BENCHMARK, "--simulated", device, "--requests", "600", "--seed", "1", "--sizes", *SIZES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[:3] for line in done.stdout.splitlines()[1:]]
    found = {size: (float(p50), float(p99)) for size, p50, p99 in rows}
    p50, p99 = found.pop("auto")
    assert len(found) == len(SIZES)
    assert p50 <= min(each for each, _ in found.values())
    assert p99 <= min(each for _, each in found.values())
