"""A rank on the CPU that waits for one that is dead or frozen goes on once the group is closed, whatever Gloo does."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hbserve_core import InstanceConfig, RankFailed
from hbserve_core.model.shard import Shard
from hbserve_core.ranks import distributed_group
from hbserve_core.ranks.distributed_group import DistributedRankGroup, host_store
from hbserve_core.ranks.workers import Workers
from hbserve_testing.processes import state_of, strike
from hbserve_testing.waits import until

pytestmark = pytest.mark.warm

END_WITHIN_S = 5.0
GIVES_UP_S = 20.0
"""Gloo: whoever waits for it in vain fails a test by its own time. No signal ends a wait of its destructors."""
NUM_FLOATS = 64 << 20
"""A quarter of a gigabyte: more than sockets hold."""
FOLLOWER = """
import os, signal, sys, threading, torch
from hbserve_core.model.shard import Shard
from hbserve_core.ranks import distributed_group
from hbserve_core.ranks.distributed_group import DistributedRankGroup, reach_store
group = DistributedRankGroup(Shard(1, 2), torch.device("cpu"), reach_store(int(sys.argv[1])), seed=0)
group.connect()
values = torch.zeros(int(sys.argv[2]))
threading.Thread(target=group.from_first, args=(values,), daemon=True).start()
while not values[0]:
    pass
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[DistributedRankGroup]:
    """Rank 0 of two, which is alone yet."""
    monkeypatch.setattr(distributed_group, "COLLECTIVE_TIMEOUT_S", GIVES_UP_S)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    made: Any = DistributedRankGroup(Shard(0, 2), torch.device("cpu"), host_store(listening.detach(), port), seed=0)
    made.port = port
    yield made
    made.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_wait_for_a_rank_that_ended_in_the_middle_of_a_message_ends_with_the_group(group, end):
    """Gloo forgets the message when the connection ends, and who waits for it."""
    command = [sys.executable, "-c", FOLLOWER, str(group.port), str(NUM_FLOATS)]
    follower = subprocess.Popen(command)  # noqa: ASYNC220
    try:
        await asyncio.to_thread(group.connect)
        waiting = asyncio.create_task(asyncio.to_thread(group.from_first, torch.ones(NUM_FLOATS)))
        await until(lambda: state_of(follower.pid) == "T")
        strike(follower.pid, end)
        begin_s = time.monotonic()
        group.close()
        with pytest.raises(RankFailed):
            await waiting
        group._process_group = None  # its last user waits for what is under way
        gc.collect()
        assert time.monotonic() - begin_s < END_WITHIN_S
    finally:
        follower.kill()
        follower.wait()


async def test_a_wait_for_a_rank_that_never_comes_ends_with_the_group(group):
    connecting = asyncio.create_task(asyncio.to_thread(group.connect))
    await asyncio.sleep(0)
    begin_s = time.monotonic()
    group.close()
    with pytest.raises(RankFailed, match="the ranks are being closed"):
        await connecting
    assert time.monotonic() - begin_s < END_WITHIN_S


def test_a_rank_that_is_killed_before_all_are_connected_is_named(model_folder, monkeypatch):
    given = InstanceConfig(model_path=str(model_folder("qwen3")), device="cpu", num_blocks=50, tensor_parallel_size=2)
    workers = Workers(given, on_failure=lambda _: None)
    (pid,) = workers.pids
    connect, killed_s = DistributedRankGroup.connect, 0.0

    def kill_and_connect(group: DistributedRankGroup) -> None:
        nonlocal killed_s
        killed_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        connect(group)

    monkeypatch.setattr(DistributedRankGroup, "connect", kill_and_connect)
    try:
        named = rf"rank 1 of 2 \(pid {pid}\) was ended by SIGKILL"
        with pytest.raises(RankFailed, match=named), workers.naming_the_lost_rank():
            workers.join()
        assert time.monotonic() - killed_s < END_WITHIN_S
    finally:
        workers.close()
