"""One request of a load to a server with OpenAI's API, and the times at which the parts of its answer came."""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from hbserve.client.event_data import EventData
from hbserve.client.http_stream import HttpClient
from hbserve_rpc import HBServeRpcError
from hbserve_rpc.plain_values import shown

SHOWN = 60
"""How many bytes of a body without events the error shows."""


@dataclass
class Outcome:
    """The result of one request. Times are in seconds of `time.perf_counter`."""

    prompt_len: int
    planned_s: float = 0.0
    """Time at which the request was due."""
    start_s: float = 0.0
    ready_s: float = 0.0
    """Time at which the request's task began. Because of `--max-concurrency`, it may then wait until `start_s`."""
    by_choice: dict[int, list[float]] = field(default_factory=dict)
    """Times at which events with text came, for each choice of the answer (`n`)."""
    text: str = ""
    output_tokens: int = 0
    latency_s: float = 0.0
    error: str = ""
    server: dict[str, Any] = field(default_factory=dict)
    """The server's own figures, from `metrics` of the last event. HBServe and vLLM send them."""

    @property
    def is_ok(self) -> bool:
        return not self.error

    @property
    def arrivals(self) -> list[float]:
        """Times at which events with text came, of all choices, in order."""
        return sorted(at_s for times in self.by_choice.values() for at_s in times)

    @property
    def ttft_s(self) -> float:
        return min(times[0] for times in self.by_choice.values()) - self.start_s if self.by_choice else 0.0

    @property
    def itls_s(self) -> list[float]:
        """Times between tokens of the same choice: another choice's first token is nobody's second."""
        return [after - before for times in self.by_choice.values() for before, after in pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first of its choice; None if there is no second token."""
        num_later = self.output_tokens - len(self.by_choice)
        spent_s = sum(times[-1] - times[0] for times in self.by_choice.values())
        return spent_s / num_later if num_later > 0 else None

    @property
    def queue_s(self) -> float:
        """How long the client held the request back because of `--max-concurrency`."""
        return self.start_s - self.ready_s


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: _Delta | None = None

    def said(self) -> str:
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning or self.delta.reasoning_content or ""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    metrics: dict[str, Any] | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Event)


class AnswerReader:
    """Reads the events of one answer into its `outcome`."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._events = EventData()
        self._texts: dict[int, str] = {}
        self._last_s = 0.0
        self._has_events = False
        self._beginning = b""
        """The first bytes of the body, for the error if it has no events."""

    def feed(self, data: bytes) -> None:
        """Read a piece of the body that has just come."""
        now_s = self._last_s = time.perf_counter()
        self._beginning = (self._beginning + data)[:SHOWN]
        for event in self._events.feed(data):
            self._has_events = True
            self._take(_DECODER.decode(event), now_s)

    def _take(self, event: _Event, now_s: float) -> None:
        outcome = self._outcome
        if event.error:
            outcome.error = str(event.error)
        if event.usage is not None:
            outcome.output_tokens = event.usage.completion_tokens
            outcome.prompt_len = event.usage.prompt_tokens or outcome.prompt_len
        if event.metrics:
            outcome.server = event.metrics
        for choice in event.choices:
            said = choice.said()
            # A token may be half a character, or special. In /v1/completions a choice of an event has one anyway.
            if said or choice.text is not None:
                outcome.by_choice.setdefault(choice.index, []).append(now_s)
                self._texts[choice.index] = self._texts.get(choice.index, "") + said

    def end(self) -> None:
        """Complete the outcome at the end of the body."""
        outcome = self._outcome
        outcome.text = "".join(self._texts.values())
        arrivals = outcome.arrivals
        if not arrivals and not outcome.error:
            outcome.error = "the answer has ended without a token"
            if self._beginning and not self._has_events:
                said = shown(self._beginning.decode(errors="replace"))
                outcome.error += f": expected server-sent events, and it begins with {said}"
        last_s = arrivals[-1] if arrivals else self._last_s
        outcome.latency_s = last_s - outcome.start_s


async def ask(client: HttpClient, path: str, body: dict[str, Any], outcome: Outcome, request_id: str = "") -> None:
    """Send one request and read its answer. Errors are recorded in the outcome, not raised."""
    reader = AnswerReader(outcome)
    encoded = msgspec.json.encode(body)
    outcome.start_s = time.perf_counter()
    try:
        status, text, _ = await client.request("POST", path, encoded, reader.feed, request_id)
    except (HBServeRpcError, OSError, msgspec.DecodeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    else:
        if status != 200:
            outcome.error = f"HTTP {status}: {text[:300].decode(errors='replace')}"
    reader.end()
