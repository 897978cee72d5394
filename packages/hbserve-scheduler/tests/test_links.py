"""Links are there before a request needs them, and never stand in the way of one."""

import asyncio
import itertools
import logging
from collections import Counter
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest

from hbserve_rpc import RemoteError
from hbserve_scheduler import RequestFailed, links
from hbserve_scheduler.policies import SPARE_REQUESTS, connected_first


@pytest.fixture
async def instances(make_instance):
    """p0, p1, d0 and d1 by their names."""
    return {
        name: await make_instance(role, name)
        for role in ("prefill", "decode")
        for name in (f"{role[0]}0", f"{role[0]}1")
    }


def asked(journal) -> list[tuple[str, str]]:
    """Prefill and decode instance of each question, in their order."""
    return [(who, what.removeprefix("connect ")) for who, what in journal if what.startswith("connect")]


async def test_every_pair_is_connected_before_a_request_comes(make_scheduler, instances, ask, collect):
    scheduler = await make_scheduler(*instances.values())
    endpoints = {instances[name].kv_endpoint for name in ("d0", "d1")}
    for name in ("p0", "p1"):
        assert set(instances[name].connected) == endpoints
        assert instances[name].requests == []
    await collect(scheduler.submit(ask()))


async def test_each_instance_has_as_many_links_ahead_as_it_may(make_scheduler, make_instance, journal, until):
    names = ["p0", "p1", "p2", "d0", "d1", "d2", "d3", "d4"]
    several = [await make_instance("prefill" if name[0] == "p" else "decode", name) for name in names]
    scheduler = await make_scheduler(*several, ready=False, max_warm_links=2)
    await scheduler.wait_ready(30)
    await until(lambda: len(asked(journal)) == 6)
    prefills, decodes = (Counter(names) for names in zip(*set(asked(journal)), strict=True))
    assert set(prefills.values()) == {2}
    assert max(decodes.values()) == 2


async def test_no_link_is_made_ahead_where_none_is_wanted(make_scheduler, pair, journal, ask, collect):
    scheduler = await make_scheduler(*pair, max_warm_links=0)
    await collect(scheduler.submit(ask()))
    assert asked(journal) == []
    assert scheduler.fleet.handles["p0"].links == {pair[1].server.epoch: True}, "as the request has shown"


@pytest.mark.parametrize("how", ["silent", "refusing"])
async def test_a_peer_that_cannot_be_connected_keeps_nobody_from_being_ready(
    make_scheduler, pair, ask, collect, until, journal, how
):
    prefill, _ = pair
    if how == "silent":
        prefill.hold = {"connect d0"}
    else:
        prefill.fail["connect d0"] = [RemoteError("no connection")] * 99
    scheduler = await make_scheduler(*pair, ready=False)
    await scheduler.wait_ready(30)
    await until(lambda: asked(journal))
    assert scheduler.info().ready
    assert len((await collect(scheduler.submit(ask())))[0]) == 4, "who knows better is the request itself"


