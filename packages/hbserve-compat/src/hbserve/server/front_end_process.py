"""`python -m hbserve.server.front_end_process`: one of several processes of an OpenAI server, started by front_ends.py.

It reads FrontEndSettings from stdin, as one line of JSON, and writes the address of its own RPC to stdout, in one line,
when it serves. At SIGTERM it answers the requests that have begun, within `drain_timeout_s`, and then ends. A second
SIGTERM, or the end of stdin, ends it at once. Its exit status is 0, or 1 with one line on stderr.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from pathlib import Path

import msgspec

from hbserve.processes.ending import Ending, unless
from hbserve.server.front_end import FrontEnd
from hbserve.server.front_ends import FrontEndSettings
from hbserve.server.http.http_server import shared_with_others
from hbserve_rpc import HBServeRpcError, own_process
from hbserve_rpc.parent_watch import when_launcher_ends
from hbserve_rpc.stderr_log import log_to_stderr
from hbserve_scheduler import CpuScheduler, HBServeSchedulerError, RemoteScheduler, SchedulerServer


async def _serve(settings: FrontEndSettings) -> None:
    keys = settings.keys if settings.parent_has_keys else None
    loop, ending = asyncio.get_running_loop(), Ending()
    with own_process.on_ending_signals(lambda _: ending.tell()):
        when_launcher_ends(lambda: loop.call_soon_threadsafe(ending.tell_at_once))
        parent = RemoteScheduler(settings.parent, keys=keys)
        shared = shared_with_others(settings.server, settings.listening_fd)
        front_end = FrontEnd(settings.server, shared=shared, whole=parent)
        server = SchedulerServer(CpuScheduler(settings.scheduler, model_path=settings.model_folder), keys=keys)
        server.scheduler.use_keys(settings.keys)
        try:
            await parent.start()
            await server.start()
            await unless(ending.begun, _begin(settings, front_end, server))
            await ending.begun.wait()
            await unless(ending.at_once, front_end.drain())
        finally:
            await server.stop()
            await front_end.stop()
            await parent.stop()


async def _begin(settings: FrontEndSettings, front_end: FrontEnd, server: SchedulerServer) -> None:
    for instance in settings.instances:
        await server.scheduler.add_instance(*instance)
    await front_end.begin(settings.model_name, Path(settings.model_folder), server)
    await front_end.start()
    own_process.freeze_heap()
    sys.stdout.write(json.dumps({"address": server.address}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the process, and end it with the status that the module's docstring describes."""
    own_process.set_up()
    own_process.end_at_once_by_ctrl_c()
    line = sys.stdin.buffer.readline()
    status = 0
    if line:  # else the parent has ended
        settings = msgspec.json.decode(line, type=FrontEndSettings)
        log_to_stderr(settings.log_level)
        try:
            asyncio.run(_serve(settings))
        except (OSError, ValueError, HBServeRpcError, HBServeSchedulerError) as error:
            sys.stderr.write(f"{settings.name}: {error}\n")
            status = 1
    # Not an ordinary exit: it would wait for stdin's lock, which the watching thread may still hold.
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
