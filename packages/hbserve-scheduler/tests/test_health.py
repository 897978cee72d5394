"""In which state an instance is, who gets requests by it, and what instances say unasked."""

import asyncio
import logging

import pytest

from hbserve_rpc import Overloaded, RemoteError
from hbserve_rpc.messages import InstanceInfo, InstanceStatus
from hbserve_scheduler.health import Health


def info(status: InstanceStatus = "ready", epoch: str = "life 1") -> InstanceInfo:
    return InstanceInfo("p0", "prefill", epoch, status, error="it broke" if status == "failed" else "")


WAYS = {
    "loads": lambda health: health.answers(info("starting")),
    "serves": lambda health: health.answers(info("ready")),
    "ends": lambda health: health.answers(info("draining")),
    "fails": lambda health: health.answers(info("failed")),
    "is silent": lambda health: health.doubted("it was silent"),
    "is heard": lambda health: health.doubted(""),
    "is to drain": lambda health: health.drain("life 1"),
    "may serve": lambda health: health.drain(""),
    "comes again": lambda health: health.answers(info(epoch="life 2")),
    "is gone": lambda health: health.lost("it has ended"),
}


@pytest.mark.parametrize(
    ("ways", "states"),
    [
        ("loads serves is gone loads", "starting ready lost starting"),
        ("serves is silent is heard is silent is gone is heard", "ready suspect ready suspect lost lost"),
        ("serves is to drain is silent is gone", "ready draining draining lost"),
        ("serves is to drain may serve", "ready draining ready"),
        ("serves is silent is to drain", "ready suspect draining"),
        ("serves is to drain is gone comes again", "ready draining lost ready"),
        ("is to drain loads serves", "lost starting draining"),
        ("serves ends is gone", "ready draining lost"),
        ("loads fails is silent is gone", "starting failed failed lost"),
        ("is silent is heard", "lost lost"),
    ],
)
def test_the_ways_between_states_are_those_that_are_drawn(ways, states):
    health = Health()
    rest, found = ways, []
    while rest:
        way = next(each for each in WAYS if rest.startswith(each))
        rest = rest.removeprefix(way).lstrip()
        before = health.state
        assert WAYS[way](health) == (health.state != before)
        found.append(health.state)
    assert found == states.split()


def test_why_an_instance_has_failed_is_one_line_whatever_it_says():
    health = Health()
    health.answers(InstanceInfo("p0", "prefill", "life 1", "failed", error="CUDA\n\x1b[2Jerror" + "x" * 100_000))
    assert health.why.isprintable()
    assert health.why.startswith("CUDA \\x1b[2Jerror")
    assert len(health.why) < 4100


@pytest.fixture
async def four(make_instance):
    """p0, p1, d0 and d1 by their names."""
    return {
        f"{role[0]}{i}": await make_instance(role, f"{role[0]}{i}") for role in ("prefill", "decode") for i in (0, 1)
    }


@pytest.mark.parametrize("names", ["p0 p1", "d0 d1"])
async def test_one_that_is_silent_gets_no_request_and_keeps_those_that_it_has(
    make_scheduler, four, ask, collect, until, caplog, names
):
    caplog.set_level(logging.INFO)
    silent, other = (four[name] for name in names.split())
    silent.hold = other.hold = {"first" if silent.role == "prefill" else "tokens"}
    scheduler = await make_scheduler(*four.values(), heartbeat_timeout_s=60.0)
    streams = [scheduler.submit(ask(f"before-{i}")) for i in range(2)]
    await until(lambda: silent.requests and other.requests)
    handle = scheduler.fleet.handles[silent.instance_id]
    handle.client.on_doubt("it was silent for 3.0 s")
    assert (handle.status, scheduler.stats().instances[list(four).index(silent.instance_id)].status) == ("suspect",) * 2
    other.release()
    for number in range(4):
        end = (await collect(scheduler.submit(ask(f"{number}"))))[1]
        assert silent.instance_id not in (end.prefill_instance, end.decode_instance)
    assert len(silent.requests) == 1
    silent.release()
    for stream in streams:
        assert (await collect(stream))[1].num_attempts == 1
    handle.client.on_doubt("")
    said = [
        record.message for record in caplog.records if f"{silent.instance_id} at {silent.address} is" in record.message
    ]
    assert [each.partition(" is ")[2] for each in said] == ["ready", "suspect: it was silent for 3.0 s", "ready"]


async def test_where_all_are_silent_a_request_waits_for_one_that_is_heard_again(
    make_scheduler, pair, ask, collect, until
):
    scheduler = await make_scheduler(*pair, heartbeat_timeout_s=60.0, instance_wait_s=0.1)
    client = scheduler.fleet.handles["p0"].client
    client.on_doubt("its connection has ended")
    stream = scheduler.submit(ask())
    assert scheduler.fleet.may_serve(soon=True)
    assert not scheduler.fleet.has_room()
    assert scheduler.check(ask("longer")).request_id == "longer", "what it can take is known"
    client.on_doubt("")
    assert len((await collect(stream))[0]) == 4


