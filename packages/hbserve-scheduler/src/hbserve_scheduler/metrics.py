"""Metrics of a deployment, made from its scheduler's stats: of requests, links, and instances."""

from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter

from hbserve_rpc.counts import LinkCounts
from hbserve_rpc.instance_metrics import instance_metrics
from hbserve_rpc.messages import SchedulerStats
from hbserve_rpc.metrics_text import Family

COUNTERS = {
    "requests": "total_requests",
    "requests_completed": "completed_requests",
    "requests_failed": "failed_requests",
    "requests_aborted": "aborted_requests",
    "requests_rejected": "rejected_requests",
    "request_retries": "retries",
    "request_placements_refused": "refusals",
    "local_prefills": "local_prefills",
    "rpc_frames_dropped": "rpc.dropped_frames",
    "rpc_notifications_failed": "rpc.failed_notifications",
}
"""Field of the stats, by name of the metric without prefix and suffix."""


def deployment_metrics(stats: SchedulerStats) -> Iterator[Family]:
    yield from _of_requests(stats)
    yield from instance_metrics(stats.instances)
    yield from _of_links(stats.links.values())


def _of_requests(stats: SchedulerStats) -> Iterator[Family]:
    yield _single("num_requests_waiting", "gauge", "Not given to an instance yet.", stats.waiting_requests)
    yield _single("num_tokens_waiting", "gauge", "Of the prompts of these.", stats.waiting_tokens)
    yield _single("num_requests_running", "gauge", "With instances.", stats.running_requests)
    for name, field in COUNTERS.items():
        yield _single(name, "counter", f"Of the schedulers: {field}.", attrgetter(field)(stats))
    yield _single("prompt_tokens", "counter", "Of requests that have a first token.", stats.prompt_tokens)
    yield _single("generation_tokens", "counter", "Tokens that were delivered.", stats.output_tokens)
    labelled: dict[str, tuple[str, str, Mapping[str, float]]] = {
        "request_success": ("finished_reason", "Requests that have ended.", stats.ended_requests),
        "request_attempts_failed": ("cause", "Also of retried ones.", stats.failed_attempts),
        "request_delay_seconds": ("cause", "That requests have waited for others.", stats.delay_s),
        "requests_delayed": ("cause", "Held up for a quarter of their time.", stats.delayed_requests),
    }
    for name, (label, documentation, values) in labelled.items():
        family = Family(f"hbserve:{name}", "counter", documentation, [label])
        family.add_each(values)
        yield family
    for name, histogram in stats.histograms.items():
        family = Family(f"hbserve:{name}", "histogram", "Of requests that have all of their tokens.")
        family.add_histogram(histogram)
        yield family


def _single(name: str, kind: str, documentation: str, value: float) -> Family:
    family = Family(f"hbserve:{name}", "counter" if kind == "counter" else "gauge", documentation)
    family.add(value)
    return family


def _of_links(links: Iterable[LinkCounts]) -> Iterator[Family]:
    pair = ["prefill", "decode"]
    up = Family("hbserve:link_up", "gauge", "1 while both are connected; 0 while they cannot be.", pair)
    active = Family("hbserve:link_transfers_active", "gauge", "Granted, and not all there.", pair)
    ended = Family("hbserve:kv_transfers", "counter", "That have ended.", [*pair, "outcome"])
    moved = Family("hbserve:kv_transfer_bytes", "counter", "Moved from one to the other.", pair)
    took = Family("hbserve:kv_transfer_moving_seconds", "counter", "Added over transfers.", pair)
    for each in links:
        names = each.prefill, each.decode
        if each.is_up is not None:
            up.add(int(each.is_up), *names)
        active.add(each.active, *names)
        moved.add(each.num_bytes, *names)
        took.add(each.time_s, *names)
        for outcome, count in ({"completed": 0, "failed": 0} | each.outcomes).items():
            ended.add(count, *names, outcome)
    yield from (up, active, ended, moved, took)
