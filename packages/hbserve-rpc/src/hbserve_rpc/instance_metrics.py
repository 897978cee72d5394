"""Metrics of instances, made from their stats: an instance shows its own, a scheduler or server those of all."""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import get_args

from hbserve_rpc.messages import InstanceStats, InstanceStatus
from hbserve_rpc.metrics_text import Family

LABELS = ["instance_id", "role"]
GAUGES = {
    "instance_active_requests": "active_requests",
    "instance_waiting_requests": "waiting_requests",
    "instance_running_requests": "running_requests",
    "kv_blocks": "num_blocks",
    "kv_blocks_free": "free_blocks",
    "kv_blocks_quarantined": "quarantined_blocks",
    "kv_transfers_active": "active_transfers",
    "kv_lookup_buffer_bytes": "buffered_bytes",
}
COUNTERS = {
    "instance_requests": "total_requests",
    "instance_generation_tokens": "generated_tokens",
    "instance_prompt_tokens": "prefill_tokens",
    "instance_prompt_tokens_cached": "cached_tokens",
    "instance_preemptions": "preemptions",
    "kv_bytes_sent": "kv_bytes_sent",
    "kv_bytes_received": "kv_bytes_received",
    "kv_transfer_busy_seconds": "kv_transfer_time_s",
    "kv_transfers_failed": "failed_transfers",
    "kv_messages_dropped": "dropped_messages",
    "instance_rpc_frames_dropped": "rpc.dropped_frames",
    "instance_rpc_notifications_failed": "rpc.failed_notifications",
}
"""Field of the stats, by name of the metric without prefix and suffix."""


def instance_metrics(instances: Sequence[InstanceStats]) -> Iterator[Family]:
    up = Family("hbserve:instance_up", "gauge", "1 while it is ready.", LABELS)
    is_in = Family("hbserve:instance_state", "gauge", "1 for the state that it is in.", [*LABELS, "state"])
    tokens = Family("hbserve:iteration_tokens_total", "histogram", "Tokens computed in one step.", LABELS)
    lag = Family("hbserve:instance_event_loop_lag_seconds", "histogram", "How late it was.", LABELS)
    states = Family("hbserve:kv_blocks_by_state", "gauge", "Their sum is kv_blocks.", [*LABELS, "state"])
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
    for name, field in GAUGES.items():
        family = Family(f"hbserve:{name}", "gauge", f"Of each instance: {field}.", LABELS)
        for each in instances:
            family.add(getattr(each, field), each.instance_id, each.role)
        yield family
    for name, field in COUNTERS.items():
        family = Family(f"hbserve:{name}", "counter", f"Of each instance: {field}.", LABELS)
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
