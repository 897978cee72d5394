"""A manager moves a block to itself before anybody relies on its backend, and nobody sees that it has."""

import asyncio
import logging
import os
from typing import Any

import pytest
import torch
from conftest import make_manager

from hbserve_kv import BackendUnavailable, HeadRange, TransferStats
from hbserve_kv.testing import Faults, LoopbackNetwork
from hbserve_kv.testing.loopback import LoopbackTransport
from hbserve_kv.testing.rig import BLOCK_MAJOR, LAYOUTS, Rig
from hbserve_testing.waits import until


@pytest.fixture(autouse=True)
async def _no_task_is_left():
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


def numbered() -> torch.Tensor:
    return torch.arange(64.0 * 96).view(64, 96)


async def test_a_manager_moves_a_block_to_itself_and_leaves_nothing_of_that(backend, caplog):
    """Of a custom backend it does nothing, which need not be able to."""
    caplog.set_level(logging.INFO)
    pool = numbered()
    manager = make_manager(0, backend, pool)
    await manager.start()
    try:
        for _ in range(2):
            await manager.transfer_to_itself()
            assert (manager.links(), manager.stats()) == ([], TransferStats())
            assert pool.equal(numbered())
        logged = [record for record in caplog.records if record.levelno >= logging.INFO]
        assert not [record for record in logged if record.name.startswith("hbserve_rpc")], "a link that ends in order"
        tried = [record.getMessage() for record in logged if record.name == "hbserve_kv.sending.peers"]
        expected = {"hbserve_kv_test_backend:QueueTransfer": 0, "auto": len(manager._transports)}
        assert len(tried) == 2 * expected.get(backend, 1)
        assert all(line.startswith("link to itself: ") for line in tried)
        await until(lambda: not manager._receiver._losing)
    finally:
        await manager.close()


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_pools_of_every_layout_move_to_themselves(layout):
    rig = Rig("ipc", None, "cpu", (BLOCK_MAJOR, layout))
    pool = rig.pool(num_blocks=3, fill=2.0)
    await (await rig.start(0, pool, is_raw=False)).transfer_to_itself()
    assert pool.eq(2.0).all()
    await rig.close()


@pytest.mark.parametrize(
    ("pool", "heads"), [(torch.ones(1, 8), None), (torch.ones(4, 3, 2, 8), HeadRange(2, 2, 8))], ids=["block", "rank"]
)
async def test_a_pool_of_one_block_and_one_rank_of_several_do_too(managers, pool, heads):
    manager = await managers(0, "nccl", pool, heads=heads)
    await manager.transfer_to_itself()
    assert pool.eq(1).all()


class Forgetful(LoopbackTransport):
    """Says that it has moved what it has not."""

    async def push(self, link: Any, part: Any) -> None:
        pass


class Flipping(LoopbackTransport):
    async def push(self, link: Any, part: Any) -> None:
        await super().push(link, part)
        self._memory.pool[part.target_block_ids[0], 5] ^= 1


class Unreached(LoopbackTransport):
    async def connect(self, link: Any) -> None:
        raise ConnectionError("no way there")


class OutOfFiles(LoopbackTransport):
    async def connect(self, link: Any) -> None:
        raise RuntimeError("[enforce fail at loop.cc:48] rv != -1. -1 vs -1. pipe: Too many open files")  # Gloo's words


@pytest.mark.parametrize(
    ("transport", "faults", "error"),
    [
        (Forgetful, Faults(), "what arrived is not what was sent"),
        (Flipping, Faults(), "what arrived is not what was sent"),
        (Unreached, Faults(), "no way there"),
        (OutOfFiles, Faults(), "pipe: Too many open files: this process may open [0-9]+; raise `ulimit -n`$"),
        (LoopbackTransport, Faults(fail=1.0), "ConnectionError: failed"),
        (LoopbackTransport, Faults(drop=1.0), "timed out"),
    ],
)
async def test_a_backend_that_does_not_move_a_block_is_named_with_the_reason(transport, faults, error):
    manager = make_manager(0, "ipc", numbered(), transport=transport(LoopbackNetwork(faults)), timeout_s=1.0)
    await manager.start()
    with pytest.raises(
        BackendUnavailable, match=rf"kv_transfer\.backend='ipc': a transfer to itself by loopback failed: .*{error}"
    ):
        await manager.transfer_to_itself()
    await manager.close()


@pytest.mark.parametrize(("is_taken", "error"), [(False, r"no connection to 127\.0\.0\.1:9"), (True, "model is 'm'")])
async def test_an_address_that_nobody_or_another_is_at_is_told(managers, monkeypatch, is_taken, error):
    """As where a firewall drops what comes to the address that peers are given, or passes it to another host."""
    manager, other = await managers(0, "ipc", timeout_s=0.5), await managers(1, "ipc", fingerprint={"model": "other"})
    with monkeypatch.context() as patched:
        patched.setattr(type(manager), "address", other.address if is_taken else "127.0.0.1:9")
        with pytest.raises(BackendUnavailable, match=f"a transfer to itself by ipc failed: .*{error}"):
            await manager.transfer_to_itself()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nccl", "ipc", "auto"])
async def test_blocks_of_a_gpu_move_to_themselves(managers, name):
    """NCCL refuses two ends on one GPU: `nccl` goes by Gloo there, as between two instances of one GPU."""
    pool = numbered().cuda()
    manager = await managers(0, name, pool)
    await manager.transfer_to_itself()
    assert (manager.links(), manager.stats()) == ([], TransferStats())
    assert pool.equal(numbered().cuda())
    assert os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1"
