"""Senders that offer, and receivers that fetch, killed or frozen in every state of it, as real processes.

As in test_peer_deaths.py: what the survivor had lent must be back, and hold what it writes there then until the end.
"""

import asyncio
import signal

import pytest
import torch
from hbserve_kv_rig import Rig
from hbserve_kv_victims import BACKWARDS, IS_FREE, pattern

from hbserve_kv import Outcome

TIMEOUT_S = 2.0
ENDS = pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "frozen"])


@pytest.fixture(params=["nccl", "ipc"])
async def rig(request, monkeypatch):
    async with Rig(request.param, monkeypatch, timeout_s=TIMEOUT_S) as rig:
        yield rig


def end(victim, is_killed):
    victim.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)


async def thaw(victim, is_killed, has_commit=False):
    """It finds out by itself, and has its blocks back. One that has the commit takes it."""
    if not is_killed:
        victim.signal(signal.SIGCONT)
        victim.tell("go")
        assert await victim.heard("ended") != "COMPLETED" or has_commit
        await victim.closes_in_order()


async def lose_a_receiver(rig, state, is_killed):
    # Known elsewhere: vLLM #38027, #41383, #53095.
    victim, blocks = rig.start("" if state == "kept" else state), rig.new_blocks()
    rig.pool[blocks] = pattern(state)
    offer = rig.manager.offer(state, lease_s=60)
    offer.push(blocks)
    offer.commit()
    victim.tell("claim", state, rig.manager.address, rig.manager.epoch, state != "kept")
    await victim.heard("kept" if state == "kept" else "reached")
    end(victim, is_killed)
    result = await offer.wait()
    assert result.outcome is not Outcome.COMPLETED, state
    if result.outcome is Outcome.UNKNOWN:
        await offer.drained()
    rig.pool[blocks] = IS_FREE
    await thaw(victim, is_killed, has_commit=state == "before kv.commit")


@ENDS
async def test_a_receiver_that_ends_before_it_has_all_keeps_no_block_of_its_sender(rig, is_killed):
    states = ["kept", "before kv.fetch", "before kv.begin", "before kv.commit"]
    async with asyncio.timeout(60):
        await asyncio.gather(*(lose_a_receiver(rig, state, is_killed) for state in states))
    await rig.until_empty()


async def lose_a_sender(rig, state, is_killed):
    # Known elsewhere: vLLM #35943, #55870, #53250.
    victim, blocks = rig.start("" if state == "nothing offered" else state), rig.new_blocks()
    address, epoch = await victim.heard("address"), ""
    if state != "nothing offered":
        victim.tell("offer", state, 60.0)
        epoch = await victim.heard("offered")
    claim = rig.manager.claim(state, address, epoch)
    posted = claim.fetch(blocks)
    if state == "nothing offered":
        victim.tell("offer", "another", 0.0)  # has arrived after the claim, as nothing else would show
        await victim.heard("ended")
    else:
        await victim.heard("reached")
    end(victim, is_killed)
    result = await posted.wait()
    assert result.outcome is not Outcome.COMPLETED, state
    if result.outcome is Outcome.UNKNOWN:
        assert not is_killed or rig.must_ask
        if not is_killed:
            victim.signal(signal.SIGCONT)
            victim.tell("go")
        await posted.drained()
    rig.pool[blocks] = IS_FREE
    if state != "nothing offered":
        await thaw(victim, is_killed)


@ENDS
async def test_a_sender_that_ends_before_all_was_fetched_keeps_no_block_of_its_receiver(rig, is_killed):
    states = ["nothing offered", "before kv.fetch", "before kv.begin", "in mid-part"]
    if is_killed:  # one that goes on waits for another receiver
        states.append("before kv.keep")
    async with asyncio.timeout(60):
        await asyncio.gather(*(lose_a_sender(rig, state, is_killed) for state in states))
    await rig.until_empty()


async def test_a_sender_that_was_restarted_is_fetched_from_again_by_the_same_receiver(rig):
    blocks = rig.new_blocks()
    for life in range(3):
        victim = rig.start("")
        address = await victim.heard("address")
        victim.tell("offer", "t", 60.0)
        epoch = await victim.heard("offered")
        posted = rig.manager.claim("t", address, epoch).fetch(blocks)
        result = await posted.wait()
        assert result.outcome is Outcome.COMPLETED, (life, result.error)
        assert torch.equal(rig.pool[blocks], pattern("t"))
        rig.pool[blocks] = IS_FREE
        victim.signal(signal.SIGKILL)
    assert len(BACKWARDS) == len(blocks)
