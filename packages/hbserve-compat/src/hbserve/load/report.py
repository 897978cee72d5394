"""Figures of a load, with the names that `vllm bench serve` uses in its JSON file and on the screen."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hbserve.load.asking import Outcome
from hbserve.load.generator import Load
from hbserve.options import MOST
from hbserve_rpc import InvalidRequest
from hbserve_rpc.plain_values import shown

METRICS = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2el": "E2EL",
    "client_queue_time": "Client Queue Time",
    "handoff": "Hand-off",
}
"""Metrics for which a report has mean, median, spread and percentiles, with their names on the screen."""
HEADERS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "client_queue_time": "Client-side Queueing",
    "handoff": "First Token to Second",
}
SERVER_FIELDS = {
    "server_queue_times": "queue_time_ms",
    "server_ttfts": "time_to_first_token_ms",
    "server_handoffs": "handoff_ms",
    "server_kv_transfer_times": "kv_transfer_time_ms",
}
"""Figures that servers send for each request, by our name: milliseconds there, seconds here. vLLM has the first two."""


@dataclass(frozen=True)
class Wanted:
    """The contents that were asked for in a report."""

    metrics: Sequence[str]
    percentiles: Sequence[float]
    goals_s: Mapping[str, float]
    """The limits of `--goodput` for a request, in seconds, by ttft, tpot and e2el."""
    has_concurrency_limit: bool = False


def goals_of(texts: Iterable[str]) -> dict[str, float]:
    """Parse limits of the form `METRIC:MS`. Returns seconds by ttft, tpot and e2el. Raises InvalidRequest."""
    goals_s: dict[str, float] = {}
    for text in texts:
        metric, _, milliseconds = text.partition(":")
        try:
            limit_ms = float(milliseconds)
        except ValueError:
            raise InvalidRequest(f"--goodput={shown(text)}: expected METRIC:MS") from None
        if not 0 < limit_ms <= MOST:
            raise InvalidRequest(f"--goodput={shown(text)}: expected milliseconds above 0, and at most {MOST}")
        if metric not in ("ttft", "tpot", "e2el"):
            raise InvalidRequest(f"--goodput={shown(metric)}: expected ttft, tpot or e2el")
        if metric in goals_s:
            raise InvalidRequest(f"--goodput={shown(text)}: there is a goal for {metric} already")
        goals_s[metric] = limit_ms / 1e3
    return goals_s


def percentile(values: Iterable[float], share: float) -> float:
    """Return a percentile, interpolated between the two neighbouring values as numpy does by default; 0 if there are no
    values. `share` is 0 to 100."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = share / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _of_request(outcome: Outcome, metric: str) -> float:
    """Return the value of a metric for goodput. A request with a single token has a time per token of 0."""
    values: dict[str, Callable[[], float]] = {
        "ttft": lambda: outcome.ttft_s,
        "tpot": lambda: outcome.tpot_s or 0.0,
        "e2el": lambda: outcome.latency_s,
    }
    return values[metric]()


def handoff_s(outcome: Outcome) -> float | None:
    """Return the time from the first token to the second: the server's figure if it sends one, otherwise the measured
    one. None: there is neither."""
    by_server = outcome.server.get("handoff_ms")
    if by_server is not None:
        return float(by_server) / 1e3
    return outcome.itls_s[0] if outcome.itls_s else None


