"""Hosts that vanish in the midst of a transfer and come back: packets are lost, and nobody is told.

A killed or frozen process leaves a kernel that answers for it; here none does. And what a kernel has taken of a part
that was given up it sends when the network is there again, however late: by then the blocks are another request's.
"""

import asyncio
import time
from pathlib import Path

import hbserve_kv_victims as victims
import pytest
import torch
from hbserve_kv_rig import MOONCAKE_TIMEOUT_S, TIMEOUT_S, Clock, Rig, Victim, while_healthy_ones_go_on
from hbserve_kv_victims import IS_FREE, Halt, pattern

from hbserve_kv import Link, Outcome, TransferFailed
from hbserve_testing.narrowing import present

HOSTS = {"here": "10.78.0.1", "healthy": "10.78.0.2", "vanishing": "10.78.0.3"}
RETURN_S = 60.0
"""How long a kernel may take to try again, after it has waited longer and longer, and a breaker to let us."""

pytestmark = [
    pytest.mark.netns,
    pytest.mark.parametrize("processes_backend", ["nccl", "mooncake"], indirect=True),  # those that cross hosts
]


@pytest.fixture
def network(make_network):
    return make_network(HOSTS)


@pytest.fixture
async def rig(processes_backend, network, monkeypatch):
    with victims.inside(network.namespace("here")):
        async with Rig(processes_backend, monkeypatch, HOSTS["here"]) as rig:
            yield rig


def start(rig: Rig, network, host: str, point: str = "") -> Victim:
    return rig.start(point, where=network.namespace(host), host=HOSTS[host])


def unsent_bytes(process_id: int) -> int:
    """What the kernel has taken on this process's host and the other side has not acknowledged."""
    rows = Path(f"/proc/{process_id}/net/tcp").read_text().splitlines()[1:]
    return sum(int(row.split()[4].partition(":")[0], 16) for row in rows)


async def until_all_is_sent(process_id: int) -> None:
    async with asyncio.timeout(RETURN_S):
        while unsent_bytes(process_id):
            await asyncio.sleep(0.05)


async def receive(rig: Rig, sender: Victim, name: str, blocks: list[int]) -> str:
    posted = rig.manager.post_receive(name, blocks)
    sender.tell("send", name, posted.grant, False)
    ended = await sender.heard("ended")
    if ended.startswith("refused"):  # it has not noticed yet that it is not known here any more
        assert await posted.cancel("refused") is Outcome.FAILED_DRAINED
        return ended
    result = await posted.wait()
    assert result.outcome.name == ended, (result, ended)
    if result.outcome is Outcome.COMPLETED:
        assert torch.equal(rig.pool[blocks], pattern(name)), name
    rig.pool[blocks] = IS_FREE
    return ended


async def test_a_sender_whose_host_vanishes_and_comes_back_writes_into_no_block_that_was_given_back(rig, network):
    # Known elsewhere: vLLM #32255, SGLang #24527, #27372, #32564, #35049, #37077, #38961, Mooncake #4247.
    healthy, places = start(rig, network, "healthy"), rig.new_blocks()
    sender, blocks = start(rig, network, "vanishing", "in mid-part"), rig.new_blocks()

    async def transfer(name: str) -> None:
        assert await receive(rig, healthy, name, places) == "COMPLETED"

    async def vanish() -> None:
        posted = rig.manager.post_receive("t", blocks)
        sender.tell("send", "t", posted.grant, False)
        await sender.heard("reached")
        network.cut("vanishing")
        clock = Clock(TIMEOUT_S)
        sender.tell("go")
        assert (await posted.wait()).outcome is Outcome.FAILED_DRAINED
        clock.check("vanished")
        rig.pool[blocks] = IS_FREE
        assert await sender.heard("ended") != "COMPLETED"
        assert unsent_bytes(present(sender.process.pid)) > 0, "or this test shows nothing"
        network.mend("vanishing")
        await until_all_is_sent(present(sender.process.pid))
        await asyncio.sleep(0.5)
        assert (rig.pool[blocks] == IS_FREE).all()
        began_s = time.monotonic()
        while await receive(rig, sender, "again", blocks) != "COMPLETED":
            assert time.monotonic() < began_s + RETURN_S
            await asyncio.sleep(0.1)

    await while_healthy_ones_go_on(transfer, [vanish()])
    for process in (healthy, sender):
        await process.closes_in_order()
    await rig.until_empty()


