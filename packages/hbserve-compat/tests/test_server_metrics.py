"""/metrics as Prometheus reads it, also under the names that dashboards for vLLM use."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hbserve_fake_scheduler import FakeServer
from prometheus_client.parser import text_string_to_metric_families

from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc.messages import InstanceStats, InstanceStatus, SchedulerStats
from hbserve_rpc.records import AttemptRecord, RequestRecord

ROOT = Path(__file__).resolve().parents[3]
DASHBOARDS = {
    "vllm:cache_config_info",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:generation_tokens_total",
    "vllm:iteration_tokens_total_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_by_source_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_success_total",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_count",
    "vllm:request_time_per_output_token_seconds_sum",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
}
"""Samples that vLLM's public Grafana dashboards, vllmstat 0.9.1, vllm-htop 0.5.0 and vllm-mon 0.1.0 use. Left out are
those that vLLM itself no longer has (num_requests_swapped, gpu_cache_usage_perc, avg_*_throughput_toks_per_s),
speculative decoding, and estimates of FLOPs and bytes."""


NO_METRICS = {
    "hbserve",
    "instance_id",
    "role",
    "error",
    "prefill",
    "decode",
    "rate",
    "cause",
    "local_prefill_tokens",
    *get_args(InstanceStatus),
}
"""Words in code on the page that are not metrics."""


@pytest.fixture
def server(small_model: Callable[[str], Path]) -> FakeServer:
    return FakeServer(load_tokenizer(small_model("qwen3")))


async def scrape(server: FakeServer) -> dict[str, float]:
    """Return the values by sample, such as `name{label="value"}`, with labels in the order of their names."""
    text = (await server.client.get("/metrics")).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found
            found[key] = sample.value
    return found


async def test_figures_of_requests_and_instances_are_there_also_when_only_the_head_is_asked_for(server):
    figures = server.scheduler.figures
    figures.num_submitted, figures.prompt_tokens, figures.output_tokens = 3, 40, 7
    figures.failed_attempts["PeerLost"] += 2
    attempt = AttemptRecord(0.25, "p0", "d0", granted_s=0.75, first_token_s=1.25)
    figures.add(RequestRecord("r", 0, 4, 3, 2, 4096, 0.03, [attempt], 3.25, "length", 1.25, 1.5))
    figures.add(RequestRecord("s", 0, 4, 0, 0, 0, 0, [], 1, None, error="no instance"))
    link = figures.link("p0", "d0")
    link.is_up, link.active, link.num_bytes, link.time_s = True, 3, 4096, 0.5
    link.end("completed")
    found = await scrape(server)
    expected = {
        "hbserve:up": 1,
        "hbserve:requests_total": 3,
        "hbserve:requests_failed_total": 1,
        'hbserve:request_success_total{finished_reason="error"}': 1,
        'hbserve:request_attempts_failed_total{cause="PeerLost"}': 2,
        'hbserve:kv_blocks{instance_id="h0",role="hybrid"}': 9,
        'hbserve:instance_up{instance_id="h0",role="hybrid"}': 1,
        "hbserve:kv_handoff_exposed_seconds_sum": 0.25,
        "hbserve:reservation_wait_seconds_sum": 0.5,
        "hbserve:time_to_first_token_seconds_sum": 1.25,
        'hbserve:time_to_first_token_seconds_bucket{le="1.0"}': 0,
        'hbserve:time_to_first_token_seconds_bucket{le="2.5"}': 1,
        'hbserve:time_to_first_token_seconds_bucket{le="+Inf"}': 1,
        'vllm:request_time_per_output_token_seconds_sum{engine="0",model_name="small"}': 1,
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="small"}': 0,
        'vllm:prompt_tokens_total{engine="0",model_name="small"}': 40,
        'vllm:kv_cache_usage_perc{engine="0",model_name="small"}': 1 - 4 / 9,
        'hbserve:iteration_tokens_total_sum{instance_id="h0",role="hybrid"}': 17,
        'vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="small"}': 2,
        'hbserve:instance_event_loop_lag_seconds_count{instance_id="h0",role="hybrid"}': 4,
        'hbserve:link_up{decode="d0",prefill="p0"}': 1,
        'hbserve:link_transfers_active{decode="d0",prefill="p0"}': 2,
        'hbserve:kv_transfers_total{decode="d0",outcome="completed",prefill="p0"}': 1,
        'hbserve:kv_transfers_total{decode="d0",outcome="failed",prefill="p0"}': 0,
        'hbserve:kv_transfer_bytes_total{decode="d0",prefill="p0"}': 4096,
        'hbserve:kv_transfer_moving_seconds_total{decode="d0",prefill="p0"}': 0.5,
    }
    states = {"free": 3, "cached": 1, "active": 2, "reserved": 2, "quarantined": 1}
    of = "hbserve:kv_blocks_by_state"
    expected |= {f'{of}{{instance_id="h0",role="hybrid",state="{state}"}}': n for state, n in states.items()}
    assert {name: found.get(name) for name in expected} == expected
    head = await server.client.head("/metrics")
    assert (head.status_code, head.text) == (200, "")


async def test_every_name_that_dashboards_for_vllm_use_resolves_under_its_model(server):
    found = await scrape(server)
    for name in DASHBOARDS:
        assert any(key.partition("{")[0] == name and 'model_name="small"' in key for key in found), name


async def test_vllm_s_figures_are_sums_of_instances_or_those_of_each(server, monkeypatch):
    """One of two instances has told nothing of itself yet."""
    figures: dict[str, Any] = {
        "prefill_tokens": 30,
        "cached_tokens": 12,
        "preemptions": 2,
        "num_blocks": 9,
        "free_blocks": 3,
    }
    there = InstanceStats("h0", "hybrid", "ready", **figures)
    one_more = InstanceStats("h1", "hybrid", "starting", prefill_tokens=5, cached_tokens=1, preemptions=1)
    stats = SchedulerStats(running_requests=4, waiting_requests=6, output_tokens=7, instances=[there, one_more])
    monkeypatch.setattr(server.scheduler, "stats", lambda: stats)
    found = await scrape(server)
    of_all = {
        "num_requests_running": 4, "num_requests_waiting": 6, "generation_tokens_total": 7,
        "prompt_tokens_cached_total": 13, "prefix_cache_hits_total": 13, "prefix_cache_queries_total": 48,
        "num_preemptions_total": 3,
    }  # fmt: skip
    expected: dict[str, float] = {
        f'vllm:{name}{{engine="0",model_name="small"}}': value for name, value in of_all.items()
    }
    for name, label, values in (
        ("num_requests_waiting_by_reason", "reason", {"capacity": 6, "deferred": 0}),
        ("prompt_tokens_by_source_total", "source", {"local_compute": 35, "local_cache_hit": 13}),
    ):
        for of, value in values.items():
            labels = sorted([f'{label}="{of}"', 'engine="0"', 'model_name="small"'])
            expected[f"vllm:{name}{{{','.join(labels)}}}"] = value
    for engine, usage, num_blocks in ((0, 1 - 3 / 9, 9), (1, 0, 0)):
        of = f'engine="{engine}",model_name="small"'
        expected[f"vllm:kv_cache_usage_perc{{{of}}}"] = usage
        config = f'block_size="0",engine="{engine}",model_name="small",num_gpu_blocks="{num_blocks}"'
        expected[f"vllm:cache_config_info{{{config}}}"] = 1
    assert {name: found.get(name) for name in expected} == expected


async def test_the_page_of_monitoring_names_every_metric_and_no_other(server):
    text = (await server.client.get("/metrics")).text
    # What is counted by a label that nothing has had so far has a name, and no sample.
    served = set(re.findall("^# TYPE hbserve:([a-z0-9_]+) ", text, re.MULTILINE))
    page = (ROOT / "docs/monitoring.md").read_text().partition("## `/metrics`")[2].partition("\n## ")[0]
    assert served == set(re.findall("`([a-z0-9_]+)", page)) - NO_METRICS


async def test_http_requests_are_counted_as_vllm_counts_them(server):
    server.answers("ab", "c")
    body = {"prompt": "hi", "max_tokens": 2}
    answer = await server.complete(**body)
    streamed = await server.complete(**body, stream=True)
    assert (await server.client.get("/v1/models/small")).status_code == 200
    assert (await server.client.get("/v1/models/other/one")).status_code == 404
    for path in ("/x", "/y"):
        assert (await server.client.get(path)).status_code == 404
    await server.client.get("/health")
    found = await scrape(server)
    requests = {key: value for key, value in found.items() if key.startswith("http_requests_total")}
    of = "http_requests_total"
    assert requests == {
        f'{of}{{handler="/v1/completions",method="POST",status="2xx"}}': 2,
        f'{of}{{handler="/v1/models/{{model:path}}",method="GET",status="2xx"}}': 1,
        f'{of}{{handler="/v1/models/{{model:path}}",method="GET",status="4xx"}}': 1,
        f'{of}{{handler="none",method="GET",status="4xx"}}': 2,
    }
    at = '{handler="/v1/completions"}'
    assert found[f"http_response_size_bytes_sum{at}"] == len(answer.content) + len(streamed.content)
    sent = sum(int(each.request.headers["content-length"]) for each in (answer, streamed))
    assert found[f"http_request_size_bytes_sum{at}"] == sent
    assert found[f"http_request_size_bytes_count{at}"] == 2
    of_all = "http_request_duration_highr_seconds"
    assert found[f'{of_all}_bucket{{le="+Inf"}}'] == found[f"{of_all}_count"] == 6
    by_path = 'http_request_duration_seconds_bucket{handler="/v1/completions",le="%s",method="POST"}'
    assert found[by_path % "1.0"] <= found[by_path % "+Inf"] == 2


async def test_before_the_model_is_there_and_while_the_server_ends_it_is_not_up(server):
    server.service.draining = True
    assert (await scrape(server))["hbserve:up"] == 0
    server.service.model = None
    assert await scrape(server) == {"hbserve:up": 0}


async def test_names_of_others_are_quoted(server):
    server.service.model.names[0] = 'sm"all\\\n'
    found = await scrape(server)
    assert any('model_name="sm"all\\\n"' in key for key in found), "as it was before it was quoted"


@pytest.mark.parametrize("last_s", ["", "-1", "nan", "inf", "1e999", "soon"])
async def test_a_timeline_of_no_time_is_refused_by_name(server, last_s):
    response = await server.client.get("/debug/trace", params={"last_s": last_s})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "last_s")
