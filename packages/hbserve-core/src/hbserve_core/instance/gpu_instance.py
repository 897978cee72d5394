"""GpuInstance: one engine served over RPC, with its KV transfers, in two threads: the event loop and the engine.

    _generate   add ▶ TokenEvents ▶ _close
    _prefill    add ▶ follow, which pushes ▶ first token ▶ finish, which commits ▶ _end_prefill
    _decode     reserve ▶ post_receive ▶ Granted ▶ wait_for_kv ▶ activate ▶ TokenEvents ▶ _end_decode
Each request is one coroutine; the last step of each releases the blocks, once no transfer touches them any more.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any

import msgspec

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.engine import Engine
from hbserve_core.engine.step import EngineStats, Runner
from hbserve_core.errors import EngineStopped, InstanceFailed
from hbserve_core.instance.engine_thread import EngineEvent, EngineThread
from hbserve_core.instance.handover import GRANT_PATIENCE_S, Inbox, PrefillSend, as_rpc_error, event_of, wait_for_kv
from hbserve_core.instance.reports import Reports
from hbserve_core.ranks.make_runner import make_runner
from hbserve_core.transfers.instance_transfers import InstanceTransfers, JointReceive
from hbserve_kv import Outcome, PostedReceive
from hbserve_rpc import EngineFailed, InvalidRequest, Overloaded, RemoteError, RpcServer
from hbserve_rpc.health_port import HealthPort
from hbserve_rpc.instance_metrics import instance_metrics
from hbserve_rpc.loop_lag import LoopLag
from hbserve_rpc.members import INSTANCE_FLIP, FlipRequest
from hbserve_rpc.messages import (
    CACHED_PREFIXES,
    CONNECT,
    DECODE,
    DESCRIBE,
    END_CHOICE,
    GENERATE,
    GRANT,
    PREFILL,
    STATS,
    CachedPrefixes,
    CachedPrefixesRequest,
    ConnectRequest,
    DecodeRequest,
    Empty,
    EndChoice,
    GenerateRequest,
    Granted,
    GrantRequest,
    InstanceInfo,
    InstanceStatus,
    PrefillRequest,
    TokenEvent,
    TransferDone,
)
from hbserve_rpc.metrics_text import Family
from hbserve_rpc.own_process import with_file_limit
from hbserve_rpc.reports import REPORTS
from hbserve_rpc.trace_context import TRACEPARENT

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0
"""Longest time that `stop` waits for requests to give back their blocks; a dead or frozen peer could take longer."""


class GpuInstance:
    """Prefill, decode or hybrid instance. Belongs to the event loop that ran `start`."""

    def __init__(self, config: InstanceConfig, *, before_ready: Callable[[], object] = lambda: None) -> None:
        """before_ready: called when the model is loaded, before the instance reports that it is ready."""
        self.config = config
        self._before_ready = before_ready
        self.epoch = uuid.uuid4().hex
        self.started_as = config.role
        self.status: InstanceStatus = "starting"
        self.error = ""
        self.engine: Engine | None = None
        """Engine, which belongs to its thread; other threads may only read what never changes."""
        self.runner: Runner | None = None
        self.transfers: InstanceTransfers | None = None
        self._server = RpcServer(
            config.host, config.port, epoch=self.epoch, drops_closed=True, keys=config.keys, allows=["scheduler"]
        )
        self.reports = Reports(self, self._server)
        self._thread = EngineThread(self._make_engine, on_events=self._deliver, on_failure=self._fail)
        self.loop_lag = LoopLag()
        self.health: HealthPort | None = None
        if config.health_port is not None:
            self.health = HealthPort(
                config.host,
                config.health_port + config.kv_rank if config.health_port else 0,
                why_dead=lambda: self.error,
                why_not_ready=lambda: "" if self.status == "ready" else f"{config.instance_id} is {self.status}",
                metrics=self._metrics,
            )
        self._inboxes: dict[str, Inbox] = {}
        self._ends: set[asyncio.Task[None]] = set()
        self._loading: asyncio.Task[None] | None = None
        self._has_failed = asyncio.Event()

    @property
    def address(self) -> str:
        """`host:port` of the RPC server."""
        return self._server.address

    @property
    def num_active(self) -> int:
        """Number of requests that hold something here. When it is 0, every block is free or quarantined."""
        return len(self._inboxes)

    @property
    def engine_stats(self) -> EngineStats:
        return self._thread.stats

    async def start(self) -> None:
        """Start to serve at once, and load the model in the background; see `status` and `wait_ready`.

        Raises:
            AddressInUse: the configured address is taken.
            AddressNotAvailable: this machine does not have the address for KV transfers.
        """
        self._server.serve(DESCRIBE, self.reports.describe)
        self._server.serve(STATS, self.reports.stats)
        self._server.serve_stream(REPORTS, self.reports.follow)
        self._server.serve(CACHED_PREFIXES, self._cached_prefixes)
        self._server.serve_stream(GENERATE, self._generate)
        self._server.serve_notification(END_CHOICE, self._end_choice)
        if self.config.role != "hybrid":  # P and D serve the same methods; the role says which ones are called
            await asyncio.to_thread(self.config.kv_transfer.check_host)
            self._server.serve_stream(PREFILL, self._prefill)
            self._server.serve_notification(GRANT, self._grant)
            self._server.serve(CONNECT, self._connect)
            self._server.serve_stream(DECODE, self._decode)
            self._server.serve(INSTANCE_FLIP, self._flip)
        await self._server.start()
        if self.health is not None:
            await self.health.start()
        self.loop_lag.start()
        self._loading = asyncio.create_task(self._load())

    async def wait_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            InstanceFailed: the model cannot be loaded; the message says why.
        """
        assert self._loading is not None, "start() comes first"
        await asyncio.shield(self._loading)
        if self.status != "ready":
            raise InstanceFailed(self.error or f"{self.config.instance_id} is {self.status}")

    async def wait_failed(self) -> str:
        """Wait until the instance cannot serve any more, and return why. It still answers DESCRIBE, until `stop`."""
        await self._has_failed.wait()
        return self.error

    async def stop(self) -> None:
        """End every request, give back every block, and leave no thread, socket or task behind. May be called twice."""
        self.status = "draining"
        self.loop_lag.stop()
        await self._server.stop()
        if self.health is not None:
            await self.health.stop()
        if ends := list(self._ends):
            await asyncio.wait(ends, timeout=END_TIMEOUT_S)
        if self.engine is None:  # otherwise its commands are needed until requests have ended
            await self._thread.stop()
        if self._loading is not None:
            await self._loading
        if self.transfers is not None:
            await self.transfers.close()
        for task in ends:
            task.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        await self._thread.stop()
        if self.runner is not None:
            await asyncio.to_thread(self.runner.close)

    def _make_engine(self) -> Engine:
        self.runner = make_runner(self.config, on_failure=self._thread.fail)
        engine = Engine(self.config, self.runner)
        engine.grammars.load()
        return engine

    async def _load(self) -> None:
        try:
            engine = await self._thread.start()
            if self.config.role != "hybrid":
                assert self.runner is not None
                transfers = InstanceTransfers(self.config, self.runner, self.epoch, self._thread.fail)
                await transfers.start()
                self.transfers = transfers
        except Exception as error:  # DESCRIBE reports it, whatever is wrong with the model or the machine
            self._fail(error)
            return
        self.engine = engine
        if self.status == "starting":
            self._before_ready()
            self.status = "ready"
            self.reports.tell()
            logger.info("%s: ready on %s", self.config.instance_id, self.address)

    def _fail(self, error: Exception) -> None:
        if self.status == "draining":
            return
        self.status, self.error = "failed", with_file_limit(f"{type(error).__name__}: {error}")
        logger.error("%s: %s", self.config.instance_id, self.error)
        for inbox in self._inboxes.values():
            inbox.put_nowait(EngineFailed(f"{self.config.instance_id} failed: {self.error}"))
        if self.transfers is not None:
            self.transfers.lose_ranks()
        self.reports.tell()
        self._has_failed.set()

    def _deliver(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if inbox := self._inboxes.get(event.request_id):
                inbox.put_nowait(event)

    # ---- one request ---------------------------------------------------------------------------------------------

    def _require_ready(self) -> None:
        if self.status == "failed":
            raise RemoteError(f"{self.config.instance_id} failed: {self.error}")
        if self.status != "ready":
            raise Overloaded(f"{self.config.instance_id} is not ready, it is {self.status}")

    def _require_room_for(self, num_tokens: int) -> None:
        """Raise Overloaded if the pool cannot hold this prompt as well.

        Several schedulers may choose this instance by a report that is a second old. The prompt would then wait here
        while another instance may have nothing to do.
        """
        self._require_ready()
        assert self.engine is not None, "it is ready"
        most = self.engine.blocks.num_blocks * self.config.block_size
        if (given := self.reports.num_tokens) and given + num_tokens > most:
            has = f"{self.config.instance_id} has prompts of {given} tokens, and takes {most} at a time"
            raise Overloaded(f"{has}; this one is {num_tokens}")

    def _open(self, request: GenerateRequest | PrefillRequest | DecodeRequest) -> Inbox:
        self._require_ready()
        if request.request_id in self._inboxes:
            raise InvalidRequest(f"request_id={request.request_id!r} is in use")
        logger.debug("%s: %s, trace %s", request.request_id, type(request).__name__, TRACEPARENT.get() or "none")
        self.reports.begin(request)
        return self._inboxes.setdefault(request.request_id, Inbox(request.left_s))

    def _clean_up(self, job: Coroutine[Any, Any, None]) -> None:
        """Run the end of a request in a task of its own: the handler's task may be cancelled, even more than once."""
        task = asyncio.create_task(job)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _last_call(self, command: Callable[[Engine], None]) -> None:
        """Call the engine to end something. Do nothing if the engine has ended, because then that has ended too."""
        try:
            await self._thread.call(command)
        except EngineStopped as error:
            logger.debug("%s", error)

    async def _close(self, request_id: str) -> None:
        """Give back the blocks of a request, which no transfer touches any more, and then free its id."""
        try:
            await self._last_call(lambda engine: engine.release(request_id))
        finally:
            # The id is freed last: what a step in flight still reports must not reach a later request with this id.
            if inbox := self._inboxes.pop(request_id, None):
                inbox.close()
            self.reports.end(request_id)

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        inbox = self._open(request)
        try:
            await self._begin(request)
            async for event in inbox.token_events(request.params.n):
                yield event
        finally:
            self._clean_up(self._close(request.request_id))

    async def _begin(self, request: GenerateRequest | PrefillRequest | DecodeRequest) -> None:
        """Pass a request to the engine after its grammar, if it has one, has been compiled."""
        given = request.request_id, request.prompt_token_ids, request.params, request.output_token_ids
        assert self.engine is not None, "a ready instance has it"
        matcher = await self.engine.grammars.matcher_in_loop(*given[2:]) if request.params.structured_outputs else None
        if isinstance(request, DecodeRequest):
            await self._thread.call(lambda engine: engine.reserve(*given, matcher=matcher))
        else:
            is_sent = isinstance(request, PrefillRequest)
            await self._thread.call(lambda engine: engine.add(*given, prefill_only=is_sent, matcher=matcher))

    async def _end_choice(self, request: EndChoice) -> None:
        await self._last_call(lambda engine: engine.release_choice(request.request_id, request.choice))

    async def _prefill(self, request: PrefillRequest) -> AsyncIterator[TokenEvent | TransferDone]:
        if request.grant_follows:  # no decode instance yet keeps blocks for it that others wait for
            self._require_room_for(len(request.prompt_token_ids) + len(request.output_token_ids))
        inbox = self._open(request)
        sending = PrefillSend(self._require_transfers().open_send, request, self.config.block_size, inbox)
        try:
            await self._begin(request)
            outputs = await sending.follow()
            grant_is_late = not sending.is_granted and any(each.finish_reason is None for each in outputs)
            if grant_is_late and not await sending.wait_for_grant(GRANT_PATIENCE_S):
                # Nobody has the token yet. The prefix cache keeps all blocks but the last one, as far as it can.
                await self._thread.call(lambda engine: engine.release(request.request_id))
                await sending.wait_for_grant(None)
                await self._begin(request)
                outputs = await sending.follow()
            first = [event_of([output]) for output in outputs]
            # If the grant is late, the client waits before its first token, not between the first and the second.
            if not grant_is_late:
                for event in first:
                    yield event
            done = await sending.finish(outputs)
            if grant_is_late:
                for event in first:
                    yield event
            if done is not None:
                yield done
        finally:
            self._clean_up(self._end_prefill(request.request_id, sending))

    def _grant(self, request: GrantRequest) -> None:
        if inbox := self._inboxes.get(request.request_id):
            inbox.put_nowait(request)

    async def _end_prefill(self, request_id: str, sending: PrefillSend) -> None:
        await self._last_call(lambda engine: engine.hold(request_id))
        if await sending.abort("the request has ended") is Outcome.UNKNOWN:
            logger.warning("%s: a failed transfer may still read its blocks; they stay out of use", request_id)
            await self._last_call(lambda engine: engine.quarantine(request_id, sending.num_blocks))
            await sending.drained()
        await self._close(request_id)
        await sending.close()

    async def _decode(self, request: DecodeRequest) -> AsyncIterator[Granted | TokenEvent]:
        inbox = self._open(request)
        posted: PostedReceive | JointReceive | None = None
        num_blocks = 0
        try:
            await self._begin(request)
            reservation = await inbox.next()
            num_blocks = len(reservation.block_ids)
            receive = request.transfer_id, reservation.block_ids, request.prefill_instance
            with as_rpc_error():
                posted = await self._require_transfers().post_receive(*receive)
            yield Granted(posted.grant, reservation.num_cached_tokens)
            assert self.runner is not None, "a ready instance has it"
            handover, is_trusted = await wait_for_kv(posted, inbox, request, self.runner.model_config.vocab_size)
            if not handover.has_more:
                for event in handover.events(len(request.output_token_ids)):
                    yield event
                return
            first = handover.tokens_to_go_on
            await self._thread.call(lambda engine: engine.activate(request.request_id, *first, is_trusted=is_trusted))
            async for event in inbox.token_events(len(first) - first.count(None)):
                yield event
        finally:
            self._clean_up(self._end_decode(request.request_id, posted, num_blocks))

    async def _end_decode(self, request_id: str, posted: PostedReceive | JointReceive | None, num_blocks: int) -> None:
        if posted is not None and await posted.cancel("the request has ended") is Outcome.UNKNOWN:
            logger.warning("%s: a failed transfer may still write to its blocks; they stay out of use", request_id)
            await self._last_call(lambda engine: engine.quarantine(request_id, num_blocks))
            await posted.drained()
        await self._close(request_id)

    async def _cached_prefixes(self, request: CachedPrefixesRequest) -> CachedPrefixes:
        self._require_ready()
        return await self._thread.call(lambda engine: CachedPrefixes(*engine.blocks.cached_digests(request.known)))

    async def _connect(self, request: ConnectRequest) -> Empty:
        """Connect to a receiver. Readiness does not depend on peers: a link concerns only the two that it connects."""
        self._require_ready()
        with as_rpc_error():
            await self._require_transfers().open_link(request.kv_endpoint)
        return Empty()

    async def _flip(self, request: FlipRequest) -> InstanceInfo:
        """Take on the other role, in a new epoch: what others know of this life is useless in the next."""
        self._require_ready()
        name, role = self.config.instance_id, request.role
        if role != self.config.role:
            if (count := self.num_active) > 0:
                raise Overloaded(f"{name} has {count} requests; it can become a {role} instance when it has none")
            self.config, self.epoch = msgspec.structs.replace(self.config, role=role), uuid.uuid4().hex
            self.reports.tell()
            logger.info("%s: is a %s instance now", name, role)
        return await self.reports.describe(Empty())

    def _require_transfers(self) -> InstanceTransfers:
        assert self.transfers is not None, "a ready prefill or decode instance has them"
        return self.transfers

    async def _metrics(self) -> Iterable[Family]:
        return instance_metrics([await self.reports.stats(Empty())])