async def test_a_peer_that_cannot_be_connected_is_asked_for_ever_more_rarely_and_told_once(
    make_scheduler, pair, journal, until, monkeypatch, caplog
):
    monkeypatch.setattr(links, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(links, "LONGEST_PAUSE_S", 0.4)
    caplog.set_level(logging.WARNING)
    prefill, decode = pair
    prefill.fail["connect d0"] = [RemoteError("no connection to d0")] * 5
    times_s: list[float] = []
    phase = prefill._phase

    async def timed(name):
        if name.startswith("connect"):
            times_s.append(asyncio.get_running_loop().time())
        await phase(name)

    prefill._phase = timed
    scheduler = await make_scheduler(*pair, ready=False)
    await until(lambda: scheduler.fleet.handles["p0"].links == {decode.server.epoch: False})
    await until(lambda: scheduler.fleet.handles["p0"].links == {decode.server.epoch: True})
    pauses_s = [after - before for before, after in itertools.pairwise(times_s)]
    expected_s = [0.05, 0.1, 0.2, 0.4, 0.4]
    assert len(pauses_s) == len(expected_s)
    assert all(pause_s >= least_s for pause_s, least_s in zip(pauses_s, expected_s, strict=True))
    assert [record.message for record in caplog.records if "connect" in record.message] == [
        "p0 cannot connect to d0; still trying: no connection to d0",
        "p0 is connected to d0",
    ]


async def test_a_link_is_looked_at_again_although_nobody_uses_it(make_scheduler, pair, journal, until, monkeypatch):
    # Known elsewhere: SGLang #9926.
    monkeypatch.setattr(links, "CHECK_S", 0.05)
    pair[0].fail["connect d0"] = []
    scheduler = await make_scheduler(*pair)
    pair[0].fail["connect d0"] = [RemoteError("it broke")]
    await until(lambda: scheduler.fleet.handles["p0"].links == {pair[1].server.epoch: False})
    await until(lambda: scheduler.fleet.handles["p0"].links == {pair[1].server.epoch: True})


@pytest.mark.parametrize("restarted", ["p0", "d0"])
async def test_a_restarted_instance_is_connected_again_and_its_earlier_life_forgotten(
    make_scheduler, instances, until, restarted
):
    scheduler = await make_scheduler(*instances.values())
    before = instances[restarted].server.epoch
    instances["p0"].connected.clear()
    await instances[restarted].restart()
    await until(lambda: instances["d0"].kv_endpoint in instances["p0"].connected)
    decodes = {instances[name].server.epoch for name in ("d0", "d1")}
    for name in ("p0", "p1"):
        await until(lambda name=name: scheduler.fleet.handles[name].links == dict.fromkeys(decodes, True))
    assert before not in {epoch for pair in scheduler.fleet.links._keeping for epoch in pair}
    assert len(scheduler.fleet.links._keeping) == 4
    # Nobody asks for the life that has ended either.
    await until(lambda: sum("_keep" in repr(task.get_coro()) for task in asyncio.all_tasks()) == 4)


async def test_a_restarted_prefill_instance_is_not_taken_for_connected_as_it_was_before(make_scheduler, pair, until):
    scheduler, (prefill, decode) = await make_scheduler(*pair), pair
    handle, before = scheduler.fleet.handles["p0"], prefill.server.epoch
    assert handle.links == {decode.server.epoch: True}
    prefill.hold = {"connect d0"}
    await prefill.restart()
    await until(lambda: handle.epoch not in ("", before))
    assert handle.links == {}
    prefill.release()
    await until(lambda: handle.links == {decode.server.epoch: True})


async def test_an_instance_that_joins_is_connected_and_one_that_leaves_is_no_more(
    make_scheduler, make_instance, pair, until
):
    scheduler = await make_scheduler(*pair)
    late = await make_instance("decode", "d1")
    await scheduler.add_instance("d1", "decode", late.address)
    await until(lambda: late.kv_endpoint in pair[0].connected)
    await until(lambda: len(scheduler.fleet.handles["p0"].links) == 2)
    await scheduler.remove_instance("d1")
    assert list(scheduler.fleet.handles["p0"].links) == [pair[1].server.epoch]
    assert len(scheduler.fleet.links._keeping) == 1


async def test_a_pair_that_is_connected_is_preferred_until_it_has_much_more_work(
    make_scheduler, make_instance, ask, collect, until
):
    prefill, warm, cold = [
        await make_instance(*each) for each in (("prefill", "p0"), ("decode", "d0"), ("decode", "d1"))
    ]
    prefill.hold, warm.hold, cold.hold = {"connect d1"}, {"tokens"}, {"tokens"}
    scheduler = await make_scheduler(prefill, warm, cold, ready=False)
    await scheduler.wait_ready(30)
    await until(lambda: scheduler.fleet.handles["p0"].links == {warm.server.epoch: True})
    streams = []
    for number in range(SPARE_REQUESTS + 1):
        streams.append(scheduler.submit(ask(f"r{number}")))
        await anext(streams[-1])
    assert (len(warm.requests), len(cold.requests)) == (SPARE_REQUESTS + 1, 0)
    streams.append(scheduler.submit(ask("one-more")))
    await anext(streams[-1])
    assert len(cold.requests) == 1, "to wait would cost more than to connect"
    await until(
        lambda: scheduler.fleet.handles["p0"].links.get(cold.server.epoch),
    )
    for instance in (prefill, warm, cold):
        instance.release()
    await asyncio.gather(*map(collect, streams))


async def test_a_prefill_instance_that_is_connected_is_preferred(make_scheduler, make_instance, ask, collect, until):
    cold, warm, decode = [
        await make_instance(*each) for each in (("prefill", "p0"), ("prefill", "p1"), ("decode", "d0"))
    ]
    cold.fail["connect d0"] = [RemoteError("no connection")] * 99
    scheduler = await make_scheduler(cold, warm, decode, ready=False)
    await scheduler.wait_ready(30)
    epoch = decode.server.epoch
    await until(
        lambda: [scheduler.fleet.handles[name].links for name in ("p0", "p1")] == [{epoch: False}, {epoch: True}]
    )
    for number in range(4):
        await collect(scheduler.submit(ask(f"r{number}")))
    assert (len(cold.requests), len(warm.requests)) == (0, 4)


async def test_a_link_is_in_doubt_after_a_failure_until_something_has_gone_over_it(
    make_scheduler, pair, ask, collect, until
):
    scheduler = await make_scheduler(*pair, max_attempts=1)
    known = scheduler.fleet.handles["p0"].links
    assert known == {pair[1].server.epoch: True}
    pair[0].fail["first"] = [RemoteError("KV transfer failed")]
    with pytest.raises(RequestFailed, match="KV transfer failed"):
        await collect(scheduler.submit(ask("fails")))
    assert known == {}
    await collect(scheduler.submit(ask("next")))
    await until(lambda: known == {pair[1].server.epoch: True})


def test_those_that_are_connected_come_first_then_those_that_are_not_yet():
    def chosen(*candidates: tuple[bool | None, int]) -> list[tuple[bool | None, int]]:
        handles: list[Any] = [SimpleNamespace(link=link, load=load) for link, load in candidates]
        first: list[Any] = connected_first(handles, attrgetter("link"), 10)
        return [(each.link, each.load) for each in first]

    assert chosen((True, 7), (None, 0), (False, 0), (True, 9)) == [(True, 7), (True, 9)]
    assert chosen((None, 7), (False, 0)) == [(None, 7)]
    assert chosen((False, 7), (False, 0)) == [(False, 7), (False, 0)]
    most = 10 * SPARE_REQUESTS
    assert chosen((True, most), (None, 0), (False, 0)) == [(True, most)]
    assert chosen((True, most + 1), (None, 0), (None, 1), (False, 0)) == [(None, 0)], "only where it pays"
    assert chosen((True, most + 1), (False, 0)) == [(True, most + 1)], "there is nothing to be gained"


async def test_instances_that_come_later_are_looked_at_together_and_give_nobody_more_links_than_it_may_have(
    monkeypatch,
):
    kept: list[str] = []

    async def keep(_: Any, prefill: Any, decode: Any) -> None:
        kept.append(decode.epoch)
        await asyncio.Event().wait()

    looked: list[links.Links] = []
    update = links.Links._update

    def noting(self: links.Links) -> None:
        looked.append(self)
        update(self)

    monkeypatch.setattr(links.Links, "_keep", keep)
    monkeypatch.setattr(links.Links, "_update", noting)
    handles: dict[str, Any] = {}
    held = links.Links(handles, most=3)
    for names, num_links in (["p", "d0"], 1), (["d1", "d2", "d3", "d4", "d5"], 3), (["d6"], 3):
        looked.clear()
        for name in names:
            role = "prefill" if name == "p" else "decode"
            info = SimpleNamespace(kv_endpoint=b"" if name == "p" else b"there")
            handles[name] = SimpleNamespace(epoch=name, status="ready", role=role, links={}, info=info)
            held.update()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (len(looked), len(kept)) == (1, num_links)
    await held.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
