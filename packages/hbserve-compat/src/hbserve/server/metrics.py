"""/metrics: the scheduler's and the instances' figures for Prometheus.

Read from one snapshot at each scrape, so nothing is counted twice. `hbserve:` has all of them, under vLLM's suffixes
where vLLM has the figure; `vllm:` repeats those with vLLM's labels, so that dashboards made for it show them too.
Latencies are the scheduler's: what a client has felt, over prefill, KV and decode.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.service import ServedModel, Service
from hbserve_rpc.histogram import Histogram
from hbserve_rpc.messages import InstanceInfo, InstanceStats, InstanceStatus, SchedulerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = {
    "requests": "total_requests",
    "requests_completed": "completed_requests",
    "requests_failed": "failed_requests",
    "requests_aborted": "aborted_requests",
    "requests_rejected": "rejected_requests",
    "request_retries": "retries",
    "request_placements_refused": "refusals",
}
INSTANCE_GAUGES = {
    "instance_active_requests": "active_requests",
    "instance_waiting_requests": "waiting_requests",
    "instance_running_requests": "running_requests",
    "kv_blocks": "num_blocks",
    "kv_blocks_free": "free_blocks",
    "kv_blocks_quarantined": "quarantined_blocks",
    "kv_transfers_active": "active_transfers",
    "kv_lookup_buffer_bytes": "buffered_bytes",
}
INSTANCE_COUNTERS = {
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
}
"""Name of the metric, without prefix and suffix: field of the stats."""
OF_VLLM = ["model_name", "engine"]
"""Labels that vLLM's dashboards choose by. A deployment is one engine; where a figure is of each instance, each is."""


async def show_metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    stats = None if service.model is None else await service.model.whole.fetch_stats()
    registry = CollectorRegistry()
    registry.register(_Snapshot(service, stats))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE)


class _Snapshot(Collector):
    """What the service says of itself at one scrape."""

    def __init__(self, service: Service, stats: SchedulerStats | None) -> None:
        self._service = service
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # the registry would collect once more to learn the names

    def collect(self) -> Iterator[Metric]:
        model = self._service.model
        is_up = model is not None and not self._service.draining
        yield GaugeMetricFamily("hbserve:up", "1 while new requests are taken.", value=int(is_up))
        if model is not None and self._stats is not None:
            yield from _of_requests(self._stats)
            yield from _of_instances(self._stats.instances)
            yield from _Aliases(model, self._stats).metrics()


