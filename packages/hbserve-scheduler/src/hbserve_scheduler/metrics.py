"""Metrics of a deployment, made from its scheduler's stats: of requests, links, and instances."""

from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter

from hbserve_rpc.counts import LinkCounts
from hbserve_rpc.instance_metrics import instance_metrics
from hbserve_rpc.messages import SchedulerStats
from hbserve_rpc.metrics_text import Family

COUNTERS = {
    "requests": ("total_requests", "Requests that were submitted."),
    "requests_completed": ("completed_requests", "Requests that have all of their tokens."),
    "requests_failed": ("failed_requests", "Requests that have failed."),
    "requests_aborted": ("aborted_requests", "Requests that their client has left or aborted."),
    "requests_rejected": ("rejected_requests", "Requests that were refused, because too many waited."),
    "request_retries": ("retries", "Attempts at requests after their first one."),
    "request_placements_refused": (
        "refusals",
        "Places that an instance has refused, because other schedulers had given it enough to do.",
    ),
    "local_prefills": ("local_prefills", "Prompts that a decode instance has computed itself."),
    "rpc_frames_dropped": (
        "rpc.dropped_frames",
        "RPC messages to the scheduler that were unreadable, or of a client that is not known.",
    ),
    "rpc_notifications_failed": (
        "rpc.failed_notifications",
        "RPC notifications to the scheduler that were refused, or whose handler failed.",
    ),
}
"""Field of the stats, and description, by name of the metric without prefix and suffix."""
HISTOGRAMS = {
    "time_to_first_token_seconds": "Time from submission to the first token.",
    "inter_token_latency_seconds": "Time between two messages with tokens of one request.",
    "request_time_per_output_token_seconds": "Mean time per token of a request after its first.",
    "e2e_request_latency_seconds": "Time from submission to the end.",
    "request_queue_time_seconds": "Time from submission until the request was first given to instances.",
    "request_inference_time_seconds": "Time from when the request was first given to instances to the end.",
    "request_prefill_time_seconds": "Time from when the request was first given to instances to the first token.",
    "request_decode_time_seconds": "Time from the first token to the end.",
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of an answer; with n, of all answers to one prompt.",
    "request_attempts": "Attempts that a request took.",
    "reservation_wait_seconds": "Time until the decode instance had room for the KV.",
    "kv_handoff_exposed_seconds": "Time from the first token, of the prefill instance, to the second.",
    "kv_transfer_seconds": "Time during which the KV of a request moved.",
    "kv_transfer_request_bytes": "Bytes of KV that moved for a request.",
    "kv_transfer_overlap_ratio": "Part of a transfer's time in which the prompt was still being computed.",
    "event_loop_lag_seconds": "How late the event loops of scheduler and front ends ran what was due.",
}
"""Descriptions of the histograms. All but the second and the last have a value for each completed request."""


def describe_histogram(name: str) -> str:
    """Return the description of a histogram, or its name if a scheduler of another version has it."""
    return HISTOGRAMS.get(name, name)


def deployment_metrics(stats: SchedulerStats) -> Iterator[Family]:
    yield from _of_requests(stats)
    yield from instance_metrics(stats.instances)
    yield from _of_links(stats.links.values())


def _of_requests(stats: SchedulerStats) -> Iterator[Family]:
    yield _single("num_requests_waiting", "gauge", "Requests that no instance was given yet.", stats.waiting_requests)
    yield _single(
        "num_tokens_waiting", "gauge", "Prompt tokens of requests that no instance was given yet.", stats.waiting_tokens
    )
    yield _single("num_requests_running", "gauge", "Requests that instances have.", stats.running_requests)
    for name, (field, description) in COUNTERS.items():
        yield _single(name, "counter", description, attrgetter(field)(stats))
    yield _single(
        "prompt_tokens", "counter", "Prompt tokens of requests that have their first token.", stats.prompt_tokens
    )
    yield _single("generation_tokens", "counter", "Tokens that were delivered.", stats.output_tokens)
    labelled: dict[str, tuple[str, str, Mapping[str, float]]] = {
        "request_success": (
            "finished_reason",
            "Requests that have ended, by finish reason; it is error if they failed.",
            stats.ended_requests,
        ),
        "request_attempts_failed": (
            "cause",
            "Attempts that have failed, by cause, including those that were tried again.",
            stats.failed_attempts,
        ),
        "request_delay_seconds": ("cause", "Seconds for which requests were held up, by cause.", stats.delay_s),
        "requests_delayed": (
            "cause",
            "Requests that were held up for a quarter of their time, by main cause.",
            stats.delayed_requests,
        ),
    }
    for name, (label, documentation, values) in labelled.items():
        family = Family(f"hbserve:{name}", "counter", documentation, [label])
        family.add_each(values)
        yield family
    for name, histogram in stats.histograms.items():
        family = Family(f"hbserve:{name}", "histogram", describe_histogram(name))
        family.add_histogram(histogram)
        yield family


def _single(name: str, kind: str, documentation: str, value: float) -> Family:
    family = Family(f"hbserve:{name}", "counter" if kind == "counter" else "gauge", documentation)
    family.add(value)
    return family


def _of_links(links: Iterable[LinkCounts]) -> Iterator[Family]:
    pair = ["prefill", "decode"]
    up = Family("hbserve:link_up", "gauge", "1 while both instances are connected, 0 while they cannot be.", pair)
    active = Family(
        "hbserve:link_transfers_active",
        "gauge",
        "KV transfers for which there is room, and whose KV is not all there.",
        pair,
    )
    ended = Family("hbserve:kv_transfers", "counter", "KV transfers that have ended, by outcome.", [*pair, "outcome"])
    moved = Family("hbserve:kv_transfer_bytes", "counter", "Bytes of KV that have moved.", pair)
    took = Family(
        "hbserve:kv_transfer_moving_seconds", "counter", "Seconds during which KV moved, added over transfers.", pair
    )
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
