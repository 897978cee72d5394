"""Two managers that trust each other, over every backend that this machine has."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from hbserve_kv import KVTransferConfig, KVTransferManager, Link, Part
from hbserve_kv.testing import LoopbackNetwork, LoopbackTransport, is_empty
from hbserve_kv.transports.base import DrainUnknown

BACKENDS = ["nccl", "mooncake", "ipc", "auto", "hbserve_kv_test_backend:QueueTransfer"]


def needs_mooncake(backend: str) -> None:
    if backend == "mooncake":
        pytest.importorskip(
            "mooncake.engine", reason="Mooncake or its system libraries are missing", exc_type=ImportError
        )


def make_manager(rank: int, backend: str, pool: torch.Tensor | None = None, **settings: Any) -> KVTransferManager:
    if pool is None:
        pool = torch.full((64, 2, 3, 64), -1.0)
    fingerprint = settings.pop("fingerprint", {"model": "m"})
    own = {name: settings.pop(name) for name in ("heads", "transport", "name") if name in settings}
    config = KVTransferConfig(**{"backend": backend, "buffer_size": 1 << 20, "timeout_s": 10, **settings})
    return KVTransferManager(rank=rank, pool=pool, fingerprint=fingerprint, config=config, **own)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    needs_mooncake(request.param)
    monkeypatch.syspath_prepend(request.path.parent)
    return str(request.param)


@pytest.fixture(params=["nccl", "mooncake", "ipc"])
def processes_backend(request: pytest.FixtureRequest) -> str:
    """The backends that cross processes; `auto` is one of these."""
    needs_mooncake(request.param)
    return str(request.param)


@pytest.fixture
async def managers() -> AsyncIterator[Callable[..., Any]]:
    """Starts managers; afterwards they are closed, and nothing may be left in them."""
    async with contextlib.AsyncExitStack() as stack:
        started = []

        async def start(*args: Any, **kwargs: Any) -> KVTransferManager:
            manager = make_manager(*args, **kwargs)
            await manager.start()
            stack.push_async_callback(manager.close)
            started.append(manager)
            return manager

        yield start
        # The other side of a transfer that failed hears so a moment later.
        async with asyncio.timeout(30):
            while not all(is_empty(manager) for manager in started):
                await asyncio.sleep(0.01)


@pytest.fixture
async def pair(managers: Callable[..., Any]) -> tuple[Any, ...]:
    """A sender whose block i is full of i, and a receiver whose blocks are full of -1."""
    network = LoopbackNetwork()
    source = torch.arange(64.0)[:, None].expand(64, 96).contiguous()
    target = torch.full((64, 96), -1.0)
    sender = await managers(0, "loopback", source, transport=network.transport())
    receiver = await managers(1, "loopback", target, transport=network.transport())
    return sender, receiver, target, network


@pytest.fixture
async def lasting_pair(managers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Any, ...]]:
    """A sender whose writes fail and may go on until the event is set, which comes third, and a receiver."""
    monkeypatch.setattr("hbserve_kv.sending.link.DRAIN_PATIENCE_S", 0.05)
    network, has_ended = LoopbackNetwork(), asyncio.Event()

    class Lasting(LoopbackTransport):
        async def push(self, link: Link, part: Part) -> None:
            raise DrainUnknown("timed out")

        async def disconnect(self, link: Link) -> None:
            await has_ended.wait()

    sender = await managers(0, "loopback", transport=Lasting(network))
    receiver = await managers(1, "loopback", transport=network.transport())
    sender.add_peer(1, receiver.address)
    yield sender, receiver, has_ended
    has_ended.set()


def pytest_configure() -> None:
    """Without a GPU our kernel runs in Triton's interpreter, which must be said before it is first imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
