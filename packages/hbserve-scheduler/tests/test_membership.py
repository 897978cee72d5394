"""Instances join a running scheduler, are drained, and leave it; all schedulers of the same instances hear so."""

import asyncio
from typing import Any

import pytest

from hbserve_rpc import InvalidRequest, Overloaded, RemoteError
from hbserve_scheduler import RemoteScheduler, SchedulerServer, membership


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(membership, "LOOK_S", 0.01)
    monkeypatch.setattr(membership, "DESCRIBE_TIMEOUT_S", 0.3)


@pytest.fixture
async def serve(make_scheduler, until):
    """Makes a SchedulerServer of instances, and a client of it."""
    made: list[Any] = []

    async def make(*instances: Any, **options: Any) -> tuple[SchedulerServer, RemoteScheduler]:
        scheduler = await make_scheduler(*instances, starts=False, **options)
        server = SchedulerServer(scheduler)
        await server.start()
        remote = RemoteScheduler(server.address)
        await remote.start()
        made.append((server, remote))
        await scheduler.wait_ready(30)
        return server, remote

    yield make
    for server, remote in made:
        await until(lambda server=server: not server.scheduler.running_requests)
        await remote.stop()
        await server.stop()


async def test_an_instance_joins_by_its_address_and_says_itself_what_it_is(
    serve, make_instance, pair, ask, collect, until
):
    server, remote = await serve(pair[0])
    info = await remote.join(pair[1].address)
    assert (info.instance_id, info.role, info.epoch) == ("d0", "decode", pair[1].server.epoch)
    assert (await collect(remote.submit(ask())))[1].decode_instance == "d0"
    by_another_name = pair[1].address.replace("127.0.0.1", "localhost")
    for address in (pair[1].address, by_another_name):
        assert (await remote.join(address)).instance_id == "d0", "once more changes nothing"
    assert [(each.instance_id, each.address) for each in server.members.members()] == [
        (each.instance_id, each.address) for each in pair
    ]


async def test_what_cannot_join_is_told_to_whoever_asks(serve, make_instance, pair, free_ports):
    _, remote = await serve(*pair)
    with pytest.raises(InvalidRequest, match=r"address: 'nowhere': expected HOST:PORT"):
        await remote.join("nowhere")
    with pytest.raises(
        RemoteError, match=r":\d+: no answer to instance.describe within 0.3 s; .*: nothing .* listens there"
    ):
        await remote.join(f"127.0.0.1:{free_ports(1)[0]}")
    other = await make_instance("prefill", "p0")
    with pytest.raises(InvalidRequest, match=f"p0 at {other.address}: {pair[0].address} has this id and is in use"):
        await remote.join(other.address)
    with pytest.raises(InvalidRequest, match="instance_id='p9': no instance has it; there are: p0, d0"):
        await remote.drain("p9")
    with pytest.raises(InvalidRequest, match="instance_id='p9'"):
        await remote.drain("p9", leaves=True)


async def test_one_that_is_removed_as_soon_as_it_was_told_to_leave_has_left(serve, pair):
    server, _ = await serve(*pair)
    server.members.leave("d0")
    await server.members.remove("d0")
    async with asyncio.timeout(30):
        assert await server.members.until_left("d0")


async def test_one_that_comes_back_at_another_address_takes_the_place_of_the_one_that_was_lost(
    serve, make_instance, pair, ask, collect, until
):
    server, remote = await serve(*pair)
    await pair[0].server.stop()
    await until(lambda: server.scheduler.fleet.handles["p0"].status == "lost")
    other = await make_instance("prefill", "p0")
    await remote.join(other.address)
    await collect(remote.submit(ask()))
    assert len(other.requests) == 1


