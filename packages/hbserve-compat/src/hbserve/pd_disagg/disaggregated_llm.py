"""DisaggregatedLLM: a scheduler in this process, and prefill and decode instances in processes of their own."""

import asyncio
import contextlib
import copy
import logging
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from hbserve.check.network import require_places
from hbserve.models.demo_model import find_model_folder
from hbserve.models.servable import require_servable, require_settings
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.pd_disagg.ending import end_both, end_dropped, weakly
from hbserve.processes.launcher import LocalInstances, launch_keys, local_instances, tensor_parallel_sizes
from hbserve.processes.start_notice import missing, telling
from hbserve.progress import progress_bar
from hbserve.results import GenerationDelta, GenerationResult
from hbserve.text.prompts import PlainPrompt, Prompt, encode_all, read_params, read_prompt, read_prompts
from hbserve.text.text_request import TextRequest, answer_all, check_all
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import SamplingParams
from hbserve_rpc.plain_values import plain_id
from hbserve_scheduler import CpuScheduler, InstanceFailed
from hbserve_scheduler.security import require_keys

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 600.0
"""How long all instances together may take to load the model."""


def level_of_application() -> str:
    """Return the log level that the application has set for this package; for an unusual one, the next lower name."""
    level = logging.getLogger("hbserve").getEffectiveLevel()
    known = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
    return next((name for name in known if logging.getLevelNamesMapping()[name] <= level), "DEBUG")


