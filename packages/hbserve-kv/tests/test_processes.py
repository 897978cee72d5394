"""Senders and receivers that die or freeze, as real processes."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hbserve_kv import Outcome, TransferFailed

SENDER = """
import asyncio, sys
import torch
from hbserve_kv import KVTransferConfig, KVTransferManager
async def main():
    backend, grant, how = sys.argv[1], bytes.fromhex(sys.argv[2]), sys.argv[3]
    pool = torch.arange(64 * 384, dtype=torch.float32).view(64, 2, 3, 64)
    config = KVTransferConfig(backend=backend, buffer_size=1 << 20, timeout_s=3)
    kv = KVTransferManager(rank=0, pool=pool, fingerprint={"model": "m"}, config=config)
    await kv.start()
    transfer = await kv.open_send("t", grant)
    transfer.push([7, 3], 0)
    if how == "commit":
        result = await transfer.commit(b"done")
        await kv.close()
        print(result.outcome, flush=True)
    else:
        print("pushed", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture(params=["nccl", "mooncake", "ipc"])
def backend(request):
    """The backends that cross processes."""
    if request.param == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake or its libraries are missing", exc_type=ImportError)
    return request.param


@pytest.fixture
def send():
    """Starts a sending process."""
    processes = []

    def send(backend: str, grant: bytes, how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SENDER, backend, grant.hex(), how]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent))
        return processes[-1]

    yield send
    for process in processes:
        process.kill()
        process.communicate(timeout=30)


async def line_of(process: subprocess.Popen[str]) -> str:
    async with asyncio.timeout(60):
        return (await asyncio.to_thread(process.stdout.readline)).strip()


async def test_blocks_cross_from_one_process_to_another(backend, managers, send):
    pool = torch.zeros(64, 2, 3, 64)
    receiver = await managers(1, backend, pool)
    posted = receiver.post_receive("t", [50, 10])
    process = send(backend, posted.grant, "commit")
    async with asyncio.timeout(60):
        result = await posted.wait()
    assert (result.outcome, result.payload) == (Outcome.COMPLETED, b"done")
    assert torch.equal(pool[[50, 10]], torch.arange(64 * 384, dtype=torch.float32).view(64, 2, 3, 64)[[7, 3]])
    assert await line_of(process) == "Outcome.COMPLETED"


async def test_a_killed_sender_fails_its_transfer_and_the_blocks_come_back(backend, managers, send):
    receiver = await managers(1, backend, timeout_s=3)
    posted = receiver.post_receive("t", [50, 10])
    process = send(backend, posted.grant, "hang")
    assert await line_of(process) == "pushed"
    process.kill()
    async with asyncio.timeout(60):
        result = await posted.wait()
        assert result.outcome is not Outcome.COMPLETED
        assert result.error
        await posted.drained()
        while receiver.stats().num_quarantined:
            await asyncio.sleep(0.01)


async def test_blocks_of_a_frozen_one_sided_sender_stay_in_quarantine_until_it_is_gone(managers, send):
    pytest.importorskip("mooncake.engine", reason="Mooncake or its libraries are missing", exc_type=ImportError)
    receiver = await managers(1, "mooncake", timeout_s=2)
    posted = receiver.post_receive("t", [50, 10])
    process = send("mooncake", posted.grant, "hang")
    assert await line_of(process) == "pushed"
    os.kill(process.pid, signal.SIGSTOP)
    async with asyncio.timeout(60):
        assert (await posted.wait()).outcome is Outcome.UNKNOWN
    assert receiver.stats().num_quarantined == 1
    process.kill()
    async with asyncio.timeout(60):
        await posted.drained()
        while receiver.stats().num_quarantined:
            await asyncio.sleep(0.01)


async def test_a_receiver_that_is_gone_fails_the_send_by_its_address(backend, managers):
    sender, receiver = await managers(0, backend, timeout_s=2), await managers(1, backend, timeout_s=2)
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    await receiver.close()
    transfer.push([1], 0)
    async with asyncio.timeout(60):
        result = await transfer.commit()
    assert result.outcome is not Outcome.COMPLETED
    with pytest.raises(TransferFailed, match=receiver.address):
        await sender.open_send("t2", posted.grant)