async def test_a_drained_instance_finishes_what_it_has_and_gets_nothing_new_until_its_next_life(
    serve, make_instance, pair, ask, collect, until
):
    other = await make_instance("decode", "d1")
    server, remote = await serve(*pair, other)
    handles = server.scheduler.fleet.handles
    drained = pair[1]
    drained.hold = other.hold = {"tokens"}
    streams = [server.scheduler.submit(ask(f"before-{i}")) for i in range(2)]
    await until(lambda: drained.requests and other.requests)
    await remote.drain("d0")
    await remote.join(drained.address, again=False)  # it registers itself as long as it lives
    assert handles["d0"].status == "draining"
    other.release()
    for number in range(3):
        assert (await collect(remote.submit(ask(f"{number}"))))[1].decode_instance == "d1"
    drained.release()
    assert {(await collect(each))[1].num_attempts for each in streams} == {1}
    assert len(drained.requests) == 1
    await remote.drain("d1")
    waiting = remote.submit(ask("waits"))
    first = asyncio.create_task(collect(waiting))
    await until(lambda: server.scheduler.waiting_requests)
    await drained.restart()
    assert (await first)[1].decode_instance == "d0"


async def test_one_that_leaves_is_forgotten_when_it_has_nothing_left_and_comes_back_only_if_it_is_called(
    serve, make_instance, pair, ask, collect, until
):
    other = await make_instance("decode", "d1")
    server, remote = await serve(*pair, other)
    handles = server.scheduler.fleet.handles
    pair[1].hold = other.hold = {"tokens"}
    streams = [server.scheduler.submit(ask(f"{i}")) for i in range(2)]
    await until(lambda: pair[1].requests and other.requests)
    await remote.drain("d0", leaves=True)
    other.release()
    await remote.fetch_stats()
    assert "d0" in handles
    pair[1].release()
    assert {(await collect(each))[1].num_attempts for each in streams} == {1}
    await until(lambda: "d0" not in handles)
    with pytest.raises(InvalidRequest, match=r"d0 at .* was told to leave"):
        await remote.join(pair[1].address, again=False)
    await remote.join(pair[1].address)
    await until(lambda: handles["d0"].status == "ready")


async def test_who_is_called_back_while_it_leaves_stays(serve, pair, ask, collect, until):
    server, remote = await serve(*pair)
    pair[1].hold = {"tokens"}
    stream = server.scheduler.submit(ask())
    await until(lambda: pair[1].requests)
    await remote.drain("d0", leaves=True)
    await remote.join(pair[1].address)
    assert server.scheduler.fleet.handles["d0"].status == "ready"
    pair[1].release()
    await collect(stream)
    await until(lambda: not server.members._leaving)
    assert "d0" in server.scheduler.fleet.handles


async def test_who_waits_for_one_to_leave_waits_on_when_it_is_told_again_and_hears_that_it_was_called_back(
    serve, pair, ask, collect, until
):
    server, remote = await serve(*pair)
    members = server.members
    pair[1].hold = {"tokens"}
    stream = server.scheduler.submit(ask())
    await until(lambda: pair[1].requests)
    members.leave("d0")
    waiting = asyncio.create_task(members.until_left("d0"))
    await remote.fetch_stats()
    members.leave("d0", within_s=60)
    await remote.fetch_stats()
    assert not waiting.done()
    await remote.join(pair[1].address)
    assert await waiting is False
    pair[1].release()
    await collect(stream)
    members.leave("d0")
    assert await members.until_left("d0") is True
    assert list(server.scheduler.fleet.handles) == ["p0"]


async def test_what_one_that_leaves_has_not_finished_in_time_goes_on_elsewhere(
    serve, make_instance, pair, ask, collect, until, caplog
):
    other = await make_instance("decode", "d1")
    server, remote = await serve(*pair, other)
    pair[1].hold = {"tokens"}
    streams = [server.scheduler.submit(ask(f"{i}")) for i in range(2)]
    await until(lambda: pair[1].requests)
    await remote.drain("d0", leaves=True)
    await remote.drain("d0", leaves=True, within_s=0)
    ends = [(await collect(each))[1] for each in streams]
    assert {each.decode_instance for each in ends} == {"d1"}
    assert sorted(each.num_attempts for each in ends) == [1, 2]
    assert f"{pair[1].address}: it was told to leave, and had 0 s to finish what it had" in caplog.text