def values_of(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """Return the values of a metric, in seconds, over requests that succeeded."""
    match metric:
        case "ttft":
            return [each.ttft_s for each in outcomes]
        case "tpot":
            return [each.tpot_s for each in outcomes if each.tpot_s is not None]
        case "itl":
            return [gap for each in outcomes for gap in each.itls_s]
        case "e2el":
            return [each.latency_s for each in outcomes]
        case "client_queue_time":
            return [each.queue_s for each in outcomes]
        case _:
            return [found for each in outcomes if (found := handoff_s(each)) is not None]


def figures(load: Load, wanted: Wanted) -> dict[str, Any]:
    """Return the figures of a load, as they are in the JSON file."""
    good = [each for each in load.outcomes if each.is_ok]
    num_in, num_out = sum(each.prompt_len for each in good), sum(each.output_tokens for each in good)
    peak_tokens, peak_requests = _peaks(good)
    result: dict[str, Any] = {
        "duration": load.duration_s,
        "completed": len(good),
        "failed": len(load.outcomes) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(good) / load.duration_s,
        "request_goodput": None,
        "output_throughput": num_out / load.duration_s,
        "total_token_throughput": (num_in + num_out) / load.duration_s,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "client_cpu_share": load.watch.cpu_share,
        "client_lag_p99_ms": 1e3 * load.watch.lag_p99_s(),
        "client_is_bottleneck": bool(complaint(load)),
    }
    if wanted.goals_s:
        result |= _attainment(load, good, wanted.goals_s)
    for metric in [*wanted.metrics, *(["client_queue_time"] if wanted.has_concurrency_limit else [])]:
        result |= summary(metric, [1e3 * each for each in values_of(good, metric)], wanted.percentiles)
    return result | _by_server(good)


def complaint(load: Load) -> str:
    """Say why the figures of a load measure the client rather than the server; empty if they do not."""
    good = [each for each in load.outcomes if each.is_ok]
    if not good:
        return ""
    usual = [statistics.median(values) for metric in ("ttft", "itl") if (values := values_of(good, metric))]
    return load.watch.complaint(min(usual, default=0.0))


def _attainment(load: Load, good: Sequence[Outcome], goals_s: Mapping[str, float]) -> dict[str, Any]:
    met = sum(all(_of_request(each, metric) <= goal for metric, goal in goals_s.items()) for each in good)
    sent = len(load.outcomes)
    shares = {
        f"{metric}_attainment": sum(_of_request(each, metric) <= goal for each in good) / sent
        for metric, goal in goals_s.items()
    }
    return {"request_goodput": met / load.duration_s, "slo_attainment": met / sent, **shares}


def summary(metric: str, values_ms: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Return mean, median, spread and percentiles of a metric; zeros if there are no values."""
    values = values_ms or [0.0]
    return {
        f"mean_{metric}_ms": statistics.fmean(values),
        f"median_{metric}_ms": statistics.median(values),
        f"std_{metric}_ms": statistics.pstdev(values),
        **{f"p{share:g}_{metric}_ms": percentile(values, share) for share in percentiles},
    }


def _peaks(good: Sequence[Outcome]) -> tuple[float, int]:
    """Return the most tokens and the most requests in any one second, counted from the first request on."""
    if not good:
        return 0.0, 0
    begin_s = min(each.start_s for each in good)
    tokens, requests = Counter[int](), Counter[int]()
    for each in good:
        tokens.update(int(at_s - begin_s) for at_s in each.arrivals)
        requests.update(range(int(each.start_s - begin_s), int(each.start_s + each.latency_s - begin_s) + 1))
    return float(max(tokens.values(), default=0)), max(requests.values(), default=0)


def _by_server(good: Sequence[Outcome]) -> dict[str, Any]:
    """Return figures of a server with separate prefill and decode: bytes moved, pairs of instances, and retries."""
    pairs = Counter(
        f"{each.server.get('prefill_instance')} > {each.server.get('decode_instance')}"
        for each in good
        if each.server.get("decode_instance")
    )
    if not pairs:
        return {}
    return {
        "kv_bytes": sum(each.server.get("kv_bytes", 0) for each in good),
        "requests_by_instances": dict(pairs),
        "requests_tried_again": sum(each.server.get("num_attempts", 1) > 1 for each in good),
    }


def details(load: Load) -> dict[str, Any]:
    """Return the figures of each request, for `--save-detailed`."""
    outcomes = load.outcomes
    lists: dict[str, list[Any]] = {
        "input_lens": [each.prompt_len for each in outcomes],
        "output_lens": [each.output_tokens if each.is_ok else 0 for each in outcomes],
        "ttfts": [each.ttft_s for each in outcomes],
        "itls": [each.itls_s for each in outcomes],
        "latencies": [each.latency_s for each in outcomes],
        "start_times": [each.start_s for each in outcomes],
        "queue_times": [each.queue_s for each in outcomes],
        "generated_texts": [each.text for each in outcomes],
        "errors": [each.error for each in outcomes],
    }
    for name, field in SERVER_FIELDS.items():
        values = [each.server.get(field) for each in outcomes]
        if any(value is not None for value in values):
            lists[name] = [None if value is None else value / 1e3 for value in values]
    return lists


def lines(result: Mapping[str, Any], wanted: Wanted) -> Iterator[str]:
    """Yield the figures as lines of text."""
    yield f"{' Serving Benchmark Result ':=^50}"
    rows = {
        "Successful requests:": result["completed"],
        "Failed requests:": result["failed"],
        "Maximum request concurrency:": result["max_concurrency"],
        "Request rate configured (RPS):": result["request_rate"],
        "Benchmark duration (s):": result["duration"],
        "Total input tokens:": result["total_input_tokens"],
        "Total generated tokens:": result["total_output_tokens"],
        "Request throughput (req/s):": result["request_throughput"],
        "Request goodput (req/s):": result["request_goodput"],
        "Requests within all goals:": result.get("slo_attainment"),
        "Output token throughput (tok/s):": result["output_throughput"],
        "Peak output token throughput (tok/s):": result["max_output_tokens_per_s"],
        "Peak concurrent requests:": result["max_concurrent_requests"],
        "Total token throughput (tok/s):": result["total_token_throughput"],
        "KV moved (MiB):": result["kv_bytes"] / 2**20 if "kv_bytes" in result else None,
    }
    for name, value in rows.items():
        if value is not None:
            yield f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"
    for metric, title in METRICS.items():
        if result["completed"] and f"mean_{metric}_ms" in result:
            yield f"{HEADERS[metric]:-^50}"
            for word in ("mean", "median", *(f"p{share:g}" for share in wanted.percentiles)):
                yield f"{f'{word.capitalize()} {title} (ms):':<40} {result[f'{word}_{metric}_ms']:<10.2f}"
    yield "=" * 50
