"""CpuScheduler: takes requests in, chooses instances, and follows every request to its end."""

import asyncio
import contextlib
import logging
import time
from collections import deque

from hbserve_rpc import HBServeRpcError, InvalidRequest, Overloaded
from hbserve_rpc.messages import FinishReason, GenerateRequest, Role, SchedulerStats, ServiceInfo
from hbserve_scheduler.attempt import Attempt
from hbserve_scheduler.config import SchedulerConfig
from hbserve_scheduler.errors import RequestFailed
from hbserve_scheduler.fleet import Fleet
from hbserve_scheduler.placement import Placement
from hbserve_scheduler.request import EventStream, ScheduledRequest

logger = logging.getLogger(__name__)

TICK_S = 0.5


class CpuScheduler:
    """Lives in the event loop that ran `start`; no thread, no torch, no tokenizer.

    To schedule differently, override `_schedule_waiting_requests`. Its tools are `waiting_requests`, `has_room()` and
    `start_request(entry)`.
    """

    def __init__(self, config: SchedulerConfig | None = None, *, model_path: str = "") -> None:
        self.config = config or SchedulerConfig()
        self.model_path = model_path
        """What `info` tells clients."""
        self.waiting_requests: deque[ScheduledRequest] = deque()
        self.running_requests: dict[str, ScheduledRequest] = {}
        self._changed = asyncio.Event()
        self.fleet = Fleet(self.config, self._changed.set)
        self._scheduling: asyncio.Task[None] | None = None
        self._missing_since_s: float | None = None
        self._totals = {"total": 0, "completed": 0, "failed": 0, "aborted": 0, "rejected": 0, "retries": 0}

    # ---- instances -----------------------------------------------------------------------------------------------

    async def add_instance(self, instance_id: str, role: Role, address: str) -> None:
        """Dial an instance at `host:port`. It need not be there yet."""
        await self.fleet.add(instance_id, role, address)

    async def remove_instance(self, instance_id: str) -> None:
        """Use it no more. Its requests get another attempt elsewhere."""
        await self.fleet.remove(instance_id)

    async def instance_died(self, instance_id: str, why: str) -> None:
        """Somebody knows that its process has ended: do not wait for its heartbeats to fail."""
        await self.fleet.handles[instance_id].drop(why)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every instance is ready.

        Raises:
            InstanceFailed: one says that it cannot run; at once, with its reason.
            NotReady: not in time; names those that are missing.
        """
        await self.fleet.wait_ready(timeout_s)

    async def start(self) -> None:
        await self.fleet.start()
        self._scheduling = asyncio.create_task(self._schedule())

    async def stop(self) -> None:
        """End every request as aborted, and leave no task or socket behind."""
        for entry in [*self.waiting_requests, *self.running_requests.values()]:
            self._abandon(entry)
        tasks = [entry.task for entry in self.running_requests.values() if entry.task is not None]
        if self._scheduling is not None:
            self._scheduling.cancel()
            tasks.append(self._scheduling)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.fleet.stop()

    # ---- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> EventStream:
        """Take a request in.

        Raises, at once:
            InvalidRequest: it can never run; says why.
            Overloaded: the queue is full.
        """
        try:
            self._check(request)
        except HBServeRpcError:
            self._totals["rejected"] += 1
            raise
        self._totals["total"] += 1
        entry = ScheduledRequest(request)
        self.waiting_requests.append(entry)
        self._changed.set()
        return EventStream(entry, self._abandon)

    def _check(self, request: GenerateRequest) -> None:
        request.params.validate()
        known = {entry.request.request_id for entry in self.waiting_requests} | self.running_requests.keys()
        if request.request_id in known:
            raise InvalidRequest(f"request_id={request.request_id!r} is in use")
        if not request.prompt_token_ids:
            raise InvalidRequest("prompt: expected at least one token")
        length = len(request.prompt_token_ids) + len(request.output_token_ids)
        infos = [handle.info for handle in self.fleet.handles.values() if handle.status == "ready" and handle.info]
        if infos and length > (longest := min(info.max_prompt_len for info in infos)):
            raise InvalidRequest(f"prompt: {length} tokens; the instances take at most {longest}")
        if infos and max(request.prompt_token_ids) >= (size := min(info.vocab_size for info in infos)):
            raise InvalidRequest(f"prompt: token {max(request.prompt_token_ids)} is outside the vocabulary [0, {size})")
        if min(request.prompt_token_ids) < 0:
            raise InvalidRequest(f"prompt: token {min(request.prompt_token_ids)} is negative")
        if len(self.waiting_requests) >= self.config.max_queue_size:
            raise Overloaded(f"{len(self.waiting_requests)} requests are waiting, which is scheduler.max_queue_size")

    async def abort(self, request_id: str, reason: FinishReason = "abort") -> bool:
        """End a request now; its stream ends with `reason`. False: no such request, or it has ended.

        With "stop" it counts as completed: the client has found a stop string, and has all that it wanted.
        """
        waiting = (entry for entry in self.waiting_requests if entry.request.request_id == request_id)
        entry = self.running_requests.get(request_id) or next(waiting, None)
        if entry is None or entry.finish_reason:
            return False
        self._abandon(entry, reason)
        return True

    def _abandon(self, entry: ScheduledRequest, reason: FinishReason = "abort") -> None:
        if entry.finish_reason:
            return
        self._totals["aborted" if reason == "abort" else "completed"] += 1
        entry.finish(reason)
        if entry in self.waiting_requests:
            self.waiting_requests.remove(entry)
        elif entry.task is not None:
            entry.task.cancel()

    # ---- scheduling ----------------------------------------------------------------------------------------------

    async def _schedule_waiting_requests(self) -> None:
        """Start waiting requests, as far as there is room. Called whenever a request or an instance has changed."""
        while self.waiting_requests and self.has_room():
            self.start_request(self.waiting_requests[0])

    def has_room(self) -> bool:
        """Whether some pair, or some hybrid instance, would take one more request now."""
        return self.fleet.has_room()

    def start_request(self, entry: ScheduledRequest) -> None:
        """Take one request out of `waiting_requests` and follow it to its end. Needs `has_room()`."""
        placement = self.fleet.place(entry.num_tokens)
        if placement is None:
            raise Overloaded("start_request: there is no room; ask has_room() first")
        self.waiting_requests.remove(entry)
        entry.started_s = time.monotonic()
        self.running_requests[entry.request.request_id] = entry
        entry.task = asyncio.create_task(self._follow(entry, placement))

    async def _schedule(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self._schedule_waiting_requests()
            except Exception:  # an override's: the requests must not wait for ever because of it
                logger.exception("_schedule_waiting_requests failed")
            self._fail_hopeless()

    def _fail_hopeless(self) -> None:
        """Fail what waits when no instance that it needs has been there for too long."""
        now_s = time.monotonic()
        if not self.waiting_requests or self.fleet.may_serve_soon():
            self._missing_since_s = None
        elif self._missing_since_s is None:
            self._missing_since_s = now_s
        elif now_s - self._missing_since_s > self.config.instance_wait_s:
            for entry in list(self.waiting_requests):
                self.waiting_requests.remove(entry)
                self._fail(entry, RequestFailed(self.fleet.why_nobody()))

    async def _follow(self, entry: ScheduledRequest, placement: Placement) -> None:
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                await self._attempts(entry, placement)
        except TimeoutError:
            self._fail(entry, RequestFailed(f"not finished within request_timeout_s={self.config.request_timeout_s}"))
        except HBServeRpcError as error:
            self._fail(entry, error)
        else:
            self._totals["completed"] += 1
            entry.finish(entry.finish_reason or "stop")
        finally:
            placement.end()
            self.running_requests.pop(entry.request.request_id, None)
            self._changed.set()

    async def _attempts(self, entry: ScheduledRequest, placement: Placement) -> None:
        problems: list[str] = []
        while True:
            entry.num_attempts += 1
            try:
                await Attempt(entry, placement).run()
                return
            except InvalidRequest:
                raise
            except HBServeRpcError as error:
                if entry.finish_reason:  # all tokens are delivered; what failed afterwards changes nothing
                    return
                problems.append(f"attempt {entry.num_attempts}: {error}")
                logger.warning("request %s: %s", entry.request.request_id, problems[-1])
                if entry.num_attempts >= self.config.max_attempts:
                    raise RequestFailed("; ".join(problems)) from error
            finally:
                placement.end()
            self._totals["retries"] += 1
            placement = await self._wait_for_place(entry, problems)

    async def _wait_for_place(self, entry: ScheduledRequest, problems: list[str]) -> Placement:
        deadline_s = time.monotonic() + self.config.instance_wait_s
        while (placement := self.fleet.place(entry.num_tokens)) is None:
            if time.monotonic() > deadline_s:
                raise RequestFailed("; ".join([*problems, self.fleet.why_nobody()]))
            await asyncio.sleep(0.05)
        return placement

    def _fail(self, entry: ScheduledRequest, error: Exception) -> None:
        self._totals["failed"] += 1
        entry.finish_reason = entry.finish_reason or "abort"
        entry.events.put_nowait(error)

    # ---- figures -------------------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        totals = self._totals
        ended = totals["completed"] + totals["failed"]
        return SchedulerStats(
            total_requests=totals["total"], completed_requests=totals["completed"], failed_requests=totals["failed"],
            aborted_requests=totals["aborted"], rejected_requests=totals["rejected"], retries=totals["retries"],
            waiting_requests=len(self.waiting_requests), running_requests=len(self.running_requests),
            success_rate=totals["completed"] / ended if ended else 1.0,
            instances=[handle.stats for handle in self.fleet.handles.values()],
        )  # fmt: skip

    async def refresh(self) -> None:
        """Ask every instance for its figures now, so that `stats` is not up to a heartbeat old."""
        await asyncio.gather(*(handle.refresh() for handle in self.fleet.handles.values()), return_exceptions=True)

    def info(self) -> ServiceInfo:
        infos = [handle.info for handle in self.fleet.handles.values() if handle.info is not None]
        lengths = [info.max_model_len for info in infos if info.max_model_len]
        ready = all(handle.status == "ready" for handle in self.fleet.handles.values())
        return ServiceInfo(ready, self.model_path, min(lengths, default=0), infos)
