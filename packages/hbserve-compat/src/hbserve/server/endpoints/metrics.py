"""/metrics: the figures of the scheduler and the instances for Prometheus.

Each scrape reads one snapshot, so nothing is counted twice. All figures begin with `hbserve:`, and those that vLLM has
too have its suffixes; `vllm:` repeats these with vLLM's labels, so that dashboards made for vLLM show them too.
Latencies are measured in the scheduler, over prefill, KV and decode, as a client experiences them.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.http.http_figures import http_metrics
from hbserve.server.service import ServedModel, Service
from hbserve_rpc.messages import InstanceInfo, SchedulerStats
from hbserve_rpc.metrics_text import CONTENT_TYPE, Family, text_of
from hbserve_scheduler.metrics import deployment_metrics, describe_histogram

ONLY_OURS = ("kv_", "reservation_", "request_attempts", "event_loop_")
"""Prefixes of the names of histograms that vLLM does not have."""
OF_VLLM = ["model_name", "engine"]
"""Labels by which vLLM's dashboards select. A deployment is one engine; for figures of instances, each instance is."""


async def show_metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    stats = None if service.model is None else await service.model.whole.fetch_stats()
    return Response(text_of(_families(service, stats)), media_type=CONTENT_TYPE)


def _families(service: Service, stats: SchedulerStats | None) -> Iterator[Family]:
    model = service.model
    up = Family("hbserve:up", "gauge", "1 while the server takes new requests.")
    up.add(int(model is not None and not service.draining))
    yield up
    if model is not None and stats is not None:
        yield from deployment_metrics(stats)
        yield from _Aliases(model, stats).families()
        yield from http_metrics(stats.http.values())


class _Aliases:
    """Figures that vLLM has too, under vLLM's names (its v1/metrics/loggers.py)."""

    def __init__(self, model: ServedModel, stats: SchedulerStats) -> None:
        self._name = model.names[0]
        self._stats = stats
        self._infos = {each.instance_id: each for each in model.scheduler.info().instances}

    def families(self) -> Iterator[Family]:
        yield from self._gauges()
        yield from self._counters()
        for name, histogram in self._stats.histograms.items():
            if not name.startswith(ONLY_OURS):
                family = Family(f"vllm:{name}", "histogram", describe_histogram(name), OF_VLLM)
                family.add_histogram(histogram, *self._labels(0))
                yield family

    def _labels(self, engine: int) -> tuple[str, str]:
        return self._name, str(engine)

    def _gauges(self) -> Iterator[Family]:
        stats = self._stats
        yield self._with("num_requests_running", "gauge", {"": stats.running_requests})
        yield self._with("num_requests_waiting", "gauge", {"": stats.waiting_requests})
        waiting = {"capacity": stats.waiting_requests, "deferred": 0}
        yield self._with("num_requests_waiting_by_reason", "gauge", waiting, "reason")
        usage = Family("vllm:kv_cache_usage_perc", "gauge", "Part of the KV blocks that are in use, 0 to 1.", OF_VLLM)
        sizes = ["block_size", "num_gpu_blocks"]
        config = Family(
            "vllm:cache_config_info",
            "gauge",
            "Always 1; its labels are the settings of the KV cache.",
            [*OF_VLLM, *sizes],
        )
        tokens = Family(
            "vllm:iteration_tokens_total", "histogram", "Tokens that one step of the engine computes.", OF_VLLM
        )
        for i, each in enumerate(stats.instances):
            labels = self._labels(i)
            info = self._infos.get(each.instance_id, InstanceInfo(each.instance_id, each.role, "", each.status))
            usage.add(1 - each.free_blocks / each.num_blocks if each.num_blocks else 0.0, *labels)
            config.add(1, *labels, str(info.block_size), str(each.num_blocks))
            if each.iteration_tokens is not None:
                tokens.add_histogram(each.iteration_tokens, *labels)
        yield from (usage, config, tokens)

    def _counters(self) -> Iterator[Family]:
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
            yield self._with(name, "counter", {"": value})
        by_source = {"local_compute": computed, "local_cache_hit": cached}
        yield self._with("prompt_tokens_by_source", "counter", by_source, "source")
        # Queries that divide by the sum need the reasons with a count of 0 too.
        ended = {"stop": 0, "length": 0, "abort": 0, "error": 0} | stats.ended_requests
        yield self._with("request_success", "counter", ended, "finished_reason")

    def _with(
        self, name: str, kind: Literal["gauge", "counter"], values: Mapping[str, float], label: str | None = None
    ) -> Family:
        """Make a family of `values`, by the values of `label`, or of a single value without a label."""
        labels = OF_VLLM if label is None else [*OF_VLLM, label]
        family = Family(f"vllm:{name}", kind, "HBServe's figure for vLLM's metric of this name.", labels)
        for of, value in values.items():
            family.add(value, *self._labels(0), *([of] if label else []))
        return family
