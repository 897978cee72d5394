"""Scripted instances: real RPC servers that answer like instances, without a model."""

import asyncio
import contextlib
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from hbserve_rpc import InvalidRequest, Overloaded, RpcServer, SamplingParams
from hbserve_rpc.members import INSTANCE_FLIP, FlipRequest
from hbserve_rpc.messages import (
    CONNECT,
    DECODE,
    DESCRIBE,
    END_CHOICE,
    GENERATE,
    GRANT,
    PREFILL,
    STATS,
    ConnectRequest,
    DecodeRequest,
    Empty,
    EndChoice,
    GenerateRequest,
    Granted,
    GrantRequest,
    InstanceInfo,
    InstanceStats,
    InstanceStatus,
    Milestone,
    PrefillRequest,
    RequestFinished,
    Role,
    TokenEvent,
    TransferDone,
)
from hbserve_rpc.reports import REPORTS, InstanceReport, ReportsRequest
from hbserve_rpc.trace_context import TRACEPARENT
from hbserve_scheduler import CpuScheduler, EventStream, SchedulerConfig
from hbserve_testing import waits

DEADLINE_S = 30.0
VOCAB_SIZE = 1000
NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS = 1000, 16, 64
MAX_PROMPT_LEN = 64


def token(index: int) -> int:
    """What every instance generates at this place of the output."""
    return 100 + index


CHOICE = 200
"""The tokens of each choice are so many above those of the one before."""


