"""A DisaggregatedLLM in a thread of its own, for LLM, which is synchronous."""

import asyncio
import queue
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hbserve.llm import Progress, within_model_len
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.pd_disagg.disaggregated_llm import DisaggregatedLLM
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import GenerateRequest, RequestFinished

T = TypeVar("T")


class DisaggregatedBackend:
    """Passes requests to the event loop, and brings back what happened there."""

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        self._llm = DisaggregatedLLM(PdDisaggConfig(model, **within_model_len(model, settings)))
        self._news: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hbserve-llm", daemon=True)
        self._thread.start()
        try:
            self._run(self._llm.start())
        except BaseException:
            self._end_thread()
            raise

    def _run(self, job: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(job, self._loop).result()

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        self._run(self._submit(request_id, token_ids, params))

    async def _submit(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        events = self._llm.scheduler.submit(GenerateRequest(request_id, token_ids, params))
        self._tasks[request_id] = asyncio.create_task(self._follow(request_id, events))

    async def _follow(self, request_id: str, events: Any) -> None:
        try:
            async for event in events:
                if isinstance(event, RequestFinished):
                    self._news.put(Progress(request_id, [], event.finish_reason))
                else:
                    self._news.put(Progress(request_id, event.token_ids, None))
        except Exception as error:  # belongs to whoever calls `step`
            self._news.put(Progress(request_id, [], None, error))
        finally:
            await events.aclose()
            self._tasks.pop(request_id, None)

    def step(self) -> tuple[list[Progress], int]:
        """Wait for one request's news. Prompt tokens are computed elsewhere, and not counted."""
        if not self._tasks and self._news.empty():
            raise InvalidRequest("step: there is no request; add_request() first")
        return [self._news.get()], 0

    def end(self, request_id: str) -> None:
        self._run(self._llm.scheduler.abort(request_id, "stop"))

    def close(self) -> None:
        self._run(self._llm.stop())
        self._end_thread()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
