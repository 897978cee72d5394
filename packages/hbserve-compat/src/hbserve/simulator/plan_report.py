"""A plan as text, as a table and as a picture."""

from collections.abc import Iterator
from pathlib import Path

from hbserve.plotting import figure_of
from hbserve.simulator.plan import Plan, Trial, over_rates

SHARES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
"""Multiples of the question's rate that the picture shows."""


def lines(plan: Plan) -> Iterator[str]:
    """Yield a table of the layouts that were tried, and the answer, as lines of text."""
    question = plan.question
    yield (
        f"{question.profile.name} ({question.profile.device}), {question.input_len} in, {question.output_len} out, "
        f"{question.rate:g} req/s; TTFT {1e3 * question.ttft_s:g} ms, TPOT {1e3 * question.tpot_s:g} ms"
        + (f", ITL p99 {1e3 * question.itl_s:g} ms" if question.itl_s else "")
        + f", for {question.attainment:.0%} of requests"
    )
    yield ""
    yield f"{'layout':34}{'GPUs':>5}{'attained':>10}{'TTFT p90':>11}{'TPOT p90':>11}{'ITL p99':>11}  busy"
    for each in plan.trials:
        yield _row(plan, each)
    yield ""
    yield from _answer(plan)


def _gpus(plan: Plan, trial: Trial) -> int:
    return trial.layout.count * plan.question.profile.tensor_parallel_size


def _in_gpus(plan: Plan, trial: Trial) -> str:
    count = _gpus(plan, trial)
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _row(plan: Plan, trial: Trial) -> str:
    busy = ", ".join(f"{role} {share:.0%}" for role, share in trial.busy.items())
    mark = "*" if trial is plan.best else " "
    return (
        f"{mark} {trial.layout.describe():32}{_gpus(plan, trial):5}{trial.attainment:10.1%}"
        f"{1e3 * trial.ttft_p90_s:8.0f} ms{1e3 * trial.tpot_p90_s:8.1f} ms{1e3 * trial.itl_p99_s:8.1f} ms  {busy}"
    )


def _answer(plan: Plan) -> Iterator[str]:
    best = plan.best
    if best is None:
        yield "No number of instances that was tried is enough. The table says which goal is missed: relax it."
        return
    yield f"Take {best.layout.describe()}: {_in_gpus(plan, best)}."
    other = plan.together if best is plan.apart else plan.apart
    if best is plan.apart:
        yield "Prefill and decode apart: " + (
            f"{other.layout.describe()} would need {_in_gpus(plan, other)}."
            if other is not None
            else "no number of hybrid instances that was tried is enough, for prompts delay tokens."
        )
        if other is not None and other.layout.count == best.layout.count:
            yield "Hybrid instances of the same number do too, and are simpler: apart, more requests keep their goals."
    else:
        yield "Do not disaggregate: " + (
            f"{other.layout.describe()} would need {_in_gpus(plan, other)}."
            if other is not None
            else "no number of prefill and decode instances that was tried is enough."
        )
    yield f"The profile: {plan.question.profile.source}"


def plot_plan(plan: Plan, path: Path) -> None:
    """Plot attainment and latencies of the two best layouts at several rates. Raises PlottingUnavailable, OSError,
    ValueError."""
    question = plan.question
    chosen = [each for each in (plan.apart, plan.together) if each is not None] or plan.trials[:1]
    goals_ms = {"TTFT p90, ms": 1e3 * question.ttft_s, "TPOT p90, ms": 1e3 * question.tpot_s}
    title = f"{question.profile.name}: {question.input_len} in, {question.output_len} out"
    with figure_of(path, 1, 3, title) as ((attained, ttft, tpot),):
        for each in chosen:
            trials = over_rates(plan, each, SHARES)
            rates = [trial.rate for trial in trials]
            label = f"{each.layout.describe()} ({_in_gpus(plan, each)})"
            attained.plot(rates, [100 * trial.attainment for trial in trials], "o-", label=label)
            ttft.plot(rates, [1e3 * trial.ttft_p90_s for trial in trials], "o-")
            tpot.plot(rates, [1e3 * trial.tpot_p90_s for trial in trials], "o-")
        attained.axhline(100 * question.attainment, color="tab:red", lw=1, label="goal")
        attained.set_ylabel("% of requests that keep their goals")
        attained.legend()
        for axes, (name, goal_ms) in zip((ttft, tpot), goals_ms.items(), strict=True):
            axes.axhline(goal_ms, color="tab:red", lw=1)
            axes.set_ylabel(name)
        ttft.set_yscale("log")
        for axes in (attained, ttft, tpot):
            axes.axvline(question.rate, color="gray", lw=1, ls=":")
            axes.set_xlabel("requests a second")
            axes.grid(alpha=0.3)
