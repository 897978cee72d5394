"""/metrics: the scheduler's and the instances' figures, in the text format of Prometheus."""

from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.service import Service
from hbserve_rpc.messages import InstanceStats, SchedulerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES_OF_SCHEDULER = {
    "waiting_requests": "num_requests_waiting",
    "running_requests": "num_requests_running",
}
COUNTERS_OF_SCHEDULER = {
    "total_requests": "requests",
    "completed_requests": "requests_completed",
    "failed_requests": "requests_failed",
    "aborted_requests": "requests_aborted",
    "rejected_requests": "requests_rejected",
    "retries": "request_retries",
}
GAUGES_OF_INSTANCE = {
    "active_requests": "instance_active_requests",
    "waiting_requests": "instance_waiting_requests",
    "running_requests": "instance_running_requests",
    "num_blocks": "kv_blocks",
    "free_blocks": "kv_blocks_free",
    "quarantined_blocks": "kv_blocks_quarantined",
    "active_transfers": "kv_transfers_active",
    "buffered_bytes": "kv_lookup_buffer_bytes",
}
COUNTERS_OF_INSTANCE = {
    "total_requests": "instance_requests",
    "generated_tokens": "generation_tokens",
    "prefill_tokens": "prompt_tokens",
    "cached_tokens": "prompt_tokens_cached",
    "preemptions": "num_preemptions",
    "kv_bytes_sent": "kv_bytes_sent",
    "kv_bytes_received": "kv_bytes_received",
    "kv_transfer_time_s": "kv_transfer_seconds",
    "failed_transfers": "kv_transfers_failed",
    "dropped_messages": "kv_messages_dropped",
}
"""Field of the stats: name of its metric, less the prefix, and `_total` of a counter."""


async def show_metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    model = service.model
    lines = ["# TYPE hbserve:up gauge", f"hbserve:up {int(model is not None and not service.draining)}"]
    if model is not None:
        lines += _lines(await model.fetch_stats())
    return Response("\n".join([*lines, ""]), media_type=CONTENT_TYPE)


def _lines(stats: SchedulerStats) -> Iterator[str]:
    for names, kind in ((GAUGES_OF_SCHEDULER, "gauge"), (COUNTERS_OF_SCHEDULER, "counter")):
        for field, name in names.items():
            yield from _metric(name, kind, {"": getattr(stats, field)})
    by_instance = {_labels(each): each for each in stats.instances}
    yield from _metric("instance_up", "gauge", {of: each.status == "ready" for of, each in by_instance.items()})
    for names, kind in ((GAUGES_OF_INSTANCE, "gauge"), (COUNTERS_OF_INSTANCE, "counter")):
        for field, name in names.items():
            yield from _metric(name, kind, {of: getattr(each, field) for of, each in by_instance.items()})


def _metric(name: str, kind: str, values: dict[str, float]) -> Iterator[str]:
    full = f"hbserve:{name}_total" if kind == "counter" else f"hbserve:{name}"
    yield f"# TYPE {full} {kind}"
    for labels, value in values.items():
        yield f"{full}{labels} {float(value):g}" if isinstance(value, float) else f"{full}{labels} {int(value)}"


def _labels(stats: InstanceStats) -> str:
    quoted = stats.instance_id.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{instance_id="{quoted}",role="{stats.role}"}}'
