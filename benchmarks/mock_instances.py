"""Instances without an engine, and the processes that they are in: for benchmarks of RPC, scheduler and server.

Not a benchmark itself. A file that needs one runs itself once more, in another process, so that each has a core.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hbserve_rpc import RpcServer
from hbserve_rpc.messages import DESCRIBE, STATS, Empty, InstanceInfo, InstanceStats, Role
from hbserve_rpc.reports import REPORTS, InstanceReport, ReportsRequest

MAX_MODEL_LEN = 1 << 16
LIMITS: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_prompt_len": MAX_MODEL_LEN - 1, "vocab_size": 49152}
"""Of a model that the demo model's tokenizer fits."""


def mock_instance(instance_id: str, role: Role, *, drops_closed: bool = False, **sizes: Any) -> RpcServer:
    """A server that says of itself what a ready instance says, for whoever makes it serve tokens.

    sizes: further fields of its InstanceInfo. With `num_blocks` it also reports that all of them are free.
    """
    server = RpcServer(drops_closed=drops_closed)
    info = InstanceInfo(instance_id, role, server.epoch, "ready", **sizes)
    blocks = info.num_blocks
    free = InstanceStats(instance_id, role, "ready", server.epoch, num_blocks=blocks, free_blocks=blocks)

    async def describe(_: Empty) -> InstanceInfo:
        return info

    async def stats(_: Empty) -> InstanceStats:
        return free

    async def reports(_: ReportsRequest) -> AsyncIterator[InstanceInfo | InstanceReport]:
        yield info
        if blocks:
            yield InstanceReport(free)
        await asyncio.Event().wait()

    server.serve(DESCRIBE, describe)
    server.serve(STATS, stats)
    server.serve_stream(REPORTS, reports)
    return server


async def serve_until_killed(*servers: RpcServer) -> None:
    """Their addresses are the line that `started` reads."""
    for server in servers:
        await server.start()
    print(*[server.address for server in servers], flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def started(file: str, *arguments: str, core: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """A process that runs a file: its id, and the words of the first line that it prints. It is killed at the end.

    core: the only one that it may use.
    """
    pin = [] if core is None else ["taskset", "-c", str(core)]
    process = subprocess.Popen([*pin, sys.executable, file, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().split()
    finally:
        process.kill()
        process.communicate()
