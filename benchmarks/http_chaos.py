"""10,000 requests to `hbserve serve` that are wrong, or whose clients go away, in slices of each kind.

    python benchmarks/http_chaos.py

The server runs in this process, on a Unix domain socket. It uses a prefill and a decode instance of a small random
model. After each slice it prints the HTTP statuses, and whether queues, blocks, tasks and file descriptors are back.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml

sys.path.append(str(Path(__file__).resolve().parent.parent / "packages/hbserve-compat/tests"))

from hbserve_random_requests import BODY, HEADER, LINE, PATHS, PAYLOAD
from hbserve_served import PAIR, figures_of, is_empty
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hbserve.commands.serve import ServeArgs, serve_all
from hbserve_testing.small_models import write_small_model

AT_ONCE = 16
DEADLINE_S = 120
TEMPLATE = "{# tools <tool_call> </think> #}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
GOOD = [
    ("/v1/completions", b'{"prompt": "hello", "max_tokens": 90, "ignore_eos": true, "n": 2, "stream": true}'),
    ("/v1/completions", b'{"prompt": "hello", "max_tokens": 90, "ignore_eos": true}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}], "ignore_eos": true, "stream": true}'),
    ("/v1/responses", b'{"input": "hi", "stream": true}'),
    ("/v1/messages", b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 90, "stream": true}'),
]
Ask = Callable[["Chaos", Any], Awaitable[str]]


def examples(strategy: st.SearchStrategy[Any], count: int, number: int) -> list[Any]:
    found: list[Any] = []

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def take(example: Any) -> None:
        found.append(example)

    take()
    return found


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Chaos:
    """The clients of one server."""

    def __init__(self, uds: str) -> None:
        self._uds = uds

    async def _read(
        self, sent: bytes, num_bytes: int = -1, timeout_s: float = DEADLINE_S, abort: bool = False
    ) -> bytes:
        """Send something, and disconnect after so many bytes, or so long; by default, after the whole answer."""
        reader, writer = await asyncio.open_unix_connection(self._uds)
        found = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                writer.write(sent)
                while len(found) < num_bytes or num_bytes < 0:
                    part = await reader.read(65536)
                    if not part:
                        break
                    found += part
        except (TimeoutError, ConnectionError):
            if timeout_s == DEADLINE_S:
                raise
        finally:
            if abort:
                writer.transport.abort()
            writer.close()
        return bytes(found)

    async def body(self, example: tuple[str, bytes]) -> str:
        return status_of(await self._read(post(*example)))

    async def head(self, example: tuple[str, list[str], bytes]) -> str:
        line, headers, payload = example
        return status_of(await self._read("\r\n".join([line, *headers, "", ""]).encode("latin-1") + payload, 200, 0.05))

    async def leaves(self, example: tuple[int, int, float, float, bool]) -> str:
        kind, num_bytes, after_s, part, abort = example
        whole = post(*GOOD[kind])
        return status_of(await self._read(whole[: int(len(whole) * part)], num_bytes, after_s, abort))

    async def metrics(self) -> dict[str, float]:
        text = await self._read(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        return figures_of(text.decode().partition("\r\n\r\n")[2])

    async def until_ready(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    if await self.body(GOOD[1]) == "200":
                        return
                except (FileNotFoundError, ConnectionError):
                    pass
                await asyncio.sleep(0.1)


def status_of(answer: bytes) -> str:
    parts = answer[:80].split(b" ")
    return parts[1].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "none"


def held() -> tuple[int, int]:
    """Return how many tasks and file descriptors this process has."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


async def settle(chaos: Chaos, before: tuple[int, int]) -> str:
    """Wait until everything is back. Returns what is not, after a while; "" if all is."""
    began_s = perf_counter()
    while perf_counter() - began_s < DEADLINE_S:
        figures = await chaos.metrics()
        await asyncio.sleep(0.05)
        if is_empty(figures) and held() <= before:
            return ""
    return f"tasks and descriptors {held()}, {before} before; empty: {is_empty(figures)}"


KINDS: dict[str, tuple[Ask, st.SearchStrategy[Any]]] = {
    "bodies": (Chaos.body, st.tuples(PATHS, BODY)),
    "heads": (Chaos.head, st.tuples(LINE, st.lists(HEADER, max_size=3), PAYLOAD)),
    "disconnects": (
        Chaos.leaves,
        st.tuples(
            st.integers(0, len(GOOD) - 1),
            st.sampled_from([1, 300, 1000, 3000]),
            st.sampled_from([0, 0.02, 0.1, 0.5, 2]) | st.floats(0, 1),
            st.sampled_from([0.3, 0.9, 1, 1, 1]),
            st.booleans(),
        ),
    ),
}


async def run(uds: str, slices: list[tuple[str, list[Any]]]) -> None:
    chaos = Chaos(uds)
    await chaos.until_ready()
    for name, todo in slices:
        await settle(chaos, (10**6, 10**6))
        before, began_s, limit = held(), perf_counter(), asyncio.Semaphore(AT_ONCE)

        async def one(example: Any, ask: Ask = KINDS[name][0], limit: asyncio.Semaphore = limit) -> str:
            async with limit:
                return await ask(chaos, example)

        statuses = Counter(await asyncio.gather(*(one(example) for example in todo)))
        took_s = perf_counter() - began_s
        left = await settle(chaos, before)
        print(
            f"{len(todo)} {name} in {took_s:.0f} s: {dict(sorted(statuses.items()))}; "
            f"tasks and descriptors {before}, then {held()}; left behind: {left or 'nothing'}",
            flush=True,
        )
        assert not left
        assert "500" not in statuses, "a mistake of the server's"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--slice-size", type=int, default=840, help="of bodies, of heads, and of disconnects each")
    arguments = parser.parse_args()
    # Beforehand: whoever stands still while the server runs is given up by the instances.
    slices = [
        (name, examples(strategy, arguments.slice_size, number))
        for number in range(arguments.slices)
        for name, (_, strategy) in KINDS.items()
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, uds = Path(name), f"{name}/api.sock"
        write_small_model(folder, "qwen3")
        content = {
            "model": {"path": str(folder), "max_model_len": 128}, "gpu_instances": PAIR, "engine": {"num_blocks": 256},
            "scheduler": {"port": 0}, "server": {"uds": uds, "chat_template": TEMPLATE, "max_body_size": "1MiB"},
        }  # fmt: skip
        (folder / "chaos.yaml").write_text(yaml.safe_dump(content))
        serving = asyncio.create_task(serve_all(ServeArgs(folder / "chaos.yaml", None, "WARNING")))
        running = asyncio.create_task(run(uds, slices))
        await asyncio.wait((serving, running), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
        running.result()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it tells each head that is wrong
    asyncio.run(main())
