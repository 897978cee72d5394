"""The rate of one OpenAI server process, with a mock engine that costs nothing, streamed to by many clients.

    python benchmarks/api_server.py                     256 streams: as many tokens/s as the server takes, and TTFT
    python benchmarks/api_server.py --rate 25600        this many tokens/s are offered, in steps
    python benchmarks/api_server.py --by-step [--chat]  one token for each stream and step, each an event of its own
    python benchmarks/api_server.py --cores 0 1         the server on core 0, engine and clients on core 1
    python benchmarks/api_server.py --api-servers 1 4   several front ends, each with an engine and a client process

The engine is a process that speaks the instances' RPC. It gives a request its next token as soon as the last one is
taken. Tokens that come faster than the server sends them are merged into fewer and larger events; tokens and events are
both printed. This happens without --rate. At a rate that the server keeps up with, each token is an event of its own.
With --by-step no token waits, however busy the machine is: the engine's next step is requested when the clients have
all events of the last one. With --api-servers, streams and rate are those of each front end.

"TTFT added" is the time from writing a request to its first token, while the engine takes no time. One client at a time
measures it: alone, and then beside all the streams at 25 tokens/s each. If the engine or the clients are slower than
the server, look at the server's processor time: it says what the server alone could do.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from mock_instances import LIMITS, STEP, mock_instance, serve_steps, serve_until_killed, started

from hbserve_rpc import RpcClient, own_process
from hbserve_rpc.messages import GENERATE, GenerateRequest, Role, TokenEvent
from hbserve_testing.narrowing import present

WORDS = [260, 314, 281, 253, 354, 327, 523, 411]
"""Ids of the demo model's tokens that are whole words."""


