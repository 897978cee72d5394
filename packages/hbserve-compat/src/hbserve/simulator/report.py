"""Figures of a simulation, with the names that `hbserve bench serve` uses."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from hbserve.load.report import percentile, summary
from hbserve.simulator.simulation import Results

PERCENTILES = (50.0, 90.0, 99.0)


def attained(results: Sequence[Results], goals_s: Mapping[str, float]) -> float:
    """Return the share of requests that meet every goal. Goals are given by ttft, tpot and e2el."""
    ended = sum(len(each.ttfts_s) for each in results)
    total = ended + sum(each.failed for each in results)
    good = sum(
        all(value <= goals_s[metric] for metric, value in zip(METRICS, values, strict=True) if metric in goals_s)
        for each in results
        for values in zip(each.ttfts_s, each.tpots_s, each.e2els_s, strict=True)
    )
    return good / total if total else 0.0


METRICS = ("ttft", "tpot", "e2el")


def gap_percentile(results: Sequence[Results], share: float) -> float:
    """Return a percentile of the times between two tokens of a sequence, in seconds: the smallest time that `share`
    percent do not exceed."""
    gaps: Counter[float] = sum((each.gaps_s for each in results), Counter())
    left = share / 100 * gaps.total()
    for gap_s, count in sorted(gaps.items()):
        left -= count
        if left <= 0:
            return gap_s
    return 0.0


def figures(results: Sequence[Results], goals_s: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of all cells together, and some of each cell."""
    duration_s = max(each.duration_s for each in results)
    per_s = 1 / duration_s if duration_s else 0.0  # 0 if all requests were refused at once
    completed = sum(len(each.ttfts_s) for each in results)
    tokens_in, tokens_out = (sum(getattr(each, name) for each in results) for name in ("input_tokens", "output_tokens"))
    found: dict[str, Any] = {
        "duration": duration_s,
        "completed": completed,
        "failed": sum(each.failed for each in results),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": completed * per_s,
        "output_throughput": tokens_out * per_s,
        "requests_tried_again": sum(each.tried_again for each in results),
        "errors": dict(sum((each.errors for each in results), Counter[str]())),
        "prefix_hit_rate": _share(
            sum(each.prefix_tokens for each in results), sum(each.asked_tokens for each in results)
        ),
    }
    if goals_s:
        found["slo_attainment"] = attained(results, goals_s)
        found["request_goodput"] = found["slo_attainment"] * (completed + found["failed"]) * per_s
    for metric, field in {"ttft": "ttfts_s", "tpot": "tpots_s", "e2el": "e2els_s", "handoff": "handoffs_s"}.items():
        values = [1e3 * value for value in chain.from_iterable(getattr(each, field) for each in results)]
        found |= summary(metric, values, PERCENTILES)
    found |= {f"p{share:g}_itl_ms": 1e3 * gap_percentile(results, share) for share in PERCENTILES}
    return found | {"busy": {role: busy_of(results, role) for role in _roles(results)}, "cells": _cells(results)}


def _cells(results: Sequence[Results]) -> list[dict[str, float]]:
    """Return the figures of each cell."""
    return [
        {
            "completed": len(each.ttfts_s),
            "p99_ttft_ms": 1e3 * percentile(each.ttfts_s, 99),
            "prefix_hit_rate": _share(each.prefix_tokens, each.asked_tokens),
            "busy": sum(each.busy.values()) / len(each.busy),
        }
        for each in results
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _roles(results: Sequence[Results]) -> list[str]:
    return sorted({name.partition("-")[0] for each in results for name in each.busy}, reverse=True)


def busy_of(results: Sequence[Results], role: str) -> float:
    """Return the share of the time in which instances of a role compute."""
    shares = [busy for each in results for name, busy in each.busy.items() if name.startswith(role)]
    return sum(shares) / len(shares) if shares else 0.0


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the figures as lines of text."""
    busy = ", ".join(f"{role} {share:.0%}" for role, share in found["busy"].items())
    rows = [
        f"{found['completed']} requests in {found['duration']:.1f} s of virtual time, {found['failed']} failed, "
        f"{found['requests_tried_again']} tried again",
        f"{found['request_throughput']:.2f} req/s, {found['output_throughput']:.0f} tok/s; busy: {busy}; "
        f"prefix hits {found['prefix_hit_rate']:.1%}",
    ]
    if "slo_attainment" in found:
        rows.append(f"{found['slo_attainment']:.1%} meet the goals: goodput {found['request_goodput']:.2f} req/s")
    for metric, name in {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "handoff": "hand-off", "e2el": "E2EL"}.items():
        values = ", ".join(f"p{share:g} {found[f'p{share:g}_{metric}_ms']:.1f}" for share in PERCENTILES)
        rows.append(f"{name + ', ms:':14}{values}")
    if len(found["cells"]) > 1:
        rows.append("cells:        completed   TTFT p99   prefix hits   busy")
        rows += [
            f"  {i:<12}{each['completed']:9}{each['p99_ttft_ms']:9.0f} ms{each['prefix_hit_rate']:13.1%}"
            f"{each['busy']:7.0%}"
            for i, each in enumerate(found["cells"])
        ]
    return rows
