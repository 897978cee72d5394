"""A scheduler that answers as a test tells it to, and an OpenAI server in front of it, in this process."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from hbserve.server.app import make_app
from hbserve.server.service import Service
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import Overloaded, SamplingParams
from hbserve_rpc.counts import Histogram
from hbserve_rpc.messages import (
    FinishReason,
    GenerateRequest,
    InstanceInfo,
    InstanceStats,
    InstanceStatus,
    RequestFinished,
    SchedulerStats,
    ServiceInfo,
    TokenEvent,
)
from hbserve_rpc.records import RequestRecord
from hbserve_rpc.trace_context import TRACEPARENT
from hbserve_scheduler.admission import admitted
from hbserve_scheduler.config import ServerSection
from hbserve_scheduler.figures import Figures

MAX_MODEL_LEN = 512
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ suffix }}"


TOOL_TEMPLATE = (
    "{# tools: <tool_call>, and <think> </think> #}{{ tools | map(attribute='function.name') | join if tools }}"
    "{{ reasoning_effort }}{% for m in messages %}<{{ m.role }}>{{ m.reasoning }}[{{ m.content }}]"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}{% endfor %}"
    "{{ enable_thinking }}"
)
"""Chat template of a model that thinks and knows tools. Its prompts show everything that they were made from."""
THOUGHT_TEXT_AND_CALL = [
    "<thi", "nk>\nhm", ", f", "</think>\n\nSo", " be it.", '\n<tool_call>{"name": "f", "arguments": {"a"',
    ": 1}}</tool_call>",
]  # fmt: skip
"""Steps of an answer of a model with TOOL_TEMPLATE."""


class FakeEvents:
    """The stream of one request's events, which `FakeScheduler.steps` determines."""

    def __init__(self, scheduler: "FakeScheduler", request: GenerateRequest) -> None:
        self._scheduler = scheduler
        self._request = request
        self.aborted: FinishReason | None = None
        self.ended: dict[int, FinishReason] = {}
        """Choices that were aborted one by one, with the reasons."""
        self._events = self._all()

    def __aiter__(self) -> AsyncIterator[TokenEvent | RequestFinished]:
        return self._events

    async def each(self, take: Callable[[TokenEvent | RequestFinished], object]) -> bool:
        async for event in self._events:
            if take(event):
                return True
        return False

    async def _all(self) -> AsyncGenerator[TokenEvent | RequestFinished, None]:
        given = 0
        reason: FinishReason = "stop"
        for step in self._scheduler.steps:
            await asyncio.sleep(0)  # no step of an engine is there at once
            if self.aborted:
                break
            if isinstance(step, Exception):
                self._end()
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            left = self._request.params.max_tokens - given
            if left <= len(step):
                reason = "length"
            for choice in range(self._request.params.n):
                if choice not in self.ended:
                    self._scheduler.num_given += len(step[:left])
                    yield self._event(given, step[:left], choice)
            given += len(step[:left])
            if reason == "length":
                break
        self._end()
        for choice in range(self._request.params.n):
            yield self._finished(self.ended.get(choice, self.aborted or reason), given, choice)

    def _event(self, index: int, tokens: list[int], choice: int) -> TokenEvent:
        of_prompt = self._prompt_logprobs() if index == choice == 0 else []
        return TokenEvent(index, [*tokens], None, self._logprobs(tokens), of_prompt, choice)

    def _finished(self, reason: FinishReason, given: int, choice: int) -> RequestFinished:
        return RequestFinished(
            reason,
            len(self._request.prompt_token_ids),
            given,
            queue_time_s=0.001,
            ttft_s=0.002,
            tpot_s=0.003,
            e2e_s=0.05,
            handoff_s=0.004,
            kv_bytes=4096,
            kv_transfer_time_s=0.004,
            num_cached_tokens=7,
            num_attempts=1,
            prefill_instance="p0",
            decode_instance="d0",
            choice=choice,
        )

    def _logprobs(self, token_ids: list[int]) -> list[dict[int, float]]:
        """Make log-probabilities in which tokens 3, 4 … are always the most likely ones, and the chosen one is
        impossible."""
        count = self._request.params.logprobs
        if count is None:
            return []
        most_likely = {3 + place: -1.0 - place for place in range(count)}
        return [most_likely | {token_id: float("-inf")} for token_id in token_ids]

    def _prompt_logprobs(self) -> list[dict[int, float]]:
        """Make log-probabilities that fall by 1 from token to token of the prompt."""
        if self._request.params.prompt_logprobs is None:
            return []
        return [{token: -1.0 - place} for place, token in enumerate(self._request.prompt_token_ids) if place]

    def _end(self) -> None:
        self._scheduler.running.pop(self._request.request_id, None)

    async def aclose(self) -> None:
        if self._scheduler.running.pop(self._request.request_id, None):
            self._scheduler.num_abandoned += 1