async def serve_engine(number: int, *, by_step: bool) -> None:
    """Serve a hybrid instance whose tokens cost nothing. Unless they come `by_step`, each takes `top_k` ms."""
    server = mock_instance(f"mock-{number}", "hybrid", device="none", kv_backend="none", **LIMITS)
    if by_step:
        serve_steps(server, WORDS)
        await serve_until_killed(server)

    async def generate(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        wait_s = max(0, request.params.top_k) / 1e3
        for index in range(request.params.max_tokens):
            await asyncio.sleep(wait_s)
            last = index == request.params.max_tokens - 1
            yield TokenEvent(index, [1000 + index % 20000], "length" if last else None)

    server.serve_stream(GENERATE, generate)
    await serve_until_killed(server)


async def serve_api(
    instances: dict[str, tuple[Role, str]], *, model: str | None = None, api_servers: int = 1, **settings: Any
) -> None:
    """Serve the front end of `hbserve serve` on instances that it has not started, which are given by id with role and
    address. `settings` are the scheduler's."""
    from hbserve.models.demo_model import find_model_folder
    from hbserve.server.front_end import FrontEnd
    from hbserve.server.front_ends import FrontEnds
    from hbserve_scheduler import CpuScheduler, SchedulerConfig, SchedulerServer
    from hbserve_scheduler.config import ServerSection

    folder = await find_model_folder(model)
    section = ServerSection(port=0, api_servers=api_servers)
    front_end = FrontEnd(section) if api_servers == 1 else FrontEnds(section, "WARNING", print)
    server = SchedulerServer(CpuScheduler(SchedulerConfig(port=0, **settings), model_path=str(folder)))
    await front_end.start()
    await server.start()
    for instance_id, (role, address) in instances.items():
        await server.scheduler.add_instance(instance_id, role, address)
    await front_end.begin("demo", folder, server)
    own_process.freeze_heap()  # as it does
    print(front_end.url, flush=True)
    await asyncio.Event().wait()


async def stream(port: int, max_tokens: int, ms_a_token: int) -> tuple[float, float, int]:
    """Stream one completion. Returns the seconds to its first token and to its end, and how many events have text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = f'"max_tokens": {max_tokens}, "top_k": {ms_a_token}, "ignore_eos": true, "stream": true'
    body = f'{{"prompt": "What is the capital of France?", {fields}}}'.encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    began_s = time.perf_counter()
    writer.write(head.encode() + body)
    content = b""
    while b'"text"' not in content:  # its head comes before it
        part = await reader.read(1 << 16)
        assert part, content[:200]
        content += part
    first_s = time.perf_counter() - began_s
    assert content.startswith(b"HTTP/1.1 200"), content[:200]
    num_events = content.count(b'"text"')
    while part := await reader.read(1 << 18):
        num_events += part.count(b'"text"')
    writer.close()
    return first_s, time.perf_counter() - began_s, num_events


class Events(asyncio.Protocol):
    """Counts the events of one streamed answer as they come. `took` is called with the number of new ones."""

    def __init__(self, path: str, body: str, took: Callable[[int], None]) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self._request, self._took = (head + body).encode(), took
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._took(data.count(b'"index"'))

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)


async def measure_by_step(pid: int, port: int, engine: str, num_streams: int, num_tokens: int, *, chat: bool) -> None:
    """Measure step by step, so that nothing waits: the next step is asked for when all events of the last one have
    come."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = '"messages": [{"role": "user", "content": "Who?"}]' if chat else '"prompt": "Who?"'
    body = f'{{{asked}, "max_tokens": {num_tokens}, "ignore_eos": true, "stream": true}}'
    num_events, loop = 0, asyncio.get_running_loop()

    def took(number: int) -> None:
        nonlocal num_events
        num_events += number

    streams = [
        (await loop.create_connection(lambda: Events(path, body, took), "127.0.0.1", port))[1]
        for _ in range(num_streams)
    ]
    async with RpcClient(engine) as client:
        began_s, used_s, wanted = 0.0, 0.0, num_streams * chat  # a chat begins with the assistant's role
        for step in range(num_tokens):
            if step == 1:  # the first tokens bring their answers' heads
                began_s, used_s = time.perf_counter(), cpu_s(pid)
            await client.call(STEP, TokenEvent(num_streams, []), timeout_s=60)
            wanted += num_streams
            while num_events < wanted:  # noqa: ASYNC110  the others have their turn
                await asyncio.sleep(0)
    took_s, used_s = time.perf_counter() - began_s, cpu_s(pid) - used_s
    await asyncio.gather(*(each.ended for each in streams))
    total = num_streams * (num_tokens - 1)
    tell(f"{num_streams} streams of {num_tokens} tokens by step", total, total, took_s, used_s)


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(pid: int, port: int, num_streams: int, num_tokens: int, rate: float | None) -> None:
    await asyncio.gather(*(stream(port, 8, 0) for _ in range(num_streams)))  # first uses
    ms_a_token = 0 if rate is None else max(1, round(1000 * num_streams / rate))
    began_s, used_s = time.perf_counter(), cpu_s(pid)
    ends = await asyncio.gather(*(stream(port, num_tokens, ms_a_token) for _ in range(num_streams)))
    took_s, used_s = time.perf_counter() - began_s, cpu_s(pid) - used_s
    total, num_events = num_streams * num_tokens, sum(events for *_, events in ends)
    tell(f"{num_streams} streams of {num_tokens} tokens", total, num_events, took_s, used_s)

    async def idle() -> list[float]:
        return [(await stream(port, 2, 0))[0] for _ in range(50)]

    alone = statistics.median(await idle())
    per_stream_ms = 40
    background = [asyncio.create_task(stream(port, 200, per_stream_ms)) for _ in range(num_streams)]
    await asyncio.sleep(1)
    busy = statistics.median(await idle())
    await asyncio.gather(*background)
    rate = num_streams * 1000 / per_stream_ms
    print(f"TTFT added at p50: alone {1e3 * alone:.2f} ms, beside {rate:,.0f} tokens/s {1e3 * busy:.2f} ms")


def tell(what: str, num_tokens: int, num_events: int, took_s: float, used_s: float) -> None:
    print(f"{what}: {num_tokens / took_s:,.0f} tokens/s, {used_s / took_s:.0%} of a core")
    if not used_s:  # the system counts in ticks of 10 ms
        print("too short: the server's processor time is less than a tick of the system's clock", flush=True)
        return
    per_s = f"{num_tokens / used_s:,.0f} tokens and {num_events / used_s:,.0f} events"
    print(f"for each second of the server's processor time {per_s} ({num_events:,} events in all)", flush=True)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started; several front ends are such processes."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def load(port: int, num_streams: int, num_tokens: int, rate: float | None) -> None:
    """Run as one of several client processes: print when it is warm, wait for a line, and print when it began and
    ended, and how many events it received."""
    await asyncio.gather(*(stream(port, 8, 0) for _ in range(num_streams)))
    print("warm", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    ms_a_token = 0 if rate is None else max(1, round(1000 * num_streams / rate))
    began_s = time.monotonic()
    ends = await asyncio.gather(*(stream(port, num_tokens, ms_a_token) for _ in range(num_streams)))
    print(began_s, time.monotonic(), sum(events for *_, events in ends), flush=True)


def measure_several(arguments: argparse.Namespace, api_servers: int, model: list[str]) -> None:
    """Measure all clients at once, on so many front ends."""
    with contextlib.ExitStack() as stack:
        ask = [started(__file__, "--role", "engine", "--address", str(number)) for number in range(api_servers)]
        engines = [stack.enter_context(each)[1][0] for each in ask]
        options = ["--role", "api", "--api-servers", str(api_servers), "--address", *engines, *model]
        pid, (url,) = stack.enter_context(started(__file__, *options))
        options = ["--role", "client", "--address", url.rpartition(":")[2]]
        options += ["--streams", str(arguments.streams), "--tokens", str(arguments.tokens)]
        options += [] if arguments.rate is None else ["--rate", str(arguments.rate)]
        clients = [
            subprocess.Popen([sys.executable, __file__, *options], stdin=-1, stdout=-1, text=True)
            for _ in range(api_servers)
        ]
        for client in clients:
            assert present(client.stdout).readline() == "warm\n"
        servers = children_of(pid) or [pid]
        used_s = sum(map(cpu_s, servers))
        for client in clients:
            present(client.stdin).write("\n")
            present(client.stdin).flush()
        told = [[float(word) for word in client.communicate()[0].split()] for client in clients]
        used_s = sum(map(cpu_s, servers)) - used_s
        took_s = max(end for _, end, _ in told) - min(begin for begin, *_ in told)
        num_streams, num_events = api_servers * arguments.streams, int(sum(events for *_, events in told))
        what = f"{api_servers} front ends, {num_streams} streams, {num_events / took_s:,.0f} events/s"
        tell(what, num_streams * arguments.tokens, num_events, took_s, used_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rate", type=float, help="tokens/s that are offered; without it, as many as are taken")
    parser.add_argument("--by-step", action="store_true", help="each token is an event of its own")
    parser.add_argument("--chat", action="store_true", help="with --by-step: /v1/chat/completions")
    parser.add_argument("--cores", type=int, nargs=2, metavar=("SERVER", "OTHERS"), help="cores to pin to")
    parser.add_argument("--api-servers", type=int, nargs="+", help="front ends")
    parser.add_argument("--model", help="a folder with another tokenizer than the demo model's")
    parser.add_argument("--role", choices=["engine", "api", "client"], help=argparse.SUPPRESS)
    parser.add_argument("--address", nargs="+", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = [] if arguments.model is None else ["--model", arguments.model]
    if arguments.role == "engine":
        asyncio.run(serve_engine(int(*arguments.address), by_step=arguments.by_step))
    elif arguments.role == "client":
        asyncio.run(load(int(arguments.address[0]), arguments.streams, arguments.tokens, arguments.rate))
    elif arguments.role == "api":
        engines: dict[str, tuple[Role, str]] = {
            f"mock-{number}": ("hybrid", address) for number, address in enumerate(arguments.address)
        }
        (api_servers,) = arguments.api_servers or [1]
        asyncio.run(serve_api(engines, model=arguments.model, api_servers=api_servers))
    elif arguments.api_servers:
        for api_servers in arguments.api_servers:
            measure_several(arguments, api_servers, model)
    else:
        by_step = ["--by-step"] if arguments.by_step else []
        server_core, other_core = arguments.cores or (None, None)
        with (
            started(__file__, "--role", "engine", "--address", "0", *by_step, core=other_core) as (_, (address,)),
            started(__file__, "--role", "api", "--address", address, *model, core=server_core) as (pid, (url,)),
        ):
            if other_core is not None:
                os.sched_setaffinity(0, {other_core})
            port = int(url.rpartition(":")[2])
            if arguments.by_step:
                sizes = arguments.streams, arguments.tokens
                asyncio.run(measure_by_step(pid, port, address, *sizes, chat=arguments.chat))
            else:
                asyncio.run(measure(pid, port, arguments.streams, arguments.tokens, arguments.rate))


if __name__ == "__main__":
    main()
