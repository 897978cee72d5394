"""Peers that are killed or frozen in every state of a transfer, as real processes.

Each test has one survivor, and beside it one victim for each state and one healthy peer, all at once. What the survivor
had lent to a transfer must be back within two heartbeats and a deadline, hold what the survivor writes there then until
the end, and meanwhile the healthy peer must not notice.
"""

import asyncio
import signal
from typing import Any

import hbserve_kv_victims as victims
import pytest
import torch
from hbserve_kv_rig import (
    HEARTBEAT_S,
    MOONCAKE_TIMEOUT_S,
    TEST_S,
    TIMEOUT_S,
    Clock,
    Rig,
    Victim,
    while_healthy_ones_go_on,
)
from hbserve_kv_victims import IS_FREE, Halt, pattern

from hbserve_kv import Link, Outcome, PostedReceive
from hbserve_kv.receiving.quarantine import ANSWER_TIMEOUT_S, GRACE_S

NOT_BEGUN = ["before kv.link", "connecting", "before kv.begin"]
BEGUN = ["after kv.begin", "in mid-part", "cancelled", "before kv.commit", "before kv.abandon"]
SENDER_STATES = [*NOT_BEGUN, *BEGUN, "after kv.commit"]
RECEIVER_STATES = [
    "granted", "before kv.link", "before kv.begin", "after kv.begin", "begun", "in mid-part", "before kv.commit",
    "after kv.commit",
]  # fmt: skip
ENDS = pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "frozen"])


@pytest.fixture
async def rig(processes_backend, monkeypatch):
    async with Rig(processes_backend, monkeypatch) as rig:
        yield rig


# ---- the sender dies -------------------------------------------------------------------------------------------------


async def lose_a_sender(rig: Rig, state: str, is_killed: bool) -> None:
    victim, blocks = rig.start("in mid-part" if state in ("cancelled", "quarantined") else state), rig.new_blocks()
    posted = rig.manager.post_receive(state, blocks)
    victim.tell("send", state, posted.grant, state == "before kv.abandon")
    await victim.heard("reached")
    if state == "quarantined":
        victim.signal(signal.SIGSTOP)
        assert (await posted.wait()).outcome is Outcome.UNKNOWN
    cancelling = asyncio.create_task(posted.cancel("not wanted")) if state == "cancelled" else None
    victim.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    clock = Clock(TIMEOUT_S + GRACE_S * rig.must_ask)
    if state in NOT_BEGUN:  # as a scheduler does
        assert await posted.cancel("its sender is gone") is Outcome.FAILED_DRAINED
    result = await posted.wait()
    if state == "after kv.commit":
        assert result.outcome is Outcome.COMPLETED, result.error
        assert torch.equal(rig.pool[blocks], pattern(state))
    else:
        assert result.outcome is not Outcome.COMPLETED, state
    if not is_killed and rig.must_ask and state in BEGUN:
        assert result.outcome is Outcome.UNKNOWN, f"{state}: a frozen process may go on writing"
        clock = await still_quarantined_when_it_goes_on(posted, victim)
    if result.outcome is Outcome.UNKNOWN:
        await posted.drained()
    clock.check(state)
    rig.pool[blocks] = IS_FREE
    if cancelling is not None:
        await cancelling
    if not is_killed:
        go_on(victim)
        ended = await victim.heard("ended")
        assert (ended == "COMPLETED") == (state == "after kv.commit"), f"{state}: {ended}"
        await victim.closes_in_order()


async def still_quarantined_when_it_goes_on(posted: PostedReceive, victim: Victim) -> "Clock":
    draining = asyncio.create_task(posted.drained())
    await asyncio.wait([draining], timeout=2 * HEARTBEAT_S)
    assert not draining.done(), "blocks came back that a frozen process may write to"
    go_on(victim)
    clock = Clock(TIMEOUT_S + GRACE_S)
    await draining
    return clock


def go_on(victim: Victim) -> None:
    victim.signal(signal.SIGCONT)
    victim.tell("go")


@ENDS
async def test_a_sender_that_is_killed_or_frozen_in_any_state_keeps_no_block_and_disturbs_no_other(rig, is_killed):
    healthy, blocks = rig.start(""), rig.new_blocks()

    async def transfer(name: str) -> None:
        posted = rig.manager.post_receive(name, blocks)
        healthy.tell("send", name, posted.grant, False)
        result = await posted.wait()
        assert result.outcome is Outcome.COMPLETED, result.error
        assert torch.equal(rig.pool[blocks], pattern(name)), name
        rig.pool[blocks] = IS_FREE
        await healthy.heard("ended")

    states = [*SENDER_STATES, *(["quarantined"] if is_killed and rig.must_ask else [])]
    await while_healthy_ones_go_on(transfer, [lose_a_sender(rig, state, is_killed) for state in states])
    await healthy.closes_in_order()
    await rig.until_empty()


