"""The times at which a modelled engine launches its steps."""

import math
from collections.abc import Iterable

import pytest

from hbserve.simulator.launch_times import ModelledLaunchTimes
from hbserve.simulator.profile import Profile, StepLaw
from hbserve_core.engine.step_times import STEPS_REMEMBERED

GRAPH = 2304
"""Most tokens of a step that has a CUDA graph."""
AHEAD_S, MIXED_S, EAGER_S = 0.001, 0.004, 0.030
DECODES = (0.005, 16, 0)
MIXED = (0.050, 16, 2048)
PROMPT, TWO_PROMPTS = (0.047, 0, 2048), (0.094, 0, 4096)
TWO_BESIDE_DECODES = (0.094, 16, 4096)


def law(**more: float) -> StepLaw:
    ahead = {"launched_ahead_s": AHEAD_S, "launched_ahead_mixed_s": MIXED_S, "launched_ahead_eager_s": EAGER_S}
    values = {"name": "", "source": "", "device": "cuda:0", "kv_bytes_per_token": 1, "kv_tokens": 1} | ahead | more
    return StepLaw(
        Profile(prefill=[(1, 1.0)], decode=[(1, 1, 1.0)], transfer=[(1, 1.0)], handoff_s=0, message_s=0, **values)  # type: ignore[arg-type]
    )


def ahead_after(steps: Iterable[tuple[float, int, int]], *, of_step_s: float = 0.010) -> float:
    times = ModelledLaunchTimes(law(), GRAPH)
    for step_s, num_decodes, num_prompt_tokens in steps:
        times.ended(1, step_s, num_decodes, num_prompt_tokens)
    return times.ahead_s(of_step_s)


@pytest.mark.parametrize(
    ("steps", "expected_s"),
    [
        ([], AHEAD_S),
        ([DECODES] * 3, AHEAD_S),
        ([MIXED], AHEAD_S),
        ([MIXED, DECODES, MIXED], MIXED_S),
        ([PROMPT, PROMPT, PROMPT], AHEAD_S),
        ([PROMPT, TWO_PROMPTS], AHEAD_S),
        ([PROMPT, TWO_PROMPTS, PROMPT, TWO_PROMPTS, PROMPT], EAGER_S),
        ([MIXED, MIXED, PROMPT, TWO_PROMPTS, TWO_PROMPTS], EAGER_S),
        ([PROMPT, TWO_PROMPTS, TWO_PROMPTS, *[PROMPT] * STEPS_REMEMBERED], AHEAD_S),
        ([DECODES, TWO_BESIDE_DECODES] * 4, MIXED_S),
        ([MIXED, TWO_BESIDE_DECODES] * 2, EAGER_S),
    ],
)
def test_it_depends_on_the_longest_launches_of_late_but_for_one_and_for_those_that_nothing_would_have_made_in_time(
    steps: list[tuple[float, int, int]], expected_s: float
):
    assert ahead_after(steps) == expected_s


def test_behind_an_idle_device_no_launch_is_late():
    times = ModelledLaunchTimes(law(), GRAPH)
    for _ in range(4):
        times.ended(1, *PROMPT)
        times.idle()
        times.ended(1, *TWO_PROMPTS)
    assert times.ahead_s(0.010) == AHEAD_S


def test_short_steps_and_those_of_several_ranks_are_followed_at_once_where_steps_overlap():
    assert ahead_after([], of_step_s=0.0029) == math.inf
    assert ahead_after([], of_step_s=0.0031) == AHEAD_S
    assert ModelledLaunchTimes(law(tensor_parallel_size=2), GRAPH).ahead_s(0.010) == math.inf
    none = {"launched_ahead_s": 0.0, "launched_ahead_mixed_s": 0.0, "launched_ahead_eager_s": 0.0}
    assert ModelledLaunchTimes(law(tensor_parallel_size=2, **none), GRAPH).ahead_s(0.0029) == 0.0