async def test_a_receiver_whose_host_vanishes_keeps_no_block_and_is_sent_to_again_when_it_is_back(
    rig, network, monkeypatch
):
    healthy, places = start(rig, network, "healthy"), rig.new_blocks()
    receiver, blocks, has_reached = start(rig, network, "vanishing"), rig.new_blocks(), asyncio.Event()
    loop = asyncio.get_running_loop()
    halt = Halt("in mid-part", lambda: loop.call_soon_threadsafe(has_reached.set))
    halting = victims.halting_run(lambda part: halt if part and part.transfer_id == "t" else None)
    monkeypatch.setattr(Link, "run", halting)

    async def send(victim: Victim, name: str, blocks: list[int]) -> str:
        victim.tell("receive", name)
        grant = await victim.heard("grant")
        return await victims.send(rig.manager, rig.pool, name, blocks, grant, abort=False)

    async def transfer(name: str) -> None:
        assert await send(healthy, name, places) == "COMPLETED"
        assert await healthy.heard("ended") == "COMPLETED"

    async def vanish() -> None:
        sending = asyncio.create_task(send(receiver, "t", blocks))
        await has_reached.wait()
        network.cut("vanishing")
        clock = Clock(MOONCAKE_TIMEOUT_S if rig.is_one_sided else TIMEOUT_S)
        halt.go.set()
        assert await sending != "COMPLETED"
        clock.check("vanished")
        assert await receiver.heard("ended") == "FAILED_DRAINED"
        network.mend("vanishing")
        began_s = time.monotonic()
        for number in range(1000):
            ended = await send(receiver, f"again {number}", blocks)
            if ended == "COMPLETED":
                break
            receiver.tell("cancel", f"again {number}")
            assert await receiver.heard("ended") == "FAILED_DRAINED"
            assert time.monotonic() < began_s + RETURN_S, ended
            await asyncio.sleep(0.1)
        assert await receiver.heard("ended") == "COMPLETED"

    await while_healthy_ones_go_on(transfer, [vanish()])
    for process in (healthy, receiver):
        await process.closes_in_order()
    await rig.until_empty()


async def test_a_receiver_whose_host_vanishes_while_it_is_met_is_given_up_in_time(rig, network, monkeypatch):
    receiver, blocks = start(rig, network, "vanishing"), rig.new_blocks()
    (transport,) = rig.manager._transports.values()
    connect, clocks = transport.connect, list[Clock]()

    async def vanish(link: Link) -> None:
        network.cut("vanishing")  # another process, for which a busy machine takes its time
        clocks.append(Clock(TIMEOUT_S))
        await connect(link)

    receiver.tell("receive", "t")
    grant = await receiver.heard("grant")
    monkeypatch.setattr(transport, "connect", vanish)
    with pytest.raises(TransferFailed, match=f"does not answer within {TIMEOUT_S:.3g} s"):
        await rig.manager.open_send("t", grant)
    (clock,) = clocks
    clock.check("vanished while it was met")
    monkeypatch.undo()
    network.mend("vanishing")
    async with asyncio.timeout(RETURN_S):
        while await victims.send(rig.manager, rig.pool, "t", blocks, grant, abort=False) != "COMPLETED":
            await asyncio.sleep(0.1)
    assert await receiver.heard("ended") == "COMPLETED"
    await receiver.closes_in_order()
    await rig.until_empty()