class FakeInstance:
    """Token i of every answer is 100 + i. Each request passes named phases, where a test can hold it or fail it.

    Phases: "grant" and "tokens" of a decode instance, "first", "done" and "connect d0" of a prefill instance, "tokens"
    of a hybrid one, "flip" of all. A prefill instance that has begun before its grant waits for that between "first"
    and the token.
    """

    def __init__(
        self, role: Role, instance_id: str, journal: list[tuple[str, str]], host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.host = host
        self.role: Role = role
        self.started_as: Role = role
        self.epoch = ""
        """Of what it is since it has another role than at its start."""
        self.instance_id = instance_id
        self.journal = journal
        """(instance, what) in the order in which it happened, over all instances of the test."""
        self.requests: list[Any] = []
        self.traces: list[str] = []
        """To which they belong."""
        self.connected: list[bytes] = []
        """Endpoints that it was asked to connect to, and did."""
        self.granted: dict[str, asyncio.Future[bytes]] = {}
        """By request, what a prefill instance waits for."""
        self.free_blocks = 0
        """That it reports. With 0 a scheduler reserves before it lets a prompt be computed."""
        self.open = 0
        """Streams that are under way."""
        self.hold: set[str] = set()
        self.num_held = 0
        """Streams that are held now."""
        self.fail: dict[str, list[Exception | None]] = defaultdict(list)
        """The next requests that reach this phase fail so, one error each; with None, one does not."""
        self.silent: set[str] = set()
        """Phases at which a stream just ends, as no correct instance does."""
        self.stop_at: int | None = None
        """This token is an end-of-sequence token."""
        self.choice_stops: dict[int, int] = {}
        """The same of one choice."""
        self.transfer_age_s = 0.3
        """How long before the end of its transfer a prompt was computed, as it says."""
        self.num_preemptions = 0
        """That it tells with each token."""
        self.ended_choices: list[int] = []
        """That it was told to end."""
        self.repeats = False
        """Sends each token again with the next one."""
        self.serves_generate = role == "hybrid"
        self.max_model_len = 128
        self.others = 0, 0
        """Requests of other schedulers, and tokens of them, that it reports."""
        self.status: InstanceStatus = "ready"
        self.error = ""
        self._released = asyncio.Event()
        self.server = self._make_server(port)

    def _make_server(self, port: int) -> RpcServer:
        server = RpcServer(self.host, port, epoch=uuid.uuid4().hex)
        server.serve(DESCRIBE, self._describe)
        server.serve(STATS, self._stats)
        server.serve_stream(REPORTS, self._reports)
        server.serve(INSTANCE_FLIP, self._flip)
        server.serve(CONNECT, self._connect)
        server.serve_notification(GRANT, self._grant)
        server.serve_notification(END_CHOICE, self._end_choice)
        server.serve_stream(DECODE, self._decode)
        server.serve_stream(PREFILL, self._prefill)
        server.serve_stream(GENERATE, self._generate)
        return server

    @property
    def address(self) -> str:
        return self.server.address

    async def die(self) -> None:
        """As a process that is killed: it says no goodbye."""
        self.server._socket.say_last = lambda frames: None  # type: ignore[method-assign]
        await self.server.stop()

    async def restart(self) -> None:
        """Another process on the same port."""
        await self.server.stop()
        self.role, self.epoch = self.started_as, ""
        self.server = self._make_server(self.server.port)
        await self.server.start()

    def release(self) -> None:
        self.hold.clear()
        self._released.set()

    async def _describe(self, _: Empty) -> InstanceInfo:
        return InstanceInfo(
            self.instance_id, self.role, self.epoch or self.server.epoch, self.status, max_model_len=self.max_model_len,
            max_prompt_len=MAX_PROMPT_LEN, vocab_size=VOCAB_SIZE, error=self.error, kv_endpoint=self.kv_endpoint,
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_NUM_SEQS,
            serves_generate=self.serves_generate,
            started_as=self.started_as if self.started_as != self.role else None,
        )  # fmt: skip

    async def _flip(self, request: FlipRequest) -> InstanceInfo:
        await self._phase("flip")
        if self.open:
            raise Overloaded(f"{self.instance_id} has {self.open} requests")
        self.role, self.epoch = request.role, uuid.uuid4().hex
        return await self._describe(Empty())

    @property
    def kv_endpoint(self) -> bytes:
        return f"{self.instance_id}@{self.epoch or self.server.epoch}".encode() if self.role == "decode" else b""

    async def _connect(self, request: ConnectRequest) -> Empty:
        await self._phase(f"connect {request.kv_endpoint.decode().partition('@')[0]}")
        self.connected.append(request.kv_endpoint)
        return Empty()

    async def _stats(self, _: Empty) -> InstanceStats:
        return InstanceStats(
            self.instance_id, self.role, self.status, self.epoch or self.server.epoch, active_requests=self.open,
            free_blocks=self.free_blocks,
        )  # fmt: skip

    async def _reports(self, request: ReportsRequest) -> AsyncIterator[InstanceInfo | InstanceReport]:
        said: list[Any] = [None, None]
        while True:
            report = InstanceReport(await self._stats(Empty()), *self.others)
            now: tuple[InstanceInfo | InstanceReport, ...] = (await self._describe(Empty()), report)
            for place, each in enumerate(now):
                if each != said[place]:
                    said[place] = each
                    yield each
            await asyncio.sleep(request.interval_s / 10)  # a test waits for each change

    async def _grant(self, request: GrantRequest) -> None:
        future = self.granted.get(request.request_id)
        self.journal.append((self.instance_id, "granted" if future else "granted too late"))
        if future is not None and not future.done():
            future.set_result(request.grant)

    async def _end_choice(self, request: EndChoice) -> None:
        self.ended_choices.append(request.choice)

    async def _phase(self, name: str) -> None:
        self.journal.append((self.instance_id, name))
        if self.fail[name] and (error := self.fail[name].pop(0)) is not None:
            raise error
        if name in self.hold:
            self._released.clear()
            self.num_held += 1
            try:
                await self._released.wait()
            finally:
                self.num_held -= 1

    @contextlib.contextmanager
    def _stream(self, request: Any) -> Any:
        self.requests.append(request)
        self.traces.append(TRACEPARENT.get())
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
            self.journal.append((self.instance_id, "closed"))

    def _event(self, request: Any, index: int, choice: int = 0) -> TokenEvent:
        stops = index == self.stop_at or index == self.choice_stops.get(choice)
        ends = "stop" if stops else "length" if index + 1 >= request.params.max_tokens else None
        first = max(0, index - 1) if self.repeats else index
        # A choice that goes on by itself is known by its seed.
        tokens = [token(i) + CHOICE * (choice + (request.params.seed or 0)) for i in range(first, index + 1)]
        logprobs = [] if request.params.logprobs is None else [{each: -float(each)} for each in tokens]
        # As real ones: a decode instance knows nothing of the prompt's.
        asked = request.params.prompt_logprobs is not None
        knows_prompt = asked and self.role != "decode" and first == 0 and choice == 0
        of_prompt = [{each: -1.0} for each in request.prompt_token_ids[1:]] if knows_prompt else []
        counted = self.num_preemptions
        return TokenEvent(first, tokens, ends, logprobs, of_prompt, choice, counted)  # type: ignore[arg-type]

    async def _tokens(self, request: Any, index: int, choices: list[int]) -> AsyncGenerator[TokenEvent]:
        while choices:
            await self._phase("tokens")
            if "tokens" in self.silent:
                return
            events = [self._event(request, index, choice) for choice in choices if choice not in self.ended_choices]
            for event in events:
                yield event
            if not events:  # it does not know that nothing more is wanted
                await asyncio.Event().wait()
            choices = [choice for choice in choices if choice not in {e.choice for e in events if e.finish_reason}]
            index += 1

    async def _decode(self, request: DecodeRequest) -> AsyncIterator[Granted | TokenEvent]:
        with self._stream(request):
            await self._phase("grant")
            if "grant" in self.silent:
                return
            yield Granted(f"{self.instance_id}:{request.transfer_id}".encode(), num_cached_tokens=1)
            first = len(request.output_token_ids)
            left = [
                choice for choice in range(request.params.n) if not self._event(request, first, choice).finish_reason
            ]
            # By P all have ended: this side hears of it, and has nothing to compute.
            choices = left or list(range(request.params.n))
            async with contextlib.aclosing(self._tokens(request, first + bool(left), choices)) as events:
                async for event in events:
                    yield event

    async def _prefill(self, request: PrefillRequest) -> AsyncIterator[TokenEvent | TransferDone]:
        granted = self.granted[request.request_id] = asyncio.get_running_loop().create_future()
        if not request.grant_follows:
            granted.set_result(request.grant)
        with self._stream(request):
            try:
                await self._phase("first")
                if "first" in self.silent:
                    return
                first = len(request.output_token_ids)
                events = [self._event(request, first, choice) for choice in range(request.params.n)]
                if any(event.finish_reason is None for event in events):
                    await granted
                for event in events:
                    yield event
                await self._phase("done")
                if await granted:
                    age_s = self.transfer_age_s
                    computed, pushed = [Milestone(age_s, len(request.prompt_token_ids))], [Milestone(2 * age_s, 1)]
                    yield TransferDone(1000, 1, 0.5, computed=computed, pushed=pushed)
            finally:
                del self.granted[request.request_id]

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if not self.serves_generate:
            raise InvalidRequest(f"{self.instance_id} computes no prompts")
        with self._stream(request):
            choices = list(range(request.params.n))
            async with contextlib.aclosing(self._tokens(request, len(request.output_token_ids), choices)) as events:
                async for event in events:
                    yield event


@pytest.fixture
def journal() -> list[tuple[str, str]]:
    return []


@pytest.fixture
async def make_instance(journal: list[tuple[str, str]]) -> AsyncIterator[Callable[..., Awaitable[FakeInstance]]]:
    made: list[FakeInstance] = []

    async def make(role: Role, instance_id: str) -> FakeInstance:
        instance = FakeInstance(role, instance_id, journal)
        made.append(instance)
        await instance.server.start()
        return instance

    yield make
    for instance in made:
        await instance.server.stop()


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Awaitable[None]]:
    return partial(waits.until, deadline_s=DEADLINE_S)


