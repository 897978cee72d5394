"""Spans of requests, as an OpenTelemetry collector receives them."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hbserve_fake_scheduler import FakeServer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hbserve.server.spans import ENDPOINTS, Spans, spans_from_environment
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_scheduler import ConfigError

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FAILED = AttemptRecord(0.25, "p0", "d0", ended_s=0.5, error="p0: gone")
LAST = AttemptRecord(
    0.5, "p1", "d0", 0.75, 1.25, 1.75, computed=[(1.0, 8), (1.25, 16)], pushed=[(1.0, 1), (1.25, 2)], ended_s=3.0
)


class Collector:
    """A server whose spans are kept, so that tests can look at them."""

    def __init__(self, folder: Path) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.server = FakeServer(load_tokenizer(folder))
        self.service = self.server.service
        self.service.spans = self.spans = Spans(provider, ("127.0.0.1", 8000))
        self.service.begin("small", folder, self.server.scheduler, self.server.tokenizer, self.server.scheduler)
        self.server.answers("ab")

    def end(self, *attempts: AttemptRecord, **others: Any) -> str:
        """Record how the last request has ended. Returns its id."""
        known: dict[str, Any] = {"finish_reason": "length", "first_token_s": 1.25, "second_token_s": 2.0} | others
        request_id = self.server.scheduler.request_ids[-1]
        self.submitted_at = time.time()
        record = RequestRecord(request_id, self.submitted_at, 16, 9, 4, 4096, 0.5, list(attempts), 3.0, **known)
        self.server.scheduler.figures.add(record)
        return request_id

    def spans_by_name(self) -> dict[str, list[Any]]:
        self.spans.close()
        found: dict[str, list[Any]] = {}
        for span in self._exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def collector(small_model: Callable[[str], Path]) -> Iterator[Collector]:
    found = Collector(small_model("qwen3"))
    yield found
    found.spans.close()


async def test_a_request_is_a_span_of_its_caller_with_its_phases_beside_each_other(collector):
    # Known elsewhere: vLLM #3789, SGLang #8965.
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "mine"}
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "max_tokens": 9}
    await collector.server.client.post("/v1/chat/completions", json=body, headers=headers)
    request_id = collector.end(FAILED, LAST)
    assert request_id.startswith("mine-")
    spans = collector.spans_by_name()
    (root,) = spans["chat small"]
    assert (root.kind, f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (
        SpanKind.SERVER, TRACE_ID, PARENT_ID,
    )  # fmt: skip
    began_ns = int(collector.submitted_at * 1e9)
    assert root.start_time <= began_ns
    assert root.end_time == began_ns + 3 * 10**9
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "small",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 16,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.response.time_to_first_chunk": 1.25,
        "gen_ai.latency.time_in_queue": 0.25,
        "server.port": 8000,
    }
    assert {name: root.attributes.get(name) for name in expected} == expected
    parts = {name: len(found) for name, found in spans.items() if name != "chat small"}
    assert parts == {
        "hbserve.queue": 1, "hbserve.reserve": 1, "hbserve.prefill": 2, "hbserve.kv_transfer": 1, "hbserve.decode": 1,
    }  # fmt: skip
    for name in parts:
        for span in spans[name]:
            assert span.parent.span_id == root.context.span_id
            assert root.start_time <= span.start_time <= span.end_time <= root.end_time
    assert spans["hbserve.prefill"][0].attributes["error.type"] == "p0: gone"
    assert [event.attributes["hbserve.tokens"] for event in spans["hbserve.prefill"][1].events] == [8, 16]
    (moved,) = spans["hbserve.kv_transfer"]
    assert (moved.start_time - began_ns, moved.end_time - began_ns) == (10**9, 175 * 10**7)
    assert (moved.attributes["hbserve.kv.bytes"], moved.attributes["hbserve.kv.overlap"]) == (4096, 1 / 3)


async def test_a_failure_is_an_error_a_bad_caller_is_none_and_what_is_not_sampled_is_left_out(collector):
    client = collector.server.client
    await client.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": "00-zz-1"})
    collector.end(finish_reason=None, error="no room", first_token_s=None, second_token_s=None)
    not_sampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    await client.post("/v1/completions", json={"prompt": "x"}, headers=not_sampled)
    collector.end(LAST)
    spans = collector.spans_by_name()
    (root,) = spans["text_completion small"]
    assert (root.parent, root.status.status_code, root.attributes["error.type"]) == (None, StatusCode.ERROR, "no room")
    assert "hbserve.decode" not in spans


async def test_the_span_of_a_request_is_sent_on_and_told_to_its_client(collector):
    scheduler, client = collector.server.scheduler, collector.server.client
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    answer = await client.post("/v1/completions", json={"prompt": ["a", "b"]}, headers=headers)
    for _ in range(2):
        collector.end(LAST)
        scheduler.request_ids.pop()
    sent_on = [scheduler.traces.pop() for _ in range(2)]
    roots = collector.spans_by_name()["text_completion small"]
    assert sent_on == [f"00-{TRACE_ID}-{each.context.span_id:016x}-01" for each in roots]
    assert answer.headers["traceresponse"] == sent_on[1], "that of the first prompt"


async def test_the_callers_own_is_sent_on_where_no_spans_are_made_and_what_is_none_is_not(small_model):
    server = FakeServer(load_tokenizer(small_model("qwen3")))
    given = f"00-{TRACE_ID}-{PARENT_ID}-01"
    for header, sent_on in ((given, given), (given + "-more", ""), ("00-zz-1", "")):
        answer = await server.client.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": header})
        assert server.scheduler.traces[-1] == sent_on
        assert "traceresponse" not in answer.headers


async def test_of_a_request_that_is_refused_no_span_is_kept(collector):
    answer = await collector.server.client.post("/v1/completions", json={"prompt": [999_999]})
    assert answer.status_code == 400
    assert not collector.spans._asked


async def test_ids_in_the_scheduler_are_unique_also_where_clients_repeat_theirs(collector):
    for _ in range(2):
        await collector.server.complete(prompt=["a", "b"])
        await collector.server.client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "same"})
    ids = collector.server.scheduler.request_ids
    assert len(set(ids)) == len(ids) == 6
    assert ids[1] == f"{ids[0]}-1"


def test_spans_are_made_only_where_a_collector_is_named_and_say_what_they_need(monkeypatch):
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert spans_from_environment(None) is None
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:9")
    found = spans_from_environment(None)
    assert found is not None
    found.close()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set: pip install 'hbserve-compat\[otel\]'"):
        spans_from_environment(None)