async def test_one_that_is_not_reached_leaves_at_once(serve, pair, until):
    server, remote = await serve(*pair)
    await pair[1].server.stop()
    await until(lambda: server.scheduler.fleet.handles["d0"].status == "lost")
    with pytest.raises(InvalidRequest, match="instance_id='d0': d0 \\(decode\\) at"):
        await remote.drain("d0")
    await remote.drain("d0", leaves=True)
    await until(lambda: list(server.scheduler.fleet.handles) == ["p0"])


async def test_siblings_use_the_same_instances_whenever_one_joins_drains_or_leaves(serve, make_instance, pair, until):
    parent, remote = await serve(*pair)
    child, _ = await serve()
    handles = child.scheduler.fleet.handles
    await parent.siblings.add("child", child.address)
    await until(lambda: [each.status for each in handles.values()] == ["ready", "ready"])
    late = await make_instance("decode", "d1")
    await remote.join(late.address)
    await until(lambda: "d1" in handles and handles["d1"].status == "ready")
    await remote.drain("p0")
    await until(lambda: handles["p0"].status == "draining")
    another, _ = await serve()
    await parent.siblings.add("another", another.address)
    await until(lambda: len(another.scheduler.fleet.handles) == 3)
    await until(lambda: another.scheduler.fleet.handles["p0"].status == "draining")
    await remote.join(pair[0].address)
    await until(lambda: handles["p0"].status == "ready")
    await remote.drain("d1", leaves=True)
    await until(lambda: list(handles) == list(another.scheduler.fleet.handles) == ["p0", "d0"])


async def test_what_a_sibling_has_given_to_one_that_leaves_is_finished_first(
    serve, make_instance, pair, ask, collect, until
):
    other = await make_instance("decode", "d1")
    parent, remote = await serve(*pair, other)
    child, _ = await serve(*pair, other)
    await parent.siblings.add("child", child.address)
    pair[1].hold = {"tokens"}
    streams = [child.scheduler.submit(ask(f"{i}")) for i in range(2)]
    await until(lambda: pair[1].requests)
    await remote.drain("d0", leaves=True)
    await until(lambda: child.scheduler.fleet.handles["d0"].status == "draining")
    await remote.fetch_stats()
    assert "d0" in parent.scheduler.fleet.handles
    pair[1].release()
    assert {(await collect(each))[1].num_attempts for each in streams} == {1}
    await until(lambda: list(child.scheduler.fleet.handles) == ["p0", "d1"])


async def test_one_that_was_told_to_leave_while_its_network_was_lost_does_not_come_back_by_itself(serve, pair, until):
    server, remote = await serve(pair[0])
    await remote.join(pair[1].address, again=False)
    handles = server.scheduler.fleet.handles
    await until(lambda: handles["d0"].status == "ready")
    await pair[1].server.stop()
    await until(lambda: handles["d0"].status == "lost")
    await remote.drain("d0", leaves=True)
    await until(lambda: "d0" not in handles)
    epoch = pair[1].server.epoch
    await pair[1].restart()
    pair[1].epoch = epoch  # it is the life of before
    with pytest.raises(InvalidRequest, match=r"d0 at .* was told to leave"):
        await remote.join(pair[1].address, again=False)


async def test_who_has_joined_by_itself_and_is_gone_is_forgotten_after_a_while(serve, pair, until, monkeypatch):
    monkeypatch.setattr(membership, "FORGOTTEN_S", 0.05)
    server, remote = await serve(pair[0])
    await remote.join(pair[1].address, again=False)
    handles = server.scheduler.fleet.handles
    await until(lambda: handles["d0"].status == "ready")
    looks = 0
    watch = server.members._watch

    def watched(instance_id: str) -> None:
        nonlocal looks
        looks += 1
        watch(instance_id)

    monkeypatch.setattr(server.members, "_watch", watched)
    await until(lambda: looks > 1)
    assert "d0" in handles, "it is there"
    for each in pair:
        await each.server.stop()
    await until(lambda: list(handles) == ["p0"])


