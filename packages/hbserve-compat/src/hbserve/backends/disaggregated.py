"""A backend of LLM, which is synchronous: a DisaggregatedLLM whose event loop runs in a thread of its own."""

import asyncio
import inspect
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hbserve.backends.backend import News, Progress, drained
from hbserve.backends.keywords import within_model_len
from hbserve.backends.own_thread import Ended, require_own_process
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.pd_disagg.disaggregated_llm import DisaggregatedLLM
from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import FinishReason, GenerateRequest, RequestFinished
from hbserve_scheduler import CpuScheduler

T = TypeVar("T")


class DisaggregatedBackend:
    """Passes requests from any thread to the event loop, and brings back their progress."""

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        self._llm = DisaggregatedLLM(PdDisaggConfig(model, **within_model_len(model, settings)))
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pid = os.getpid()
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hbserve-llm", daemon=True)
        self._thread.start()
        try:
            self._run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def _run(self, job: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop, and wait for it. Whatever interrupts the wait (Ctrl-C) cancels it."""
        try:
            require_own_process(self._pid)
            if self._loop.is_closed():
                raise Ended()
            future = asyncio.run_coroutine_threadsafe(job, self._loop)
        except BaseException:  # also a Ctrl-C
            if inspect.getcoroutinestate(job) == inspect.CORO_CREATED:
                job.close()
            raise
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        self._scheduler().check(GenerateRequest("check", tuple(token_ids), params))

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams, news: News) -> None:
        self._run(self._submit(GenerateRequest(request_id, tuple(token_ids), params), news))

    async def _submit(self, request: GenerateRequest, news: News) -> None:
        await self._scheduler().wait_for_room(request.params.priority)
        events = self._scheduler().submit(request)
        self._tasks[request.request_id] = asyncio.create_task(self._follow(request.request_id, events, news))

    async def _follow(self, request_id: str, events: Any, news: News) -> None:
        try:
            async for event in events:
                if isinstance(event, RequestFinished):
                    news.put(Progress(request_id, [], event.finish_reason, choice=event.choice))
                else:
                    more = event.logprobs, event.prompt_logprobs, event.choice
                    news.put(Progress(request_id, event.token_ids, None, None, *more))
        except Exception as error:  # is raised to the caller of `step`
            news.put(Progress(request_id, [], None, error))
        finally:
            await events.aclose()
            self._tasks.pop(request_id, None)

    def step(self, news: News) -> tuple[list[Progress], int]:
        """Wait for progress. Prompt tokens are computed in other processes, and not counted."""
        require_own_process(self._pid)
        return [news.get(), *drained(news)], 0

    def end(self, request_ids: list[str], reason: FinishReason, choice: int | None = None) -> None:
        self._run(self._abort(request_ids, reason, choice))

    async def _abort(self, request_ids: list[str], reason: FinishReason, choice: int | None) -> None:
        for request_id in request_ids:
            await self._scheduler().abort(request_id, reason, choice)

    def _scheduler(self) -> CpuScheduler:
        try:
            return self._llm.scheduler
        except RuntimeError:  # `close` is under way
            raise Ended() from None

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        if threading.current_thread() is self._thread:  # it collected this as garbage, and cannot wait for itself
            threading.Thread(target=self.close, name="hbserve-llm-end").start()
            return
        with self._closing:
            if self._loop.is_closed():
                return
            try:
                self._run(self._stop())
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    async def _stop(self) -> None:
        try:
            await self._llm.stop()
        finally:
            # So that every waiting caller hears that its request has ended.
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