async def lose_a_sender_of_a_grant(rig: Rig, state: str, is_killed: bool) -> None:
    victim, blocks = rig.start("" if state == "linked before" else state), rig.new_blocks()
    if state == "linked before":
        posted = rig.manager.post_receive("first", blocks, sender=victim.name)
        victim.tell("send", "first", posted.grant, False)
        assert await victim.heard("ended") == "COMPLETED"
        rig.pool[blocks] = IS_FREE
    posted = rig.manager.post_receive(state, blocks, sender=victim.name)
    if state != "linked before":
        victim.tell("send", state, posted.grant, False)
        await victim.heard("reached")
    victim.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    clock = Clock(TIMEOUT_S + 2 * ANSWER_TIMEOUT_S)
    result = await posted.wait()
    assert result.outcome is Outcome.FAILED_DRAINED
    assert result.error == f"its sender {victim.name!r} was lost before it began"
    clock.check(state)
    if not is_killed:
        go_on(victim)
        if state != "linked before":
            assert (await victim.heard("ended")).startswith("refused")
        await victim.closes_in_order()


@ENDS
async def test_a_sender_by_name_that_ends_before_it_begins_is_not_waited_for_until_the_grant_expires(rig, is_killed):
    async with asyncio.timeout(TEST_S), asyncio.TaskGroup() as tasks:
        for state in ["linked before", "connecting", "before kv.begin"]:
            tasks.create_task(lose_a_sender_of_a_grant(rig, state, is_killed))
    await rig.until_empty()


# ---- the receiver dies -----------------------------------------------------------------------------------------------


async def lose_a_receiver(rig: Rig, state: str, is_killed: bool, halts: dict[str, Halt]) -> None:
    survivor_halts = state in ("in mid-part", "quarantined") and rig.is_one_sided
    victim = rig.start("" if survivor_halts else state, expiry_s=1.0 if state == "quarantined" else 60.0)
    victim.tell("receive", state)
    grant, blocks = await victim.heard("grant"), rig.new_blocks()
    has_reached, goes_on = asyncio.Event(), asyncio.Event()
    if survivor_halts:
        loop = asyncio.get_running_loop()
        halts[state] = Halt("in mid-part", lambda: loop.call_soon_threadsafe(has_reached.set))

    async def opened() -> None:
        if state == "begun":
            has_reached.set()
            await goes_on.wait()

    sending: Any = victims.send(rig.manager, rig.pool, state, blocks, grant, abort=state == "begun", opened=opened)
    if state != "granted":
        sending = asyncio.create_task(sending)
        await (has_reached.wait() if survivor_halts or state == "begun" else victim.heard("reached"))
    if state == "quarantined":
        victim.tell("cancel", state)
        await victim.heard("unknown")
    victim.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    clock = Clock(MOONCAKE_TIMEOUT_S + GRACE_S if rig.backend == "mooncake" else TIMEOUT_S)
    goes_on.set()
    if survivor_halts:
        halts[state].go.set()
    assert await sending != "COMPLETED", state
    clock.check(state)
    if not is_killed:
        # A one-sided part needs no receiver: it goes on, and the commit follows.
        commits = ["before kv.commit", "after kv.commit", *(["in mid-part"] if survivor_halts else [])]
        await thaw_receiver(victim, state, may_have_commit=state in commits)


async def thaw_receiver(victim: Victim, state: str, *, may_have_commit: bool) -> None:
    go_on(victim)
    victim.tell("cancel", state)
    ended = await victim.heard("ended")
    # One that has the commit takes it. That its answer comes too late the scheduler hears of the sender, and aborts.
    assert ended != "corrupt", state
    assert ended != "COMPLETED" or may_have_commit, state
    await victim.closes_in_order()


@ENDS
async def test_a_receiver_that_is_killed_or_frozen_in_any_state_ends_the_send_and_not_those_to_others(
    rig, is_killed, monkeypatch
):
    healthy, blocks, halts = rig.start(""), rig.new_blocks(), dict[Any, Any]()
    monkeypatch.setattr(Link, "run", victims.halting_run(lambda part: halts.get(part.transfer_id) if part else None))

    async def transfer(name: str) -> None:
        healthy.tell("receive", name)
        grant = await healthy.heard("grant")
        assert await victims.send(rig.manager, rig.pool, name, blocks, grant, abort=False) == "COMPLETED"
        assert await healthy.heard("ended") == "COMPLETED"

    states = [
        *RECEIVER_STATES,
        *(["quarantined"] if rig.must_ask else []),
        *([] if rig.is_one_sided else ["connecting"]),
    ]
    await while_healthy_ones_go_on(transfer, [lose_a_receiver(rig, state, is_killed, halts) for state in states])
    await healthy.closes_in_order()
    await rig.until_empty()
