"""Spans of requests for OpenTelemetry, made from their records when they have ended. Needs the extra `otel`.

    chat small                     SERVER, child of the caller's `traceparent`; GenAI attributes, and vLLM's latencies
    ├── hbserve.queue
    ├── hbserve.reserve            siblings: none of them contains another's time
    ├── hbserve.prefill            an event for each chunk
    ├── hbserve.kv_transfer        bytes, and the part of its time that was hidden behind the prompt
    └── hbserve.decode
Further attempts repeat the last four. A thread makes the spans, so that no request waits for that.
"""

import logging
import os
import queue
import threading
from dataclasses import dataclass
from typing import Any

from hbserve.server.http.request_log import HttpRequest
from hbserve_rpc import SamplingParams
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_scheduler import ConfigError

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's own variables for the address of a collector. Spans are made if one of them is set."""
MOST_ASKED = 65536
"""Most requests under way that are remembered."""
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Asked:
    """A client's request, as it arrived."""

    http: HttpRequest
    model: str
    params: SamplingParams


class Spans:
    """Makes spans of requests, of whose beginning and end one thread notifies it. Makes them in a thread of its own."""

    def __init__(self, provider: Any, address: tuple[str, int] | None = None) -> None:
        """`provider` is a TracerProvider of the OpenTelemetry SDK; `address` is the server's. None: it has no port."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("hbserve")
        self._address = address
        self._asked: dict[str, tuple[Asked, Any]] = {}
        """Requests under way, with their spans."""
        self._ended: queue.SimpleQueue[tuple[Asked, Any, RequestRecord] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def began(self, request_id: str, asked: Asked) -> str:
        """Begin the span of a request, which so far knows only its parent. Returns its `traceparent`, for everything
        that is done on behalf of the request."""
        carrier = {name: value for name, value in asked.http.trace_context.items() if value}
        span = self._tracer.start_span(
            f"{asked.http.operation} {asked.model}",
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
        )
        self._asked[request_id] = asked, span
        if len(self._asked) > MOST_ASKED:
            del self._asked[next(iter(self._asked))]
        sent_on: dict[str, str] = {}
        self._propagator.inject(sent_on, self._trace.set_span_in_context(span))
        return sent_on.get("traceparent", "")

    def refused(self, request_id: str) -> None:
        """Forget a request that was refused. No span is made of it."""
        self._asked.pop(request_id, None)

    def ended(self, record: RequestRecord) -> None:
        """Make the spans of a request that has ended, in the thread. Ignores a request that did not begin here."""
        begun = self._asked.pop(record.request_id, None)
        if begun is not None:
            self._ended.put((*begun, record))

    def close(self) -> None:
        """Send the spans that are left, and end the thread. Waits no longer than a working collector needs."""
        self._ended.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._provider.shutdown()

    def _run(self) -> None:
        while (one := self._ended.get()) is not None:
            try:
                self._make(*one)
            except Exception:  # of OpenTelemetry's libraries: requests must go on
                logger.exception("no spans of request %s", one[-1].request_id)

    def _make(self, asked: Asked, root: Any, record: RequestRecord) -> None:
        began_ns = int(record.submitted_at * 1e9)
        root.set_attributes(_attributes(asked, record))
        if self._address is not None:
            root.set_attributes({"server.address": self._address[0], "server.port": self._address[1]})
        if record.finish_reason is None:
            root.set_status(self._trace.StatusCode.ERROR, record.error)
        inside = self._trace.set_span_in_context(root)
        self._part(inside, began_ns, "queue", 0.0, record.queue_s)
        for number, attempt in enumerate(record.attempts, 1):
            self._parts_of(attempt, number, record, inside, began_ns)
        root.end(began_ns + int(record.e2e_s * 1e9))

    def _parts_of(self, attempt: AttemptRecord, number: int, record: RequestRecord, inside: Any, began_ns: int) -> None:
        end_s = record.e2e_s if attempt.ended_s is None else attempt.ended_s
        first_s = end_s if attempt.first_token_s is None else attempt.first_token_s
        common: dict[str, Any] = {"hbserve.attempt": number}
        if attempt.error:
            common["error.type"] = attempt.error
        on_prefill = common | {"hbserve.instance": attempt.prefill_instance}
        on_decode = common | {"hbserve.instance": attempt.decode_instance}
        if attempt.granted_s is not None and attempt.decode_instance:
            self._part(inside, began_ns, "reserve", attempt.began_s, attempt.granted_s, on_decode)
        self._part(inside, began_ns, "prefill", attempt.began_s, first_s, on_prefill, attempt.computed)
        if attempt.pushed and attempt.kv_there_s is not None:
            moved = {"hbserve.kv.bytes": record.kv_bytes, "hbserve.kv.overlap": attempt.kv_overlap or 0.0}
            peers = {"hbserve.kv.from": attempt.prefill_instance, "hbserve.kv.to": attempt.decode_instance}
            self._part(
                inside, began_ns, "kv_transfer", attempt.pushed[0][0], attempt.kv_there_s, common | moved | peers
            )
        if attempt.first_token_s is not None and attempt.decode_instance:
            self._part(inside, began_ns, "decode", first_s, end_s, on_decode)

    def _part(
        self,
        inside: Any,
        began_ns: int,
        name: str,
        begin_s: float,
        end_s: float,
        attributes: dict[str, Any] | None = None,
        chunks: list[tuple[float, int]] | None = None,
    ) -> None:
        """Make a span below that of the request. `begin_s`, `end_s` and the times of chunks count, as in the record,
        from the submission of the request."""
        start_ns = began_ns + int(begin_s * 1e9)
        span = self._tracer.start_span(f"hbserve.{name}", inside, attributes=attributes, start_time=start_ns)
        for at_s, num_tokens in chunks or ():
            span.add_event("chunk", {"hbserve.tokens": num_tokens}, began_ns + int(at_s * 1e9))
        span.end(max(start_ns, began_ns + int(end_s * 1e9)))


def _attributes(asked: Asked, record: RequestRecord) -> dict[str, Any]:
    """Return the attributes of OpenTelemetry's GenAI conventions, and the latencies that vLLM's span has."""
    params = asked.params
    known = {
        "gen_ai.operation.name": asked.http.operation,
        "gen_ai.provider.name": "hbserve",
        "gen_ai.request.model": asked.model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.stop_sequences": list(params.stop) or None,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.model": asked.model,
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": record.first_token_s,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "gen_ai.latency.time_in_queue": record.queue_s,
        "gen_ai.latency.time_to_first_token": record.first_token_s,
        "gen_ai.latency.e2e": record.e2e_s,
        "gen_ai.latency.time_in_model_inference": record.e2e_s - record.queue_s,
        "gen_ai.latency.time_in_model_decode": record.decode_s,
        "hbserve.handoff_s": record.handoff_s,
        "hbserve.held_up_by": record.main_delay,
        "error.type": None if record.finish_reason else record.error,
    }
    return {name: value for name, value in known.items() if value is not None}


def spans_from_environment(address: tuple[str, int] | None) -> Spans | None:
    """Make Spans that go to the collector that OpenTelemetry's variables name. Returns None if they name none.

    Raises:
        ConfigError: a variable names a collector, but the extra is not installed.
    """
    named = [name for name in ENDPOINTS if os.environ.get(name)]
    if not named:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"{named[0]} is set: pip install 'hbserve-compat[otel]', or unset it ({error})") from None
    service = os.environ.get("OTEL_SERVICE_NAME", "hbserve")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider, address)