# ---- another role ----------------------------------------------------------------------------------------------------


def roles(server: SchedulerServer) -> dict[str, str]:
    """As the figures have them, of those that take requests."""
    return {each.instance_id: each.role for each in server.scheduler.stats().instances if each.status == "ready"}


async def flip(remote: RemoteScheduler, name: str, role: Any) -> list[str]:
    return [each.text async for each in remote.flip(name, role)]


async def test_an_instance_that_is_flipped_finishes_what_it_has_and_serves_in_the_other_role(
    serve, make_instance, pair, ask, collect, until, assert_empty
):
    other = await make_instance("decode", "d1")
    server, remote = await serve(*pair, other)
    pair[1].hold = other.hold = {"tokens"}
    streams = [server.scheduler.submit(ask(f"{i}")) for i in range(2)]
    await until(lambda: pair[1].requests and other.requests)
    async with remote.flip("d1", "prefill") as news:
        assert (await anext(news)).text == "d1 has 1 requests left"
        assert server.scheduler.fleet.handles["d1"].status == "draining"
        other.release()
        assert [each.text async for each in news] == ["d1 is a prefill instance"]
    pair[1].release()
    assert {(await collect(each))[1].num_attempts for each in streams} == {1}
    assert roles(server) == {"p0": "prefill", "d0": "decode", "d1": "prefill"}
    await remote.drain("p0")
    finished = (await collect(remote.submit(ask("after"))))[1]
    assert (finished.prefill_instance, finished.decode_instance, finished.num_attempts) == ("d1", "d0", 1)
    await assert_empty(server.scheduler)
    assert await flip(remote, "d1", "prefill") == ["d1 is a prefill instance already"]
    with pytest.raises(InvalidRequest, match="d0 is the last decode instance that takes requests"):
        await flip(remote, "d0", "prefill")
    await remote.join(pair[0].address)
    assert await flip(remote, "d1", "decode") == ["d1 is a decode instance"]
    await until(lambda: roles(server) == {"p0": "prefill", "d0": "decode", "d1": "decode"})


async def test_every_scheduler_sees_the_new_role_also_one_that_comes_later_and_a_new_life_has_the_old_one(
    serve, make_instance, pair, until, ask, collect
):
    other = await make_instance("decode", "d1")
    parent, remote = await serve(*pair, other)
    child, _ = await serve()
    await parent.siblings.add("child", child.address)
    await until(lambda: len(roles(child)) == 3)
    handle = child.scheduler.fleet.handles["d1"]
    assert await flip(remote, "d1", "prefill") == ["d1 is a prefill instance"]
    expected = {"p0": "prefill", "d0": "decode", "d1": "prefill"}
    await until(lambda: roles(child) == expected)
    assert child.scheduler.fleet.handles["d1"] is handle, "it was heard, and not dialled anew"
    later, _ = await serve(*pair)
    await parent.siblings.add("later", later.address)
    await until(lambda: roles(later) == expected)
    assert (await RemoteScheduler.join(remote, other.address, "decode")).role == "prefill"
    await other.restart()
    expected = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    await until(lambda: roles(parent) == roles(child) == roles(later) == expected)
    await collect(child.scheduler.submit(ask()))


async def test_one_that_is_killed_right_after_its_flip_has_its_first_role_in_its_next_life_and_no_request_is_lost(
    serve, make_instance, pair, ask, collect, until, assert_empty
):
    other = await make_instance("decode", "d1")
    server, remote = await serve(*pair, other)
    other.hold = {"first"}
    assert await flip(remote, "d1", "prefill") == ["d1 is a prefill instance"]
    await remote.drain("p0")
    streams = [server.scheduler.submit(ask(f"{i}")) for i in range(3)]
    await until(lambda: other.open == len(streams))
    await other.die()
    other.release()
    await remote.join(pair[0].address)
    ends = [(await collect(each))[1] for each in streams]
    assert {(end.prefill_instance, end.num_attempts) for end in ends} == {("p0", 2)}
    await other.restart()
    await until(lambda: roles(server) == {"p0": "prefill", "d0": "decode", "d1": "decode"})
    await collect(server.scheduler.submit(ask("after")))
    await assert_empty(server.scheduler)


