"""CpuScheduler: takes requests, chooses instances for them, and follows each request to its end."""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection
from functools import partial

from hbserve_rpc import HBServeRpcError, InvalidRequest, Keys, Overloaded, RequestTimeout, RpcClient, Unavailable
from hbserve_rpc.messages import FinishReason, GenerateRequest, Role, SchedulerStats, ServiceInfo
from hbserve_rpc.plain_values import plain_id
from hbserve_rpc.records import RequestRecord
from hbserve_rpc.trace_context import TRACEPARENT
from hbserve_scheduler.admission import Admission, WaitingRequests, admitted
from hbserve_scheduler.attempt import Attempt
from hbserve_scheduler.config import SchedulerConfig
from hbserve_scheduler.errors import RequestFailed
from hbserve_scheduler.event_stream import EventStream, TurnEnd
from hbserve_scheduler.figures import Figures
from hbserve_scheduler.fleet import Fleet
from hbserve_scheduler.instance_client import ClientFactory
from hbserve_scheduler.instances import Placement
from hbserve_scheduler.request import ScheduledRequest
from hbserve_scheduler.retries import Retries, require_another_attempt

logger = logging.getLogger(__name__)

TICK_S = 0.5


class CpuScheduler:
    """Scheduler that takes requests, finds instances for each, and follows it to its end, over several attempts if need
    be. It lives in the event loop that ran `start` and uses its clock; it needs no thread, no torch and no tokenizer.

    To schedule differently, override `_schedule_waiting_requests`. Its tools are `waiting_requests`, `has_room()` and
    `start_request(entry)`.
    """

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        model_path: str = "",
        client_factory: ClientFactory = RpcClient,
    ) -> None:
        """Make a scheduler without instances. client_factory: makes the connection to each; a simulator has its own."""
        self.config = config or SchedulerConfig()
        self.model_path = model_path
        """Path or name of the model that `info` reports to clients."""
        self.keys: Keys | None = None
        """Keys for connecting to instances."""
        self.waiting_requests = WaitingRequests()
        self.running_requests: dict[str, ScheduledRequest] = {}
        self._changed = asyncio.Event()
        self._admission = Admission(self.config, self.waiting_requests)
        self.fleet = Fleet(self.config, self._may_have_room, client_factory)
        self.retries = Retries(self.fleet, self._changed.set)
        self._scheduling: asyncio.Task[None] | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._missing_since_s: float | None = None
        self._stopped = False
        self._turn_end = TurnEnd()
        self.figures = Figures(self.fleet.handles)

    # ---- instances -----------------------------------------------------------------------------------------------

    def use_keys(self, keys: Keys | None) -> None:
        """Set a scheduler's keys, for instances that are added from now on."""
        self.keys = keys
        self.fleet.client_factory = partial(RpcClient, keys=keys)

    async def add_instance(self, instance_id: str, role: Role, address: str) -> None:
        """Connect to an instance at `host:port`. It need not be there yet."""
        await self.fleet.add(instance_id, role, address)

    async def remove_instance(self, instance_id: str) -> None:
        """Stop using an instance. Its requests get another attempt elsewhere."""
        await self.fleet.remove(instance_id)

    async def instance_died(self, instance_id: str, why: str) -> None:
        """Report that an instance's process is known to have ended, so that nobody waits for its heartbeats to fail."""
        await self.fleet.handles[instance_id].drop(why)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every instance is ready.

        Raises:
            InstanceFailed: an instance reports that it cannot run. Raised at once, with its reason.
            NotReady: some are not ready in time; names them.
        """
        await self.fleet.wait_ready(timeout_s)

    async def start(self) -> None:
        await self.fleet.start()
        self.figures.loop_lag.start()
        self._tick()
        self._scheduling = asyncio.create_task(self._schedule())

    async def stop(self) -> None:
        """End every request, and leave no task or socket behind. Requests without all their tokens count as aborted."""
        self._stopped = True
        self.figures.loop_lag.stop()
        self._admission.wake()
        for entry in [*self.waiting_requests, *self.running_requests.values()]:
            self._end(entry, entry.finish_reason or "abort")
        tasks = [entry.task for entry in self.running_requests.values() if entry.task is not None]
        if self._ticking is not None:
            self._ticking.cancel()
        if self._scheduling is not None:
            self._scheduling.cancel()
            tasks.append(self._scheduling)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.fleet.stop()

    # ---- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> EventStream:
        """Take a request, and return the stream of its events. The request is copied, so the caller may change it.

        Raises, at once:
            InvalidRequest: the request can never run; says why.
            Overloaded: the queue is full; has the time after which it may have room.
            Unavailable: the scheduler has been stopped.
        """
        # This comes first, because an overloaded scheduler must not spend time on checking more requests.
        self.require_room(getattr(request.params, "priority", 0))
        try:
            request = self.check(request)
            self._require_new(request.request_id)
        except HBServeRpcError:
            self.figures.num_rejected += 1
            raise
        self.figures.num_submitted += 1
        entry = ScheduledRequest(request, self.figures)
        entry.limit_time(self.config.request_timeout_s, self._out_of_time)
        self.waiting_requests.append(entry)
        self._changed.set()
        return EventStream(entry, self._abandon, self._turn_end)

    def require_room(self, priority: int = 0) -> None:
        """Check whether `submit` would take a request now, before any work is done for one.

        Raises:
            Overloaded: the queue is full; has the time after which it may have room. Counts as a refused request.
            Unavailable: the scheduler has been stopped.
        """
        self._require_running()
        try:
            self._admission.require_room(priority)
        except Overloaded:
            self.figures.num_rejected += 1
            raise

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request as `submit` would keep it, checked as far as possible now. Raises InvalidRequest."""
        return admitted(request, self.fleet.limiting_infos(), self.digest_block_size)

    @property
    def digest_block_size(self) -> int:
        """Tokens per block of the digests that a prompt's shape should have; 0: none, because no policy uses them."""
        return self.fleet.digest_block_size

    def _require_running(self) -> None:
        if self._stopped:
            raise Unavailable("the scheduler has been stopped")

    def _require_new(self, request_id: str) -> None:
        if self.waiting_requests.find(request_id) is not None or request_id in self.running_requests:
            raise InvalidRequest(f"request_id={request_id!r} is in use")

    async def wait_for_room(self, priority: int = 0) -> None:
        """Wait until less than half of the queue is taken. Callers with many requests do so to leave room for others.

        Raises:
            Unavailable: the scheduler has been stopped.
        """
        await self._admission.wait_until(lambda: self._stopped or not self._admission.is_half_full(priority))
        self._require_running()

    async def abort(self, request_id: str, reason: FinishReason = "abort", choice: int | None = None) -> bool:
        """End a request, or one of its choices, with `reason`. Return False if there is none, or it has ended.

        With "stop" it counts as completed: the client has found a stop string, and has everything that it wanted.
        """
        request_id = plain_id("request_id", request_id)
        entry = self.running_requests.get(request_id) or self.waiting_requests.find(request_id)
        if entry is None or entry.ended or entry.finish_reason:
            return False
        if choice is not None and entry.choices:
            if not entry.end_choice(choice, reason):
                return False
            if entry.finish_reason is None:  # other choices go on
                return True
        self._end(entry, reason)
        return True

    def _abandon(self, entry: ScheduledRequest) -> None:
        if entry.finish_reason is None:  # otherwise its instances finish by themselves
            self._end(entry, "abort")

    def _end(self, entry: ScheduledRequest, reason: FinishReason) -> None:
        """End a request before its instances do."""
        if entry.ended:
            return
        entry.finish(reason)
        self._drop(entry)

    def _drop(self, entry: ScheduledRequest) -> None:
        """Remove a request that has ended from the queue, or cancel the work that is still done for it."""
        if entry in self.waiting_requests:
            self.waiting_requests.remove(entry)
        elif entry.task is not None:
            entry.task.cancel()

    # ---- scheduling ----------------------------------------------------------------------------------------------

    async def _schedule_waiting_requests(self) -> None:
        """Start waiting requests while there is room. This is called when a request comes, at every change of a request
        or an instance while some requests wait, and every TICK_S."""
        while self.waiting_requests and self.has_room():
            self.start_request(self.waiting_requests[0])

    def has_room(self) -> bool:
        """Whether a pair of instances, or a hybrid instance, would take one more request now."""
        return self.fleet.has_room()

    def start_request(self, entry: ScheduledRequest) -> None:
        """Take a request out of `waiting_requests` and follow it to its end. Call it only if `has_room()`."""
        placement = self.fleet.place_request(entry)
        if placement is None:
            raise Overloaded("start_request: there is no room; ask has_room() first")
        self.waiting_requests.remove(entry)
        self._admission.begun(entry)
        self.running_requests[entry.request.request_id] = entry
        entry.task = asyncio.create_task(self._follow(entry, placement))
        # A task that is cancelled before its first step runs none of its `finally` blocks.
        entry.task.add_done_callback(lambda _: self._give_back(entry, placement))

    def _give_back(self, entry: ScheduledRequest, placement: Placement) -> None:
        placement.end()
        if self.running_requests.get(entry.request.request_id) is entry:
            del self.running_requests[entry.request.request_id]
        self._may_have_room()

    def _may_have_room(self) -> None:
        """Wake the scheduling task if something waits; called when a request or an instance has changed. It is cheap if
        nothing waits, because it is called five times per request."""
        if self.waiting_requests.by_id or self.retries.waiting:
            self._changed.set()

    def _tick(self) -> None:
        """Wake the scheduling task regularly, for changes that depend on time alone."""
        self._changed.set()
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.retries.waiting:
                self.retries.place()
            try:
                await self._schedule_waiting_requests()
            except Exception:  # a bug in an override: requests must not wait for ever because of it
                logger.exception("_schedule_waiting_requests failed; scheduling first come, first served instead")
                await CpuScheduler._schedule_waiting_requests(self)
            self._fail_hopeless()
            self._admission.update(loop.time(), is_served=self.fleet.may_serve())

    def _out_of_time(self, entry: ScheduledRequest) -> None:
        if entry.finish_reason is not None:  # it has all its tokens; only its instances are not done
            self._end(entry, entry.finish_reason)
            return
        state = "started" if entry in self.waiting_requests else "finished"
        entry.fail(RequestTimeout(f"not {state} within {entry.time_limit}"))
        self._drop(entry)

    def _fail_hopeless(self) -> None:
        """Fail requests that wait, new ones and those between attempts, when instances that they need have been missing
        for too long."""
        now_s = asyncio.get_running_loop().time()
        if not (self.waiting_requests or self.retries.waiting) or self.fleet.may_serve(soon=True):
            self._missing_since_s = None
        elif self._missing_since_s is None:
            self._missing_since_s = now_s
        elif now_s - self._missing_since_s > self.config.instance_wait_s:
            why = self.fleet.why_nobody()
            for entry in list(self.waiting_requests):
                self.waiting_requests.remove(entry)
                entry.fail(Unavailable(why))
            self.retries.give_up(Unavailable(why))

    async def _follow(self, entry: ScheduledRequest, placement: Placement) -> None:
        TRACEPARENT.set(entry.traceparent)  # for this task
        try:
            await self._attempts(entry, placement)
        except HBServeRpcError as error:
            entry.fail(error)
        except Exception as error:  # a bug of this package: the client must be told nevertheless
            logger.exception("request %s failed", entry.request.request_id)
            entry.fail(RequestFailed(f"internal error: {error!r}"))
        else:
            assert entry.finish_reason is not None, "an attempt ended without error, but the request did not end"
            self._end(entry, entry.finish_reason)
        finally:
            self._give_back(entry, placement)

    async def _attempts(self, entry: ScheduledRequest, placement: Placement, before: Collection[str] = ()) -> None:
        """Make attempts until one succeeds or no more may be made. before: descriptions of earlier failures."""
        problems = list(before)
        while True:
            try:
                await Attempt(entry, placement).run()
                return
            except HBServeRpcError as error:
                if entry.finish_reason:  # all tokens are delivered; a failure afterwards changes nothing
                    return
                require_another_attempt(entry, error, problems, self.config.max_attempts)
            finally:
                placement.end()
            if entry.has_parted:
                await self._choices_apart(entry, problems)
                return
            placement = await self._next_placement(entry, problems)

    async def _next_placement(self, entry: ScheduledRequest, problems: Collection[str]) -> Placement:
        try:
            return await self.retries.wait_for_place(entry)
        except Unavailable as error:
            raise Unavailable("; ".join([*problems, str(error)])) from None

    async def _choices_apart(self, entry: ScheduledRequest, problems: Collection[str]) -> None:
        """Make further attempts at each unfinished choice, from where it was. If one fails, the request fails."""
        moved = entry.kv_bytes, entry.kv_transfer_time_s

        async def follow(choice: ScheduledRequest) -> None:
            self.figures.num_retries += 1
            try:
                await self._attempts(choice, await self._next_placement(choice, problems), problems)
            finally:
                entry.gather(choice, *moved)
            assert choice.finish_reason is not None, "an attempt ended without error, but the choice did not end"
            entry.finish_choice(choice, choice.finish_reason)

        try:
            async with asyncio.TaskGroup() as group:
                for choice in entry.choices:
                    if choice.finish_reason is None:
                        entry.hand_down(choice)
                        choice.task = group.create_task(follow(choice))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    # ---- figures -------------------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        for entry in self.running_requests.values():
            entry.count()
        for each in self.figures.links.values():
            each.is_up = None
        for prefill, decode, is_up in self.fleet.linked():
            self.figures.link(prefill.instance_id, decode.instance_id).is_up = is_up
        return SchedulerStats(
            **self.figures.snapshot(),
            waiting_requests=len(self.waiting_requests),
            waiting_tokens=self.waiting_requests.num_tokens,
            # A request that has ended may still have to be cancelled on its instances.
            running_requests=sum(not each.ended for each in self.running_requests.values()),
            instances=[handle.stats for handle in self.fleet.handles.values()],
        )

    def active_requests(self) -> Counter[str]:
        """Count this scheduler's requests on each instance now; the instances' own figures are one report old."""
        running = [each for each in self.running_requests.values() if not each.ended]
        return Counter(name for each in running for name in each.busy_instances)

    def records(self, last_s: float, request_id: str = "") -> list[RequestRecord]:
        """Return records of requests that ended in the last `last_s` seconds, or only that of `request_id`."""
        return [each for each in self.figures.lately(last_s) if request_id in ("", each.request_id)]

    async def refresh(self) -> None:
        """Ask every instance for its stats now; otherwise `stats` is up to one heartbeat old."""
        await self.fleet.refresh()

    def may_serve(self) -> bool:
        """Whether the instances that answer requests now are enough to serve."""
        return self.fleet.may_serve()

    def info(self) -> ServiceInfo:
        infos = [handle.info for handle in self.fleet.handles.values() if handle.info is not None]
        lengths = [info.max_model_len for info in infos if info.max_model_len]
        ready = bool(self.fleet.handles) and all(handle.status == "ready" for handle in self.fleet.handles.values())
        return ServiceInfo(ready, self.model_path, min(lengths, default=0), infos, self.digest_block_size)