class FakeScheduler:
    """Answers every request with the same steps: tokens, an error to raise, or an event to wait for."""

    def __init__(self) -> None:
        self.steps: list[list[int] | Exception | asyncio.Event] = []
        self.running: dict[str, FakeEvents] = {}
        self.num_abandoned = 0
        self.num_given = 0
        """Number of tokens of all answers so far."""
        self.asked: list[tuple[tuple[int, ...], SamplingParams]] = []
        self.request_ids: list[str] = []
        """Ids of all requests so far."""
        self.traces: list[str] = []
        """The `traceparent` of each request so far."""
        self.most_running = 1000
        self.role = "hybrid"
        self.status: InstanceStatus = "ready"
        self.digest_block_size = 0
        self.figures = Figures()
        """Figures for tests to set; nothing here changes them."""

    def submit(self, request: GenerateRequest) -> FakeEvents:
        request = self.check(request)
        self.require_room()
        self.asked.append((request.prompt_token_ids, request.params))
        self.request_ids.append(request.request_id)
        self.traces.append(TRACEPARENT.get())
        events = self.running[request.request_id] = FakeEvents(self, request)
        return events

    def check(self, request: GenerateRequest) -> GenerateRequest:
        return admitted(request, self.info().instances)

    def require_room(self, priority: int = 0) -> None:
        if len(self.running) >= self.most_running:
            raise Overloaded("so many requests are waiting", 7.2)

    async def wait_for_room(self, priority: int = 0) -> None:
        raise AssertionError("a server refuses; it is not waiting")

    async def abort(self, request_id: str, reason: FinishReason = "abort", choice: int | None = None) -> bool:
        if request_id in self.running and choice is not None:
            self.running[request_id].ended[choice] = reason
        elif request_id in self.running:
            self.running[request_id].aborted = reason
        return request_id in self.running

    def may_serve(self) -> bool:
        return self.role != "prefill"  # a decode instance computes prompts too, where there is nobody else

    def info(self) -> ServiceInfo:
        info = InstanceInfo(
            "h0", "hybrid", "1", "ready", max_model_len=MAX_MODEL_LEN, max_prompt_len=MAX_MODEL_LEN - 1, vocab_size=320
        )
        return ServiceInfo(True, "/models/small", MAX_MODEL_LEN, [info])

    async def fetch_stats(self) -> SchedulerStats:
        return self.stats()

    async def fetch_records(self, last_s: float, request_id: str = "") -> list[RequestRecord]:
        return [each for each in self.figures.records if request_id in ("", each.request_id)]

    def stats(self) -> SchedulerStats:
        tokens, lag = Histogram([1.0], [2, 3], 17), Histogram([0.1], [4, 0], 0.25)
        instance = InstanceStats(
            "h0",
            self.role,  # type: ignore[arg-type]
            self.status,
            num_blocks=9,
            free_blocks=4,
            cached_blocks=1,
            reserved_blocks=2,
            quarantined_blocks=1,
            iteration_tokens=tokens,
            loop_lag=lag,
        )
        return SchedulerStats(**self.figures.snapshot(), instances=[instance])


class FakeServer:
    """The ASGI application in front of a FakeScheduler, and a client of it."""

    url: str
    """URL of the HTTP server in front of it, set by the fixture that starts one."""

    def __init__(self, tokenizer: Any, folder: Path = Path("/models/small"), **settings: Any) -> None:
        self.scheduler = FakeScheduler()
        self.tokenizer = tokenizer
        self.service = Service(ServerSection(**({"chat_template": TEMPLATE} | settings)))
        self.app = make_app(self.service)
        self.service.begin("small", folder, self.scheduler, tokenizer, self.scheduler)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def answers(self, *texts: str) -> None:
        """Set the answer to every request: the tokens of each text, one for each byte, are one step."""
        self.scheduler.steps = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", **{"messages": [{"role": "user", "content": "hi"}]} | body)

    @property
    def prompt(self) -> str:
        """Text of the last request's prompt."""
        return str(self.tokenizer.decode(self.scheduler.asked[-1][0]))

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", **{"prompt": "hi"} | body)


def chunks_of(response: httpx.Response) -> list[Any]:
    """Return the JSON of each event of a stream, which must end with [DONE]."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def named_events_of(response: httpx.Response) -> list[Any]:
    """Return the JSON of each event of a stream whose events are named by their type. It ends without [DONE]."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    pairs = [event.split("\n") for event in events]
    found = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {each['type']}" for each in found]
    return found


def server_that_thinks(small_model: Any) -> FakeServer:
    """Make a FakeServer whose answers have reasoning, text and a tool call."""
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=TOOL_TEMPLATE)
    server.answers(*THOUGHT_TEXT_AND_CALL)
    return server
