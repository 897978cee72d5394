"""One instance as a process: `python -m hbserve_core`, started by a launcher, or `run_instance` in the caller's
process.

Protocol with a launcher: the InstanceConfig comes as one line of JSON on stdin; the answer is one line of JSON on
stdout once the address is bound, before the model is loaded. Then stdin stays open: its end means that the launcher is
gone, and the instance ends too. SIGTERM, SIGINT and SIGHUP end the instance in an orderly way.

Exit status 0: ended as asked. 1: could not serve. 2: the configuration is invalid. Any status but 0 comes with one line
on stderr that says why. An instance that fails after its address was bound, because its model does not load or its
engine fails, answers DESCRIBE with the reason for a while, so that whoever polls it can read that; then it ends. A
launcher waits for that end, and notices it whatever the state of the network.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Sequence

import msgspec
from tqdm import tqdm

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import InstanceFailed
from hbserve_core.instance.gpu_instance import GpuInstance
from hbserve_core.instance.nccl_interface import keep_nccl_to
from hbserve_core.instance.registration import keep_registered
from hbserve_rpc import own_process
from hbserve_rpc.address import look_up
from hbserve_rpc.misfits import describe_misfit
from hbserve_rpc.parent_watch import when_launcher_ends
from hbserve_rpc.stderr_log import log_to_stderr

logger = logging.getLogger(__name__)

FAILED_LINGER_S = 15.0
"""Time for which an instance that has failed still says why."""
LAUNCHED_LINGER_S = 5.0
"""Time for which an instance that has failed still says why, if a launcher will start it again or give up the whole
deployment."""
SWITCH_INTERVAL_S = 0.00005
"""Time for which a thread may keep the interpreter while another wants it. Python's 5 ms are as long as a step: the
engine's thread, woken to launch the next step in time, would find the event loop at work, and the device would wait.
Besides, the code that moves blocks gives up the interpreter at each call into torch: with 0.2 ms a hand-off takes 0.5
ms longer."""
STOP_TIMEOUT_S = 20.0
"""Longest time that an orderly end may take, because a frozen peer must not keep a process from ending."""
EXPECTED = 'one line of JSON, such as {"instance_id": "prefill-0", "role": "prefill", "model_path": "FOLDER"}'


async def run_instance(config: InstanceConfig, *, announce: bool = False, stop: asyncio.Event | None = None) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP arrives, or `stop` is set. Must run in the main thread.

    SIGINT and SIGHUP stay ignored if they are ignored already.

    Raises:
        AddressInUse: the configured address is taken.
        AddressNotAvailable: this machine does not have the address for KV transfers.
        InstanceFailed: the model does not load, or the engine has failed; the message says why.
    """
    stop = stop or asyncio.Event()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with contextlib.suppress(OSError):  # the instance reports what is wrong with the name
        keep_nccl_to(await look_up(config.kv_transfer.host))
    # The heap is frozen before anybody knows of the instance: otherwise the first requests would wait for it, a quarter
    # of a second.
    instance = GpuInstance(config, before_ready=own_process.freeze_heap)
    with own_process.on_ending_signals(lambda _: stop.set()):
        try:
            await instance.start()
            if announce:
                sys.stdout.write(json.dumps({"address": instance.address, "pid": os.getpid()}) + "\n")
                sys.stdout.flush()
            async with _registered(instance):
                await _serve(instance, stop, LAUNCHED_LINGER_S if announce else FAILED_LINGER_S)
        finally:  # a second Ctrl-C during the end changes nothing
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await instance.stop()
            except TimeoutError:
                logger.warning("%s: did not end within %s s; ending anyway", config.instance_id, STOP_TIMEOUT_S)


@contextlib.asynccontextmanager
async def _registered(instance: GpuInstance) -> AsyncIterator[None]:
    config = instance.config
    whom = config.instance_id, instance.address
    registering = asyncio.create_task(keep_registered(*whom, config.schedulers, config.keys))
    try:
        yield
    finally:
        registering.cancel()
        await asyncio.gather(registering, return_exceptions=True)


async def _serve(instance: GpuInstance, stop: asyncio.Event, linger_s: float) -> None:
    stopping, failing = asyncio.create_task(stop.wait()), asyncio.create_task(instance.wait_failed())
    try:
        await asyncio.wait([stopping, failing], return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            await asyncio.wait([stopping], timeout=linger_s)
            raise InstanceFailed(failing.result())
    finally:
        for task in (stopping, failing):
            task.cancel()


async def _serve_launcher(config: InstanceConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    when_launcher_ends(lambda: loop.call_soon_threadsafe(stop.set))
    await run_instance(config, announce=True, stop=stop)


def _read_config() -> InstanceConfig:
    """Read the configuration from stdin. Raises ValueError, which says what is wrong with the line."""
    line = b"" if sys.stdin is None else sys.stdin.buffer.readline()  # None: stdin is closed
    if not line.strip():
        raise ValueError(f"configuration on stdin: there is none; expected {EXPECTED}")
    try:
        return msgspec.json.decode(line, type=InstanceConfig)
    except msgspec.ValidationError as error:
        problem = describe_misfit(error, msgspec.json.decode(line), InstanceConfig, "all of it")
        raise ValueError(f"configuration on stdin: {problem}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"configuration on stdin: {error}") from error


def main(arguments: Sequence[str] = ()) -> int:
    """Run `python -m hbserve_core`, and end the process with a status that the module describes."""
    own_process.set_up()
    own_process.end_at_once_by_ctrl_c()
    # tqdm's own lock has a semaphore. From Python 3.14 on, an end without finalizers leaves it behind, and Python
    # reports it.
    tqdm.set_lock(threading.RLock())
    if arguments:
        sys.stderr.write(f"{arguments[0]}: python -m hbserve_core takes no arguments; expected on stdin: {EXPECTED}\n")
        return 2
    if sys.stdout is None:
        sys.stderr.write("stdout is closed: the address has nowhere to go\n")
        return 1
    if sys.stdin is not None and sys.stdin.isatty():
        sys.stderr.write(f"expected: {EXPECTED}\n")
    try:
        config = _read_config()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    log_to_stderr(config.log_level)
    status = 0
    try:
        asyncio.run(_serve_launcher(config))
    except (OSError, InstanceFailed) as error:
        sys.stderr.write(f"{config.instance_id}: {error}\n")
        status = 1
    # The watching thread may still hold stdin's lock, for which an ordinary exit would wait.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
