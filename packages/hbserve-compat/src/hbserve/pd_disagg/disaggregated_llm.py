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
"""Until every instance has loaded its model."""


def level_of_application() -> str:
    """Name of the level that it has set for this package: the next one below, if it is none of the usual."""
    level = logging.getLogger("hbserve").getEffectiveLevel()
    known = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
    return next((name for name in known if logging.getLevelNamesMapping()[name] <= level), "DEBUG")


class DisaggregatedLLM:
    """Belongs to the event loop that ran `start`; in another one its methods raise RuntimeError, `stop` excepted.

    Also an asynchronous context manager, which starts and stops it. One that nobody refers to any more is ended as by
    `stop`: by its event loop if that runs, else at once. A call that has not returned refers to it, and what `stream`
    returned does until it ends or is dropped itself; `scheduler` does not.

    `scheduler` is CpuScheduler, or a subclass of it that schedules differently. `log_level` is that of the instances;
    None: the application's. What they log goes through the application's logging, with their name.
    """

    def __init__(
        self, config: PdDisaggConfig, scheduler: type[CpuScheduler] = CpuScheduler, *, log_level: str | None = None
    ) -> None:
        self.config = config
        self.tokenizer: Any = None
        """A transformers tokenizer, from `start` on. For callers: what they switch on there reaches no prompt. None if
        the model's folder has none: then it serves token ids, and every text is ""."""
        self._tokenizer: Any = None
        self._scheduler_class = scheduler
        self._log_level = log_level or level_of_application()
        self._scheduler: CpuScheduler | None = None
        self._instances: LocalInstances | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """From `start` to the end of `stop`."""
        self._pid = 0
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._if_dropped: weakref.finalize[Any, Any] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def start(self, try_tokenizer: Callable[[Any], object] | None = None) -> None:
        """Start everything, and wait until it is ready. If that fails, all that was started is stopped again.

        `try_tokenizer` is called with the tokenizer once it is read, in a thread, while instances start: what it raises
        ends the start at once, and is raised here.

        Raises:
            ConfigError: a field of the configuration cannot be.
            BrokenTokenizer: (a ValueError) the model's tokenizer cannot be read.
            FileNotFoundError: there is no such model folder.
            NotEnoughMemory: (a MemoryError) this host has none for the weights.
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
        # Nobody but this object asks the scheduler: it does not listen.
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
        # At the interpreter's end each process has a finalizer of its own.
        self._if_dropped.atexit = False
        try:
            # A group: when one of the two fails, the other is ended before anything is stopped.
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
        """What `start` waits for: each process that starts, or each instance that is not ready, with its reason."""
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
        """End every request as aborted, and every process.

        May be called twice, at once too, during `start` and after one that failed, and from any event loop or thread;
        it returns when all has ended. Whoever is cancelled here has it go on.
        """
        if self._loop is None or self._pid != os.getpid():  # what a process has started, no fork of it ends
            return
        if self._loop is asyncio.get_running_loop():
            if self._stopping is None:
                self._stopping = asyncio.create_task(self._stop())
                self._stopping.add_done_callback(self._kill_if_cancelled)
            await asyncio.shield(self._stopping)
        elif self._loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.stop(), self._loop))
        else:  # its tasks, and the sockets that they read, are no more
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
        """Answers in the order of the prompts; each prompt is a string or a list of token ids.

        There may be more of them than the queue holds. Whatever it raises, nothing of this call goes on.

        Raises:
            InvalidRequest: (a ValueError) one of the prompts or parameters can never run, or a wrong number of
                parameters. Names the prompt. None of this call's prompts is computed then.
            LogitsNotFinite: (a FloatingPointError) the model gives NaN or infinity for one of them. Names the prompt.
            RequestFailed: every attempt at one of them failed.
            Unavailable: there was no instance for one of them in `instance_wait_s`.
            RequestTimeout: one of them took longer than `request_timeout_s`. In all these cases the others of this call
                are aborted.
            RuntimeError: it is not running, or in another event loop.
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
        """The answer as it comes. Leaving the loop early aborts the request.

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
        """End a request by the id that was given to `stream`; it finishes with "abort". False: it has ended already."""
        return await self._require_own_loop().abort(request_id)

    # ---- figures -------------------------------------------------------------------------------------------------

    def get_system_stats(self) -> dict[str, Any]:
        """`{"cpu_scheduler": {...}, "gpu_instances": {instance_id: {...}}}`.

        What the scheduler knows is of now, and so is which instance has how many requests (`active_requests`): right
        after `generate` none has any of it. All else of instances is as of their last heartbeat.
        """
        stats, active = self._stats(), self.scheduler.active_requests()
        for instance_id, each in stats["gpu_instances"].items():
            each["active_requests"] = active[instance_id]
            for within in ("running_requests", "waiting_requests"):
                each[within] = min(each[within], active[instance_id])
        return stats

    async def refresh_system_stats(self) -> dict[str, Any]:
        """The same as every instance says it when it is asked now. One may be busy for a moment longer than its
        requests, whose ends it has told."""
        await self._require_own_loop().refresh()
        return self._stats()

    def _stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = msgspec.to_builtins(self.scheduler.stats())
        instances = {each["instance_id"]: each for each in stats.pop("instances")}
        return {"cpu_scheduler": stats, "gpu_instances": instances}

    @property
    def scheduler(self) -> CpuScheduler:
        """Raises RuntimeError unless it is running."""
        if self._scheduler is None:
            raise RuntimeError("DisaggregatedLLM is not running: call start() first")
        return self._scheduler

    def _require_own_loop(self) -> CpuScheduler:
        """Raises RuntimeError unless it is running, in this event loop: in another one nothing would ever come."""
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