@pytest.fixture
def assert_empty(until: Any) -> Callable[[CpuScheduler], Awaitable[None]]:
    """Nothing waits, nothing runs, and every place was given back exactly once."""

    async def check(scheduler: CpuScheduler) -> None:
        await until(lambda: not scheduler.running_requests)
        assert not scheduler.waiting_requests
        assert not scheduler.retries.waiting
        for handle in scheduler.fleet.handles.values():
            assert (handle.load, handle.num_inflight, handle.num_pending) == (0, 0, 0), handle.instance_id
        stats = scheduler.stats()
        assert (stats.waiting_requests, stats.running_requests) == (0, 0)
        assert stats.total_requests == stats.completed_requests + stats.failed_requests + stats.aborted_requests

    return check


@pytest.fixture
async def make_scheduler(assert_empty: Any, until: Any) -> AsyncIterator[Callable[..., Awaitable[CpuScheduler]]]:
    """Started schedulers of instances that are ready. At the end of the test they and the instances must be empty."""
    made: list[tuple[CpuScheduler, tuple[FakeInstance, ...]]] = []

    async def make(
        *instances: FakeInstance,
        kind: type[CpuScheduler] = CpuScheduler,
        starts: bool = True,
        ready: bool = True,
        **options: Any,
    ) -> CpuScheduler:
        timing = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 2.0, "port": 0}
        scheduler = kind(SchedulerConfig(**(timing | options)))
        made.append((scheduler, instances))
        for instance in instances:
            await scheduler.add_instance(instance.instance_id, instance.role, instance.address)
        if starts:
            await scheduler.start()
        if starts and ready:
            await scheduler.wait_ready(DEADLINE_S)
            handles = scheduler.fleet.handles.values()
            decodes = [each.epoch for each in handles if each.role == "decode"]
            wanted = set(decodes[: scheduler.config.max_warm_links])
            # Not chosen by which link happened to be there first.
            await until(lambda: all(each.links.keys() >= wanted for each in handles if each.role == "prefill"))
        return scheduler

    yield make
    try:
        for scheduler, instances in made:
            await assert_empty(scheduler)
            await until(lambda instances=instances: not any(instance.open for instance in instances))
    finally:
        for scheduler, _ in made:
            await scheduler.stop()


@pytest.fixture
async def pair(make_instance: Any) -> tuple[FakeInstance, FakeInstance]:
    return await make_instance("prefill", "p0"), await make_instance("decode", "d0")


@pytest.fixture
def ask() -> Callable[..., GenerateRequest]:
    def make(request_id: str = "r", *, length: int = 4, max_tokens: int = 4, **rest: Any) -> GenerateRequest:
        return GenerateRequest(request_id, (7,) * length, SamplingParams(max_tokens=max_tokens), **rest)

    return make


@pytest.fixture
def collect() -> Callable[[EventStream], Awaitable[tuple[list[int], RequestFinished]]]:
    """Tokens and end of a stream; checks that no token is missing, doubled or out of order."""

    async def read(events: EventStream) -> tuple[list[int], RequestFinished]:
        tokens: list[int] = []
        first: int | None = None
        async with asyncio.timeout(DEADLINE_S):
            async for event in events:
                if isinstance(event, RequestFinished):
                    assert [each async for each in events] == []
                    return tokens, event
                first = event.index if first is None else first
                assert event.index == first + len(tokens)
                tokens += event.token_ids
        raise AssertionError(f"the stream ended without RequestFinished after {tokens}")

    return read
