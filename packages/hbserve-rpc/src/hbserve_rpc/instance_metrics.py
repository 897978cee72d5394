"""Metrics of instances, made from their stats: an instance shows its own, a scheduler or server those of all."""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Literal, get_args

from hbserve_rpc.messages import InstanceStats, InstanceStatus
from hbserve_rpc.metrics_text import Family

LABELS = ["instance_id", "role"]
GAUGES = {
    "instance_active_requests": ("active_requests", "Requests that the instance has."),
    "instance_waiting_requests": ("waiting_requests", "Requests that wait in the instance to be computed."),
    "instance_running_requests": ("running_requests", "Requests that the instance computes."),
    "kv_blocks": ("num_blocks", "KV blocks of the instance."),
    "kv_blocks_free": ("free_blocks", "KV blocks that may be given out, those of the prefix cache included."),
    "kv_blocks_quarantined": ("quarantined_blocks", "KV blocks that a failed transfer might still write to."),
    "kv_transfers_active": ("active_transfers", "KV transfers under way."),
    "kv_lookup_buffer_bytes": ("buffered_bytes", "Bytes in the KV lookup buffer."),
}
"""Field of the stats, and description, by name of the metric without prefix."""
COUNTERS = {
    "instance_requests": ("total_requests", "Requests that the instance was given."),
    "instance_generation_tokens": ("generated_tokens", "Tokens that the instance has generated."),
    "instance_prompt_tokens": ("prefill_tokens", "Prompt tokens that the instance has computed."),
    "instance_prompt_tokens_cached": ("cached_tokens", "Prompt tokens that were found in the prefix cache."),
    "instance_preemptions": ("preemptions", "Requests that lost their KV blocks, and were computed again."),
    "kv_bytes_sent": ("kv_bytes_sent", "Bytes of KV that the instance has sent."),
    "kv_bytes_received": ("kv_bytes_received", "Bytes of KV that the instance has received."),
    "kv_transfer_busy_seconds": ("kv_transfer_time_s", "Seconds that KV transfers took, added over transfers."),
    "kv_transfers_failed": ("failed_transfers", "KV transfers that failed, those of aborted requests included."),
    "kv_messages_dropped": (
        "dropped_messages",
        "Messages about KV transfers that came late, twice or from an earlier life.",
    ),
    "instance_rpc_frames_dropped": (
        "rpc.dropped_frames",
        "RPC messages that were unreadable, or of a client that is not known.",
    ),
    "instance_rpc_notifications_failed": (
        "rpc.failed_notifications",
        "RPC notifications that were refused, or whose handler failed.",
    ),
}
"""The same for counters, whose names do not have their suffix either."""
KINDS: dict[Literal["gauge", "counter"], dict[str, tuple[str, str]]] = {"gauge": GAUGES, "counter": COUNTERS}


def instance_metrics(instances: Sequence[InstanceStats]) -> Iterator[Family]:
    up = Family("hbserve:instance_up", "gauge", "1 while the instance is ready.", LABELS)
    is_in = Family(
        "hbserve:instance_state", "gauge", "1 for the state that the instance is in, 0 for others.", [*LABELS, "state"]
    )
    tokens = Family(
        "hbserve:iteration_tokens_total", "histogram", "Tokens that one step of the engine computes.", LABELS
    )
    lag = Family(
        "hbserve:instance_event_loop_lag_seconds", "histogram", "How late the event loop ran what was due.", LABELS
    )
    states = Family(
        "hbserve:kv_blocks_by_state", "gauge", "KV blocks by state; their sum is kv_blocks.", [*LABELS, "state"]
    )
    for each in instances:
        of = each.instance_id, each.role
        up.add(int(each.status == "ready"), *of)
        for status in get_args(InstanceStatus):
            is_in.add(int(each.status == status), *of, status)
        for family, histogram in ((tokens, each.iteration_tokens), (lag, each.loop_lag)):
            if histogram is not None:
                family.add_histogram(histogram, *of)
        for state, count in block_states(each).items():
            states.add(count, *of, state)
    yield from (up, is_in, tokens, lag, states)
    for kind, metrics in KINDS.items():
        for name, (field, description) in metrics.items():
            family = Family(f"hbserve:{name}", kind, description, LABELS)
            for each in instances:
                family.add(attrgetter(field)(each), each.instance_id, each.role)
            yield family


def block_states(stats: InstanceStats) -> dict[str, int]:
    """Return the number of an instance's KV blocks by state. Each block is in one state, except for shared ones."""
    held = stats.num_blocks - stats.free_blocks
    reserved = min(stats.reserved_blocks, held - min(stats.quarantined_blocks, held))
    return {
        "free": stats.free_blocks - stats.cached_blocks,
        "cached": stats.cached_blocks,
        "active": max(0, held - reserved - stats.quarantined_blocks),
        "reserved": reserved,
        "quarantined": stats.quarantined_blocks,
    }
