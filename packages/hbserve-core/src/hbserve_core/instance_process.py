"""One instance as a process: `python -m hbserve_core`, started by a launcher, or `run_instance` in one's own.

Protocol with a launcher: the InstanceConfig comes as one line of JSON on stdin; the answer is one line of JSON on
stdout once the address is bound, before the model is loaded. Then stdin stays open: its end means that the launcher is
gone, and the instance ends too. SIGTERM and SIGINT end it in an orderly way. A model that cannot be loaded does not end
the process: DESCRIBE tells whoever waits for it.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading

import msgspec

from hbserve_core.config import InstanceConfig
from hbserve_core.gpu_instance import GpuInstance

logger = logging.getLogger(__name__)


async def run_instance(config: InstanceConfig, *, announce: bool = False, stop: asyncio.Event | None = None) -> None:
    """Serve until SIGTERM, SIGINT, or `stop`.

    Raises:
        AddressInUse: the configured address is taken.
    """
    stop = stop or asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    instance = GpuInstance(config)
    await instance.start()
    if announce:
        sys.stdout.write(json.dumps({"address": instance.address, "pid": os.getpid()}) + "\n")
        sys.stdout.flush()
    try:
        await stop.wait()
    finally:
        await instance.stop()


async def _serve_launcher(config: InstanceConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def watch() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(stop.set)

    # A daemon: nothing can wake it from its read, so the process must not wait for it.
    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
    await run_instance(config, announce=True, stop=stop)


def main() -> int:
    """Entry of `python -m hbserve_core`. Returns the exit status; problems are one line on stderr."""
    try:
        config = msgspec.json.decode(sys.stdin.buffer.readline(), type=InstanceConfig)
    except msgspec.DecodeError as error:
        sys.stderr.write(f"configuration on stdin: {error}\n")
        return 2
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        asyncio.run(_serve_launcher(config))
    except OSError as error:
        sys.stderr.write(f"{config.instance_id}: {error}\n")
        return 1
    # The watching thread may still hold stdin's lock, on which an ordinary exit would wait.
    logging.shutdown()
    os._exit(0)