async def test_a_flip_waits_for_what_a_sibling_gave_the_instance_in_the_last_moment(serve, make_instance, pair):
    other = await make_instance("decode", "d1")
    other.fail["flip"] = [Overloaded("d1 has 1 requests")]
    server, remote = await serve(*pair, other)
    assert await flip(remote, "d1", "prefill") == ["d1 is a prefill instance"]
    assert other.journal.count(("d1", "flip")) == 2
    assert roles(server)["d1"] == "prefill"


async def test_a_flip_that_is_left_or_fails_leaves_the_instance_what_it_was(
    serve, make_instance, pair, ask, collect, until
):
    other = await make_instance("decode", "d1")
    server, remote = await serve(*pair, other)
    before = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    pair[1].hold = other.hold = {"tokens"}
    streams = [server.scheduler.submit(ask(f"{i}")) for i in range(2)]
    await until(lambda: other.requests)
    async with remote.flip("d1", "prefill") as news:
        await anext(news)
    await until(lambda: roles(server) == before)
    calling_back = remote.flip("d1", "prefill")
    await anext(calling_back)
    await remote.join(other.address)
    pair[1].release()
    other.release()
    with pytest.raises(InvalidRequest, match="d1 was called back, and stays a decode instance"):
        await anext(calling_back)
    assert {(await collect(each))[1].num_attempts for each in streams} == {1}
    other.fail["flip"] = [RemoteError("no")]
    with pytest.raises(RemoteError, match="no"):
        await flip(remote, "d1", "prefill")
    await until(lambda: roles(server) == before)


async def test_one_that_is_told_to_drain_while_it_is_flipped_stays_drained(
    serve, make_instance, pair, ask, collect, until
):
    other = await make_instance("decode", "d1")
    server, remote = await serve(*pair, other)
    handle = server.scheduler.fleet.handles["d1"]
    pair[1].hold = other.hold = {"tokens"}
    streams = [server.scheduler.submit(ask(f"{i}")) for i in range(2)]
    await until(lambda: other.requests)
    async with asyncio.timeout(30), remote.flip("d1", "prefill") as news:
        await anext(news)
        await remote.drain("d1")
        with pytest.raises(InvalidRequest, match="d1 was told to drain, and stays a decode instance"):
            await anext(news)
    assert (handle.status, handle.role) == ("draining", "decode")
    pair[1].release()
    other.release()
    for each in streams:
        await collect(each)
    await remote.join(other.address)
    other.hold = {"flip"}
    flipping = asyncio.create_task(flip(remote, "d1", "prefill"))
    await until(lambda: other.num_held)
    await remote.drain("d1")
    other.release()
    await flipping
    await until(lambda: (handle.status, handle.role) == ("draining", "prefill"))


async def test_what_cannot_be_flipped_is_told(serve, make_instance, pair, until):
    hybrid = await make_instance("hybrid", "h0")
    _, remote = await serve(*pair, hybrid)
    for name, problem in {
        "p9": "instance_id='p9': no instance has it; there are: p0, d0, h0",
        "h0": "h0 is a hybrid instance, which moves no KV, and stays one",
        "d0": "d0 is the last decode instance that takes requests",
    }.items():
        with pytest.raises(InvalidRequest, match=problem):
            await flip(remote, name, "prefill")
    await remote.drain("p0")
    with pytest.raises(InvalidRequest, match=r"p0 \(prefill\) at .*: it was told to drain"):
        await flip(remote, "p0", "decode")
    with pytest.raises(InvalidRequest, match="hybrid"):
        await flip(remote, "d0", "hybrid")
