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
from hbserve_kv.testing import is_empty

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


RECEIVER = """
import asyncio, sys
import torch
from hbserve_kv import KVTransferConfig, KVTransferManager
async def main():
    config = KVTransferConfig(backend=sys.argv[1], buffer_size=1 << 20, timeout_s=3)
    kv = KVTransferManager(rank=1, pool=torch.zeros(64, 2, 3, 64), fingerprint={"model": "m"}, config=config)
    await kv.start()
    posted = kv.post_receive("t", [50, 10])
    print(posted.grant.hex(), flush=True)
    print((await posted.wait()).outcome, flush=True)
    if (await posted.wait()).outcome.name == "UNKNOWN":
        await posted.drained()
    while kv.stats().num_quarantined or kv.stats().active_transfers:
        await asyncio.sleep(0.01)
    print("empty", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
STATES = ["granted", "begun", "pushed"]


@pytest.fixture
def receive():
    """Starts a receiving process."""
    processes = []

    def receive(backend: str) -> subprocess.Popen[str]:
        processes.append(subprocess.Popen([sys.executable, "-c", RECEIVER, backend], stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield receive
    for process in processes:
        process.kill()
        process.communicate(timeout=30)


async def until_empty(*managers):
    async with asyncio.timeout(30):
        while not all(is_empty(manager) for manager in managers):
            await asyncio.sleep(0.01)


async def healthy_pair_goes_on(sender, receiver):
    """A transfer to another peer takes no longer than it should while one is dead or frozen."""
    for number in range(5):
        posted = receiver.post_receive(f"healthy{number}", [number])
        async with asyncio.timeout(2):
            transfer = await sender.open_send(f"healthy{number}", posted.grant)
            transfer.push([number], 0)
            assert (await transfer.commit()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_receiver_that_is_killed_or_frozen_in_any_state_ends_the_send_and_not_those_to_others(
    backend, managers, receive, what
):
    sender, other = await managers(0, backend, timeout_s=2), await managers(2, backend, timeout_s=2)
    await healthy_pair_goes_on(sender, other)
    processes = {state: receive(backend) for state in STATES}
    for state, process in processes.items():
        grant = bytes.fromhex(await line_of(process))
        transfer = None
        if state != "granted":
            transfer = await sender.open_send("t", grant)
        if state == "pushed":
            transfer.push([7, 3], 0)
            async with asyncio.timeout(20):
                while not transfer._num_parts:
                    await asyncio.sleep(0.01)
        os.kill(process.pid, what)
        async with asyncio.timeout(20):
            if transfer is None:
                with pytest.raises(TransferFailed):
                    await sender.open_send("t", grant)
            else:
                if state == "begun":
                    transfer.push([7, 3], 0)
                outcome = (await transfer.commit()).outcome
                assert outcome in (Outcome.FAILED_DRAINED, Outcome.UNKNOWN), state
                await transfer.drained()
        await healthy_pair_goes_on(sender, other)
    await until_empty(sender, other)
    if what == signal.SIGSTOP:
        for process in processes.values():
            os.kill(process.pid, signal.SIGCONT)
        for state in ("begun", "pushed"):
            assert (await line_of(processes[state])) != "Outcome.COMPLETED"
            assert await line_of(processes[state]) == "empty", "the blocks of one that thaws come back"


async def test_a_sender_that_thaws_gives_the_quarantined_blocks_back_without_dying(managers, send):
    receiver = await managers(1, "ipc", timeout_s=2)
    posted = receiver.post_receive("t", [50, 10])
    process = send("ipc", posted.grant, "hang")
    assert await line_of(process) == "pushed"
    os.kill(process.pid, signal.SIGSTOP)
    async with asyncio.timeout(60):
        assert (await posted.wait()).outcome is Outcome.UNKNOWN
        os.kill(process.pid, signal.SIGCONT)
        await posted.drained()
    assert process.poll() is None
    await until_empty(receiver)
