"""Instances without an engine, and their processes, for benchmarks of RPC, scheduler and server.

This is not a benchmark itself. A file that needs such an instance runs itself in another process, so that each has a
core.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hbserve_rpc import Method, RpcServer
from hbserve_rpc.messages import (
    DESCRIBE,
    GENERATE,
    STATS,
    Empty,
    GenerateRequest,
    InstanceInfo,
    InstanceStats,
    Role,
    TokenEvent,
)
from hbserve_rpc.reports import REPORTS, InstanceReport, ReportsRequest

MAX_MODEL_LEN = 1 << 16
LIMITS: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_prompt_len": MAX_MODEL_LEN - 1, "vocab_size": 49152}
"""Limits of a model that the demo model's tokenizer fits."""


def mock_instance(instance_id: str, role: Role, *, drops_closed: bool = False, **sizes: Any) -> RpcServer:
    """Make a server that describes itself as a ready instance. The caller lets it serve tokens.

    `sizes` are further fields of its InstanceInfo. With `num_blocks` it also reports that all of these are free.
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


STEP: Method[TokenEvent, Empty] = Method("bench.step", TokenEvent, Empty)
"""Call to an instance of `serve_steps`: as soon as so many streams (`index`) wait, each of them gets its next token."""


def serve_steps(server: RpcServer, tokens: list[int]) -> None:
    """Give every stream a token at each step, as an engine does, when a client has asked for the step. If the client
    has received those of the last step when it asks, no tokens wait for each other."""
    has_stepped, num_waiting = asyncio.Event(), 0

    async def generate(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        nonlocal num_waiting
        first = len(request.prompt_token_ids)  # each stream is somewhere else in the text
        for index in range(request.params.max_tokens):
            num_waiting += 1
            await has_stepped.wait()
            is_last = index + 1 == request.params.max_tokens
            yield TokenEvent(index, [tokens[(first + index) % len(tokens)]], "length" if is_last else None)

    async def step(streams: TokenEvent) -> Empty:
        nonlocal has_stepped, num_waiting
        while num_waiting < streams.index:  # noqa: ASYNC110  some are being opened
            await asyncio.sleep(0.001)
        num_waiting = 0
        stepped, has_stepped = has_stepped, asyncio.Event()
        stepped.set()
        for _turn in range(3):  # as many turns as the loop needs for everything that this causes
            await asyncio.sleep(0)
        return Empty()

    server.serve(STEP, step)
    server.serve_stream(GENERATE, generate)


async def serve_until_killed(*servers: RpcServer) -> None:
    """Serve, and print the addresses in a line, which `started` reads."""
    for server in servers:
        await server.start()
    print(*[server.address for server in servers], flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def started(file: str, *arguments: str, core: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """Run a file in a process, and kill it at the end. Yields its pid, and the words of the first line that it prints.

    `core` is the only one that it may use.
    """
    pin = [] if core is None else ["taskset", "-c", str(core)]
    process = subprocess.Popen([*pin, sys.executable, file, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().split()
    finally:
        process.kill()
        process.communicate()