async def test_one_that_was_taken_for_lost_and_is_there_is_ready_again(make_scheduler, pair, ask, collect, until):
    scheduler = await make_scheduler(*pair)
    scheduler.fleet.handles["d0"].lost("an item of a stream was lost")
    assert scheduler.fleet.handles["d0"].status == "lost"
    await until(lambda: scheduler.fleet.handles["d0"].status == "ready")
    await collect(scheduler.submit(ask()))


async def test_what_others_give_an_instance_counts_as_its_load(make_scheduler, four, ask, collect, until):
    scheduler = await make_scheduler(*four.values())
    handles = scheduler.fleet.handles
    four["p0"].others, four["d1"].others = (3, 5000), (3, 5000)
    await until(lambda: (handles["p0"].load, handles["d1"].load) == (5000, 3))
    for number in range(4):
        end = (await collect(scheduler.submit(ask(f"{number}"))))[1]
        assert (end.prefill_instance, end.decode_instance) == ("p1", "d0")
    four["p0"].others = four["d1"].others = 0, 0
    await until(lambda: (handles["p0"].load, handles["d1"].load) == (0, 0))


async def test_who_dies_has_nothing_of_others_any_more(make_scheduler, pair, until):
    scheduler, (prefill, _) = await make_scheduler(*pair), pair
    prefill.others = 1, 700
    handle = scheduler.fleet.handles["p0"]
    await until(lambda: handle.load == 700)
    prefill.others = 0, 0
    await prefill.server.stop()
    await until(lambda: handle.status == "lost")
    assert handle.load == 0


# ---- refusals ----------------------------------------------------------------------------------------------------


async def test_a_refused_place_is_no_attempt_and_another_instance_takes_the_request(make_scheduler, four, ask, collect):
    four["p0"].fail["first"] = [Overloaded("it has enough")] * 99
    scheduler = await make_scheduler(*four.values(), max_attempts=1)
    for number in range(3):
        tokens, end = await collect(scheduler.submit(ask(f"{number}")))
        assert (len(tokens), end.prefill_instance, end.num_attempts) == (4, "p1", 1)
    stats = scheduler.stats()
    assert stats.refusals >= 1
    assert (stats.retries, stats.failed_attempts) == (0, {})
    assert all(not record.attempts[0].error for record in scheduler.records(60))


async def test_where_all_refuse_a_request_waits_until_one_takes_it(make_scheduler, pair, ask, collect, until):
    pair[0].fail["first"] = [Overloaded("it has enough")] * 3
    scheduler = await make_scheduler(*pair, max_attempts=1)
    tokens, end = await collect(scheduler.submit(ask()))
    assert (len(tokens), end.num_attempts, scheduler.stats().refusals) == (4, 1, 3)


async def test_who_has_refused_is_not_asked_again_at_once(make_scheduler, pair, ask, collect, until, monkeypatch):
    monkeypatch.setattr("hbserve_scheduler.instances.REFUSED_S", 3600.0)
    pair[0].fail["first"] = [Overloaded("it has enough")]
    scheduler = await make_scheduler(*pair)
    stream = scheduler.submit(ask())
    await until(lambda: scheduler.fleet.handles["p0"].is_full and scheduler.retries.waiting)
    assert not scheduler.fleet.has_room()
    assert len(pair[0].requests) == 1
    scheduler.fleet.handles["p0"]._may_be_asked()
    await collect(stream)


async def test_a_failure_after_the_first_token_is_an_attempt_whatever_it_is_called(make_scheduler, four, ask, collect):
    for name in ("d0", "d1"):
        four[name].fail["tokens"] = [Overloaded("it has enough")]
    scheduler = await make_scheduler(*four.values())
    _, end = await collect(scheduler.submit(ask()))
    assert (end.num_attempts, scheduler.stats().refusals, scheduler.stats().retries) == (3, 0, 2)


async def test_reports_that_end_are_asked_for_again(make_scheduler, pair, until):
    scheduler, (prefill, _) = await make_scheduler(*pair), pair
    reports = prefill._reports
    asked: list[float] = []

    async def short(request):
        asked.append(asyncio.get_running_loop().time())
        events = reports(request)
        yield await anext(events)
        if len(asked) < 3:
            raise RemoteError("out of luck")
        async for event in events:
            yield event

    prefill._reports = short
    await prefill.restart()
    await until(lambda: len(asked) == 3 and scheduler.fleet.handles["p0"].status == "ready")


async def test_figures_of_all_do_not_wait_for_one_that_is_not_there(make_scheduler, pair, until, monkeypatch):
    monkeypatch.setattr("hbserve_scheduler.fleet.REFRESH_TIMEOUT_S", 3600.0)
    scheduler, (prefill, decode) = await make_scheduler(*pair, heartbeat_timeout_s=3600.0), pair
    await decode.server.stop()
    await until(lambda: scheduler.fleet.handles["d0"].status == "lost")
    prefill.free_blocks = 77
    async with asyncio.timeout(30):
        await scheduler.refresh()
    assert [each.free_blocks for each in scheduler.stats().instances] == [77, 0]
