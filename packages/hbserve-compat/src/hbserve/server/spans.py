"""Spans of requests for OpenTelemetry, made of their records when they have ended. Needs the extra `otel`.

    chat small                     SERVER, child of the caller's `traceparent`; GenAI attributes, and vLLM's latencies
    ├── hbserve.queue
    ├── hbserve.reserve            siblings: none of them contains another's time
    ├── hbserve.prefill            an event for each chunk
    ├── hbserve.kv_transfer        bytes, and the part of its time that was hidden behind the prompt
    └── hbserve.decode
Further attempts repeat the ones below. A thread makes them, so that no request waits for it.
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
"""Variables of OpenTelemetry's own; spans are made if one of them says where to."""
MOST_ASKED = 65536
"""Requests under way that are remembered."""
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Asked:
    """A request of a client, as it came."""

    http: HttpRequest
    model: str
    params: SamplingParams


class Spans:
    """Made of requests whose beginning and end it is told. May be told by one thread; has another one of its own."""

    def __init__(self, provider: Any, address: tuple[str, int] | None = None) -> None:
        """provider: a TracerProvider of the OpenTelemetry SDK; address: of the server."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("hbserve")
        self._address = address
        self._asked: dict[str, tuple[Asked, Any]] = {}
        """Requests with their spans, which go on."""
        self._ended: queue.SimpleQueue[tuple[Asked, Any, RequestRecord] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def began(self, request_id: str, asked: Asked) -> str:
        """Returns its `traceparent`, for whatever is asked on its behalf: its span begins now, and knows no more yet
        than whose child it is."""
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
        """It was not taken in: no span is made of it."""
        self._asked.pop(request_id, None)

    def ended(self, record: RequestRecord) -> None:
        """One that did not begin here is passed over."""
        begun = self._asked.pop(record.request_id, None)
        if begun is not None:
            self._ended.put((*begun, record))

    def close(self) -> None:
        """Send what there is, for as long as a collector that answers takes."""
        self._ended.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._provider.shutdown()

    def _run(self) -> None:
        while (one := self._ended.get()) is not None:
            try:
                self._make(*one)
            except Exception:  # of a library that is not ours: requests go on
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
        """begin_s, end_s, and the times of chunks are of the record: since its request was submitted."""
        start_ns = began_ns + int(begin_s * 1e9)
        span = self._tracer.start_span(f"hbserve.{name}", inside, attributes=attributes, start_time=start_ns)
        for at_s, num_tokens in chunks or ():
            span.add_event("chunk", {"hbserve.tokens": num_tokens}, began_ns + int(at_s * 1e9))
        span.end(max(start_ns, began_ns + int(end_s * 1e9)))


def _attributes(asked: Asked, record: RequestRecord) -> dict[str, Any]:
    """GenAI semantic conventions, and the latencies that vLLM's span has."""
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
    """To the collector that OpenTelemetry's variables name; None: they name none.

    Raises:
        ConfigError: they do, and the extra is not installed.
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
