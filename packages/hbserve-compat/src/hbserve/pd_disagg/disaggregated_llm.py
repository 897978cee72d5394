"""DisaggregatedLLM: a scheduler in this process, and prefill and decode instances in processes of their own."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from hbserve.answers import Answer, gather_answers, is_single, one_each, submit_all
from hbserve.demo_model import find_model_folder
from hbserve.launcher import LocalInstances
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.results import GenerationDelta, GenerationResult
from hbserve.tokenizer import Prompt, load_tokenizer
from hbserve_rpc import SamplingParams
from hbserve_scheduler import CpuScheduler, InstanceFailed

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 600.0
"""Until every instance has loaded its model."""


class DisaggregatedLLM:
    """Belongs to the event loop that ran `start`. Also an asynchronous context manager, which starts and stops it.

    `scheduler` is CpuScheduler, or a subclass of it that schedules differently.
    """

    def __init__(
        self, config: PdDisaggConfig, scheduler: type[CpuScheduler] = CpuScheduler, *, log_level: str = "WARNING"
    ) -> None:
        self.config = config
        self.tokenizer: Any = None
        """A transformers tokenizer, from `start` on."""
        self._scheduler_class = scheduler
        self._log_level = log_level
        self._scheduler: CpuScheduler | None = None
        self._instances: LocalInstances | None = None
        self._deaths: asyncio.Queue[str] = asyncio.Queue()
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start everything, and wait until it is ready. If that fails, all that was started is stopped again.

        Raises:
            ConfigError: a field of the configuration cannot be.
            FileNotFoundError: there is no such model folder.
            InstanceFailed: an instance cannot run; has its reason.
            NotReady: the models were not loaded in time.
        """
        if self._scheduler is not None:
            raise RuntimeError("DisaggregatedLLM is running already")
        deployment = self.config.to_deployment()
        folder = await find_model_folder(self.config.model_path)
        self._scheduler = self._scheduler_class(deployment.scheduler, model_path=str(folder))
        self._instances = LocalInstances(deployment, folder, log_level=self._log_level, on_death=self._on_death)
        try:
            # A group: when one of the two fails, the other is ended before anything is stopped.
            async with asyncio.TaskGroup() as group:
                group.create_task(self._start_instances())
                group.create_task(self._load_tokenizer(folder))
        except BaseExceptionGroup as several:
            await self.stop()
            raise several.exceptions[0] from None
        except BaseException:
            await self.stop()
            raise

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
        finally:
            for task in (ready, death):
                task.cancel()
            await asyncio.gather(ready, death, return_exceptions=True)

    async def _load_tokenizer(self, folder: Path) -> None:
        self.tokenizer = await asyncio.to_thread(load_tokenizer, folder)

    def _on_death(self, instance_id: str, why: str) -> None:
        logger.error("%s: %s", instance_id, why)
        self._deaths.put_nowait(f"{instance_id}: {why}")
        task = asyncio.create_task(self.scheduler.instance_died(instance_id, why))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def stop(self) -> None:
        """End every request as aborted, and every process. May be called twice, and after a failed start."""
        scheduler, instances = self._scheduler, self._instances
        self._scheduler = self._instances = None
        await asyncio.gather(*self._background, return_exceptions=True)
        if scheduler is not None:
            await scheduler.stop()
        if instances is not None:
            await instances.stop()

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
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[GenerationResult]:
        """Answers in the order of the prompts; each prompt is a string or a list of token ids.

        Raises:
            InvalidRequest: (a ValueError) one of the prompts or parameters can never run, or a wrong number of
                parameters. Names the prompt. None of this call's prompts is computed then.
            Overloaded: the queue is full.
            LogitsNotFinite: (a FloatingPointError) the model gives NaN or infinity for one of them. Names the prompt.
            RequestFailed: every attempt at one of them failed. In both cases the others of this call are aborted.
        """
        every: list[Any] = [prompts] if is_single(prompts) else list(prompts)
        params = one_each(sampling_params, len(every))
        answers = await submit_all(self.scheduler, self.tokenizer, every, params)
        from tqdm import tqdm

        with tqdm(total=len(answers), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as bar:
            return await gather_answers(answers, bar.update)

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[GenerationDelta, None]:
        """The answer as it comes. Leaving the loop early aborts the request. Raises what `generate` raises."""
        scheduler = self.scheduler
        answer = Answer(scheduler, self.tokenizer, prompt, sampling_params or SamplingParams(), request_id=request_id)
        async for delta in answer:
            yield delta

    async def abort(self, request_id: str) -> bool:
        """End a request by the id that was given to `stream`; it finishes with "abort". False: it has ended already."""
        return await self.scheduler.abort(request_id)

    # ---- figures -------------------------------------------------------------------------------------------------

    def get_system_stats(self) -> dict[str, Any]:
        """`{"cpu_scheduler": {...}, "gpu_instances": {instance_id: {...}}}`; instances as of their last heartbeat."""
        stats: dict[str, Any] = msgspec.to_builtins(self.scheduler.stats())
        instances = {each["instance_id"]: each for each in stats.pop("instances")}
        return {"cpu_scheduler": stats, "gpu_instances": instances}

    async def refresh_system_stats(self) -> dict[str, Any]:
        """`get_system_stats`, after asking every instance."""
        await self.scheduler.refresh()
        return self.get_system_stats()

    @property
    def scheduler(self) -> CpuScheduler:
        """Raises RuntimeError unless it is running."""
        if self._scheduler is None:
            raise RuntimeError("DisaggregatedLLM is not running: call start() first")
        return self._scheduler

    def _require_instances(self) -> LocalInstances:
        assert self._instances is not None
        return self._instances
