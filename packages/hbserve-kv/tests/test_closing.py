"""A manager that is closed while its peers are dead or frozen waits for none of their deadlines."""

import asyncio
import signal

import hbserve_kv_victims as victims
import msgspec
import pytest
from hbserve_kv_rig import DEADLINE_S, Rig
from msgspec import structs

from hbserve_kv import Outcome, TransferFailed
from hbserve_kv.protocol.messages import Grant

LONG_S = 120.0
"""The timeout of all of them: twice what the test may take."""
STATES_AT_REST = ["before kv.begin", "before kv.commit"]
ENDS = pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "frozen"])


@pytest.fixture
async def rig(processes_backend, monkeypatch):
    async with Rig(processes_backend, monkeypatch, timeout_s=LONG_S) as rig:
        yield rig


@ENDS
async def test_closing_a_sender_waits_for_no_answer_of_receivers_that_are_dead_or_frozen(rig, is_killed):
    states = STATES_AT_REST  # over a two-sided transport a part may be under way before its commit
    sending = []
    for state in states:
        victim, blocks = rig.start(state), rig.new_blocks()
        victim.tell("receive", state)
        grant = await victim.heard("grant")
        sending.append(asyncio.create_task(victims.send(rig.manager, rig.pool, state, blocks, grant, abort=False)))
        await victim.heard("reached")
        victim.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        await rig.manager.close()
        ended = await asyncio.gather(*sending)
    assert ended[0].startswith("refused: transfer before kv.begin: ")
    assert ended[1:] == ["FAILED_DRAINED"] * (len(states) - 1)
    await rig.until_empty()


@ENDS
async def test_closing_a_receiver_waits_for_no_answer_of_senders_that_are_dead_or_frozen(rig, is_killed):
    states = ["before kv.link", *STATES_AT_REST, "in mid-part"]
    receiving = []
    for state in states:
        victim = rig.start(state)
        posted = rig.manager.post_receive(state, rig.new_blocks())
        receiving.append(asyncio.create_task(posted.wait()))
        victim.tell("send", state, posted.grant, False)
        await victim.heard("reached")
        victim.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        await rig.manager.close()
        ended = [(await each).outcome for each in receiving]
    assert Outcome.COMPLETED not in ended


async def test_closing_ends_a_send_that_asks_whether_its_receiver_was_restarted_and_begins_nothing_new(rig):
    victim, blocks = rig.start(""), rig.new_blocks()
    victim.tell("receive", "t")
    grant = await victim.heard("grant")
    assert await victims.send(rig.manager, rig.pool, "t", blocks, grant, abort=False) == "COMPLETED"
    victim.signal(signal.SIGSTOP)
    of_another_life = msgspec.msgpack.encode(
        structs.replace(msgspec.msgpack.decode(grant, type=Grant), epoch="another")
    )
    opening = asyncio.create_task(rig.manager.open_send("u", of_another_life))
    await asyncio.wait([opening], timeout=0.1)
    assert not opening.done()
    async with asyncio.timeout(DEADLINE_S):
        await rig.manager.close()
        with pytest.raises(TransferFailed, match="transfer u: the sender was closed"):
            await opening


@pytest.mark.parametrize("state", ["before kv.keep", "before kv.fetch"])
async def test_closing_a_receiver_waits_for_no_answer_of_a_frozen_sender_whose_offer_it_claims(rig, state):
    victim = rig.start(state)
    address = await victim.heard("address")
    victim.tell("offer", "t", 60.0)
    epoch = await victim.heard("offered")
    posted = rig.manager.claim("t", address, epoch).fetch(rig.new_blocks())
    await victim.heard("reached")
    victim.signal(signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        await rig.manager.close()
    assert (await posted.wait()).outcome is not Outcome.COMPLETED