def _of_requests(stats: SchedulerStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("hbserve:num_requests_waiting", "Not given to an instance yet.", stats.waiting_requests)
    yield GaugeMetricFamily("hbserve:num_requests_running", "With instances.", stats.running_requests)
    for name, field in COUNTERS.items():
        yield CounterMetricFamily(f"hbserve:{name}", f"Requests: {field}.", getattr(stats, field))
    yield CounterMetricFamily("hbserve:prompt_tokens", "Of requests that have a first token.", stats.prompt_tokens)
    yield CounterMetricFamily("hbserve:generation_tokens", "Tokens that were delivered.", stats.output_tokens)
    yield _counters("hbserve:request_success", "Requests that have ended.", "finished_reason", stats.ended_requests)
    yield _counters("hbserve:request_attempts_failed", "Also of retried ones.", "cause", stats.failed_attempts)
    for name, histogram in stats.histograms.items():
        yield _histogram(f"hbserve:{name}", histogram, {})


def _of_instances(instances: list[InstanceStats]) -> Iterator[Metric]:
    labels = ["instance_id", "role"]
    up = GaugeMetricFamily("hbserve:instance_up", "1 while it is ready.", labels=labels)
    for each in instances:
        up.add_metric([each.instance_id, each.role], int(each.status == "ready"))
    yield up
    state = GaugeMetricFamily("hbserve:instance_state", "1 for the state that it is in.", labels=[*labels, "state"])
    for each in instances:
        for name in get_args(InstanceStatus):
            state.add_metric([each.instance_id, each.role, name], int(each.status == name))
    yield state
    for kind, names in ((GaugeMetricFamily, INSTANCE_GAUGES), (CounterMetricFamily, INSTANCE_COUNTERS)):
        for name, field in names.items():
            family = kind(f"hbserve:{name}", f"Of each instance: {field}.", labels=labels)
            for each in instances:
                family.add_metric([each.instance_id, each.role], getattr(each, field))
            yield family


class _Aliases:
    """The figures that vLLM has too, under its names (v1/metrics/loggers.py)."""

    def __init__(self, model: ServedModel, stats: SchedulerStats) -> None:
        self._name = model.names[0]
        self._stats = stats
        self._infos = {each.instance_id: each for each in model.scheduler.info().instances}

    def metrics(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for name, histogram in self._stats.histograms.items():
            if not name.startswith(("kv_", "reservation_", "request_attempts")):
                yield _histogram(f"vllm:{name}", histogram, self._labels(0))

    def _labels(self, engine: int) -> dict[str, str]:
        return {"model_name": self._name, "engine": str(engine)}

    def _gauges(self) -> Iterator[Metric]:
        stats = self._stats
        yield self._with("num_requests_running", GaugeMetricFamily, {"": stats.running_requests})
        yield self._with("num_requests_waiting", GaugeMetricFamily, {"": stats.waiting_requests})
        waiting = {"capacity": stats.waiting_requests, "deferred": 0}
        yield self._with("num_requests_waiting_by_reason", GaugeMetricFamily, waiting, "reason")
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1.", labels=OF_VLLM)
        sizes = ["block_size", "num_gpu_blocks"]
        config = GaugeMetricFamily("vllm:cache_config_info", "Always 1.", labels=[*OF_VLLM, *sizes])
        for i, each in enumerate(stats.instances):
            labels = list(self._labels(i).values())
            info = self._infos.get(each.instance_id, InstanceInfo(each.instance_id, each.role, "", each.status))
            usage.add_metric(labels, 1 - each.free_blocks / each.num_blocks if each.num_blocks else 0.0)
            config.add_metric([*labels, str(info.block_size), str(each.num_blocks)], 1)
        yield usage
        yield config

    def _counters(self) -> Iterator[Metric]:
        stats = self._stats
        computed, cached, preemptions = (
            sum(getattr(each, field) for each in stats.instances)
            for field in ("prefill_tokens", "cached_tokens", "preemptions")
        )
        for name, value in {
            "prompt_tokens": stats.prompt_tokens,
            "prompt_tokens_cached": cached,
            "generation_tokens": stats.output_tokens,
            "prefix_cache_queries": computed + cached,
            "prefix_cache_hits": cached,
            "num_preemptions": preemptions,
        }.items():
            yield self._with(name, CounterMetricFamily, {"": value})
        by_source = {"local_compute": computed, "local_cache_hit": cached}
        yield self._with("prompt_tokens_by_source", CounterMetricFamily, by_source, "source")
        # Whoever divides by all of them needs those at 0 too.
        ended = {"stop": 0, "length": 0, "abort": 0, "error": 0} | stats.ended_requests
        yield self._with("request_success", CounterMetricFamily, ended, "finished_reason")

    def _with(
        self,
        name: str,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        values: Mapping[str, float],
        label: str | None = None,
    ) -> Metric:
        """`values` by what `label` says, or one value."""
        labels = OF_VLLM if label is None else [*OF_VLLM, label]
        family = kind(f"vllm:{name}", "As hbserve: has it, under vLLM's name.", labels=labels)
        for of, value in values.items():
            family.add_metric([*self._labels(0).values(), of][: len(labels)], value)
        return family


def _counters(name: str, documentation: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for of, value in values.items():
        family.add_metric([of], value)
    return family


def _histogram(name: str, histogram: Histogram, labels: dict[str, str]) -> Metric:
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(map(float, histogram.counts)), strict=True))
    family = HistogramMetricFamily(name, "Of requests that have all of their tokens.", labels=list(labels))
    family.add_metric(list(labels.values()), buckets, histogram.total)
    return family