class DisaggregatedLLM:
    """A language model whose prefill and decode run in processes of their own, with an asynchronous interface.

    It belongs to the event loop that ran `start`; in another one its methods raise RuntimeError, except `stop`. It is
    also an asynchronous context manager, which starts and stops it. When it is garbage-collected, it is ended as by
    `stop`: by its event loop if that runs, else at once. A call that has not returned keeps it alive, and so does what
    `stream` returned until that ends or is dropped itself; `scheduler` does not.

    `scheduler` is CpuScheduler, or a subclass of it that schedules differently. `log_level` is that of the instances;
    None: the application's. What they log goes through the application's logging, with their name.
    """

    def __init__(
        self, config: PdDisaggConfig, scheduler: type[CpuScheduler] = CpuScheduler, *, log_level: str | None = None
    ) -> None:
        self.config = config
        self.tokenizer: Any = None
        """The model's tokenizer (transformers), from `start` on. A copy for callers: what they change in it does not
        affect prompts. None if the model's folder has none: then it serves token ids, and every text is ""."""
        self._tokenizer: Any = None
        self._scheduler_class = scheduler
        self._log_level = log_level or level_of_application()
        self._scheduler: CpuScheduler | None = None
        self._instances: LocalInstances | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop to which this belongs, from `start` to the end of `stop`."""
        self._pid = 0
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._if_dropped: weakref.finalize[Any, Any] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def start(self, try_tokenizer: Callable[[Any], object] | None = None) -> None:
        """Start everything, and wait until it is ready. If that fails, all that was started is stopped again.

        `try_tokenizer` is called with the tokenizer when that has been read, in a thread, while instances start. What
        it raises ends the start at once, and is raised here.

        Raises:
            ConfigError: a field of the configuration has an invalid value.
            BrokenTokenizer: (a ValueError) the model's tokenizer cannot be read.
            FileNotFoundError: there is no such model folder.
            NotEnoughMemory: (a MemoryError) this host has too little memory for the weights.
            InstanceFailed: an instance cannot run; has its reason.
            NotReady: the models were not loaded in time.
        """
        if self._loop is not None:
            raise RuntimeError("DisaggregatedLLM is running already, or starting")
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        self._deaths: asyncio.Queue[str] = asyncio.Queue()
        self._starting = asyncio.create_task(self._start(try_tokenizer))
        try:
            await self._starting
        except BaseException as error:
            task = asyncio.current_task()
            await self.stop()
            if isinstance(error, asyncio.CancelledError) and task is not None and not task.cancelling():
                raise RuntimeError("DisaggregatedLLM.stop() was called while it started") from None
            raise

    async def _start(self, try_tokenizer: Callable[[Any], object] | None) -> None:
        deployment = self.config.to_deployment()
        require_keys(deployment, launched=True)
        keys = launch_keys(deployment)
        require_settings(deployment)
        folder = await find_model_folder(self.config.model_path)
        require_servable(folder, self.config, tensor_parallel_sizes(deployment), len(local_instances(deployment)))
        # Only this object sends requests to the scheduler, which therefore does not listen at its addresses.
        await asyncio.to_thread(require_places, deployment, but=["server", "scheduler", "scheduler health"])
        self._scheduler = self._scheduler_class(deployment.scheduler, model_path=str(folder))
        on_death = weakly(self._on_death)
        self._scheduler.use_keys(keys.get("scheduler"))
        self._instances = LocalInstances(
            deployment, folder, log_level=self._log_level, on_death=on_death, keys=keys.get("instance")
        )
        self._if_dropped = weakref.finalize(
            self, end_dropped, asyncio.get_running_loop(), os.getpid(), self._scheduler, self._instances
        )
        # Not needed at the interpreter's end: there, each process has a finalizer of its own.
        self._if_dropped.atexit = False
        try:
            # A group, so that when one of the two fails, the other is ended before anything is stopped.
            async with telling(self.waiting_for, logger.info), asyncio.TaskGroup() as group:
                group.create_task(self._start_instances())
                group.create_task(self._load_tokenizer(folder, try_tokenizer))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _start_instances(self) -> None:
        instances, scheduler = self._require_instances(), self.scheduler
        await instances.start()
        await scheduler.start()
        for process in instances.processes:
            await scheduler.add_instance(process.instance_id, process.role, process.address)
        ready = asyncio.create_task(scheduler.wait_ready(READY_TIMEOUT_S))
        death = asyncio.create_task(self._deaths.get())
        try:
            await asyncio.wait([ready, death], return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise InstanceFailed(death.result())
            ready.result()
            instances.restart_the_dead(weakly(self._on_given_up))
        finally:
            for task in (ready, death):
                task.cancel()
            await asyncio.gather(ready, death, return_exceptions=True)

    async def _load_tokenizer(self, folder: Path, try_it: Callable[[Any], object] | None) -> None:
        self._tokenizer = await asyncio.to_thread(load_tokenizer, folder)
        if try_it is not None:
            await asyncio.to_thread(try_it, self._tokenizer)
        self.tokenizer = copy.deepcopy(self._tokenizer)

    def waiting_for(self) -> list[str]:
        """Say what `start` waits for: each process that starts, or each instance that is not ready, with its reason."""
        return [] if self._instances is None else missing(self._instances.processes, self.scheduler)

    def _on_death(self, instance_id: str, why: str) -> None:
        logger.error("%s: %s", instance_id, why)
        self._deaths.put_nowait(f"{instance_id}: {why}")
        task = asyncio.create_task(self.scheduler.instance_died(instance_id, why))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _on_given_up(self, instance_id: str, why: str) -> None:
        logger.error("%s: %s", instance_id, why)

    async def stop(self) -> None:
        """Abort every request, and end every process. Returns when all have ended.

        May be called twice, also at the same time, during `start` and after a failed one, and from any event loop or
        thread. If the caller is cancelled, the end goes on.
        """
        if self._loop is None or self._pid != os.getpid():  # a fork does not end what its parent has started
            return
        if self._loop is asyncio.get_running_loop():
            if self._stopping is None:
                self._stopping = asyncio.create_task(self._stop())
                self._stopping.add_done_callback(self._kill_if_cancelled)
            await asyncio.shield(self._stopping)
        elif self._loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.stop(), self._loop))
        else:  # the loop has ended, and with it the tasks and sockets for an orderly end
            await asyncio.to_thread(self._kill)

    def _kill_if_cancelled(self, stopping: "asyncio.Task[None]") -> None:
        if stopping.cancelled():  # the event loop ends, maybe before the task has begun
            self._kill()

    def _kill(self) -> None:
        instances = self._instances
        self._forget_finalizer()
        self._loop = self._scheduler = self._instances = self._starting = self._stopping = None
        if instances is not None:
            instances.kill()

    async def _stop(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        scheduler, instances = self._scheduler, self._instances
        self._forget_finalizer()
        self._scheduler = self._instances = None
        try:
            await asyncio.gather(*self._background, return_exceptions=True)
            await end_both(scheduler, instances)
        finally:
            self._loop = self._starting = self._stopping = None

    def _forget_finalizer(self) -> None:
        if self._if_dropped is not None:
            self._if_dropped.detach()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # ---- requests ------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[GenerationResult]:
        """Answer prompts, each of which is a string or a list of token ids. Returns the answers in the same order.

        There may be more prompts than the queue has room for. If the call raises, nothing of it goes on.

        Raises:
            InvalidRequest: (a ValueError) a prompt or parameter can never run (the message names the prompt), or the
                number of parameters is wrong. None of this call's prompts is computed then.
            LogitsNotFinite: (a FloatingPointError) the model gives NaN or infinity for a prompt, which is named.
            RequestFailed: every attempt at a prompt failed.
            Unavailable: there was no instance for a prompt within `instance_wait_s`.
            RequestTimeout: a prompt took longer than `request_timeout_s`. In all these cases the other prompts of this
                call are aborted.
            RuntimeError: this is not running, or belongs to another event loop.
        """
        scheduler = self._require_own_loop()
        plain = read_prompts(prompts)
        params = read_params(sampling_params, len(plain))
        token_ids = await asyncio.to_thread(encode_all, self._tokenizer, plain, params)
        shapes = check_all(scheduler, token_ids, params)
        with progress_bar(len(plain), is_shown=use_tqdm) as bar:
            return await answer_all(scheduler, self._tokenizer, token_ids, params, shapes, bar.update)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[GenerationDelta, None]:
        """Yield an answer as it comes. Leaving the loop early aborts the request.

        Raises what `generate` raises, and Overloaded if the queue is full.
        """
        scheduler = self._require_own_loop()
        (params,) = read_params(sampling_params, 1)
        if request_id is not None:
            request_id = plain_id("request_id", request_id)
        return self._stream(scheduler, read_prompt(prompt), params, request_id)

    async def _stream(
        self, scheduler: CpuScheduler, prompt: PlainPrompt, params: SamplingParams, request_id: str | None
    ) -> AsyncGenerator[GenerationDelta, None]:
        (token_ids,) = await asyncio.to_thread(encode_all, self._tokenizer, [prompt], [params])
        request = TextRequest(scheduler, self._tokenizer, token_ids, params, request_id=request_id)
        async with contextlib.aclosing(aiter(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def abort(self, request_id: str) -> bool:
        """Abort a request by the id that was given to `stream`. Returns False if it has ended already."""
        return await self._require_own_loop().abort(request_id)

    # ---- figures -------------------------------------------------------------------------------------------------

    def get_system_stats(self) -> dict[str, Any]:
        """Return `{"cpu_scheduler": {...}, "gpu_instances": {instance_id: {...}}}`.

        The scheduler's figures are current, and so is each instance's `active_requests`: right after `generate`, none
        has any of that call's. All other figures of instances date from their last heartbeat.
        """
        stats, active = self._stats(), self.scheduler.active_requests()
        for instance_id, each in stats["gpu_instances"].items():
            each["active_requests"] = active[instance_id]
            for within in ("running_requests", "waiting_requests"):
                each[within] = min(each[within], active[instance_id])
        return stats

    async def refresh_system_stats(self) -> dict[str, Any]:
        """Ask every instance for its figures, and return them like `get_system_stats`. An instance may still be busy
        for a moment after it has reported the ends of its requests."""
        await self._require_own_loop().refresh()
        return self._stats()

    def _stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = msgspec.to_builtins(self.scheduler.stats())
        instances = {each["instance_id"]: each for each in stats.pop("instances")}
        return {"cpu_scheduler": stats, "gpu_instances": instances}

    @property
    def scheduler(self) -> CpuScheduler:
        """The scheduler in this process. Raises RuntimeError unless this is running."""
        if self._scheduler is None:
            raise RuntimeError("DisaggregatedLLM is not running: call start() first")
        return self._scheduler

    def _require_own_loop(self) -> CpuScheduler:
        """Return the scheduler. Raises RuntimeError unless this is running, in this event loop: a call from another one
        would wait for ever."""
        scheduler = self.scheduler
        if self._starting is not None and not self._starting.done():
            raise RuntimeError("DisaggregatedLLM is still starting: start() has not returned")
        if asyncio.get_running_loop() is not self._loop:
            state = "runs" if self._loop is not None and self._loop.is_running() else "has ended"
            raise RuntimeError(
                f"this DisaggregatedLLM belongs to the event loop that ran start(), {self._loop!r}, which {state}; "
                "call it there, or start another one in this loop"
            )
        return scheduler

    def _require_instances(self) -> LocalInstances:
        assert self._instances is not None
        return self._instances
