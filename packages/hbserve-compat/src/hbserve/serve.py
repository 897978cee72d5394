"""`hbserve serve` and `hbserve instance`: a deployment's processes."""

import asyncio
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from hbserve.demo_model import find_model_folder
from hbserve.launcher import QUIET_TORCH, LocalInstances, instance_settings
from hbserve_rpc import own_process
from hbserve_scheduler import ConfigError, CpuScheduler, InstanceFailed, SchedulerServer, load_config

logger = logging.getLogger(__name__)


async def serve_all(path: Path, log_level: str) -> None:
    """Scheduler and every instance, until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConfigError, AddressInUse, InstanceFailed.
    """
    config = load_config(path)
    folder = await find_model_folder(config.model.path)
    stop = asyncio.Event()
    for number in own_process.ending_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    scheduler = CpuScheduler(config.scheduler, model_path=str(folder))
    died: list[str] = []

    def on_death(instance_id: str, why: str) -> None:
        died.append(f"{instance_id}: {why}")
        stop.set()

    instances = LocalInstances(config, folder, log_level=log_level, on_death=on_death)
    server = SchedulerServer(scheduler)
    try:
        await server.start()
        await _unless(stop, instances.start())
        for process in instances.processes if not stop.is_set() else []:
            await scheduler.add_instance(process.instance_id, process.role, process.address)
        if not stop.is_set():
            logger.info("serving %s on %s", folder, server.address)
        await stop.wait()
    finally:
        await server.stop()
        await instances.stop()
    if died:
        raise InstanceFailed(died[0])


async def _unless(stop: asyncio.Event, job: Coroutine[Any, Any, None]) -> None:
    """Run a job to its end, or until `stop`."""
    tasks = [asyncio.create_task(job), asyncio.create_task(_wait(stop))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def serve_instance(path: Path, instance_id: str, log_level: str) -> None:
    """One instance, until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConfigError: the file has no such instance, or is wrong.
        AddressInUse: its address is taken.
    """
    os.environ.setdefault(*QUIET_TORCH)  # torch reads it when it is imported
    from hbserve_core import InstanceConfig, run_instance

    config = load_config(path)
    found = [each for each in config.gpu_instances if each.instance_id == instance_id]
    if not found:
        names = ", ".join(each.instance_id for each in config.gpu_instances)
        raise ConfigError(f"--instance-id={instance_id!r}: {path} has {names}")
    folder = await find_model_folder(config.model.path)
    settings = instance_settings(config, found[0], folder, log_level=log_level)
    await run_instance(msgspec.convert(settings, InstanceConfig))
