"""Plots of a load, by matplotlib: SVG or PNG, depending on the file's name."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hbserve.load.generator import Load
from hbserve.load.report import percentile, values_of
from hbserve.plotting import figure_of


def plot_load(path: Path, load: Load, goals_s: Mapping[str, float], title: str) -> None:
    """Plot each request's TTFT over the time at which it was sent, the distributions of latencies, the output tokens of
    each second, and the number of requests at a time.

    Raises:
        PlottingUnavailable: matplotlib is not installed.
    """
    good = [each for each in load.outcomes if each.is_ok]
    begin_s = min((each.start_s for each in good), default=0.0)
    with figure_of(path, 2, 2, title) as axes:
        (first, shares), (tokens, running) = axes
        first.plot([each.start_s - begin_s for each in good], [1e3 * each.ttft_s for each in good], ".", ms=3)
        _label(first, "sent at, s", "TTFT, ms", goals_s.get("ttft"))
        for metric, name in {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL"}.items():
            values = [1e3 * each for each in values_of(good, metric)]
            if values:
                parts = range(101)
                shares.plot([percentile(values, part) for part in parts], parts, label=name)
        shares.set_xscale("log")
        _label(shares, "at most, ms", "% of requests, or of gaps", None)
        shares.legend()
        per_second = Counter(int(at_s - begin_s) for each in good for at_s in each.arrivals)
        seconds = range(max(per_second, default=0) + 1)
        tokens.step(seconds, [per_second[second] for second in seconds], where="post")
        _label(tokens, "s", "output tokens in each second", None)
        changes = sorted(
            change
            for each in good
            for change in ((each.start_s - begin_s, 1), (each.start_s - begin_s + each.latency_s, -1))
        )
        at_a_time, count = [], 0
        for _, change in changes:
            count += change
            at_a_time.append(count)
        running.step([at_s for at_s, _ in changes], at_a_time, where="post")
        _label(running, "s", "requests at a time", None)


def _label(axes: Any, across: str, up: str, goal_s: float | None) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    if goal_s is not None:
        axes.axhline(1e3 * goal_s, color="tab:red", lw=1, label="goal")
        axes.legend()
