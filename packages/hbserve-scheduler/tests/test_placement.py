"""What waits and who takes it, kept so that neither takes longer the more there are: equal to a look at all of them."""

import itertools
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import GenerateRequest, InstanceInfo, InstanceStats, Role
from hbserve_rpc.prompt_shape import PromptShape
from hbserve_rpc.reports import InstanceReport
from hbserve_scheduler import ConfigError, SchedulerConfig
from hbserve_scheduler.admission import WaitingRequests
from hbserve_scheduler.fleet import Fleet
from hbserve_scheduler.instances import InstanceHandle
from hbserve_scheduler.policies import (
    SPARE_ENTRIES,
    Available,
    LowestKey,
    PowerOfTwo,
    least_loaded,
    make_policy,
    round_robin,
)
from hbserve_scheduler.prefixes import Prefixes
from hbserve_scheduler.request import ScheduledRequest
from hbserve_testing.narrowing import present

PROMPT = PromptShape(4)


def entry(name: int, priority: int = 0) -> ScheduledRequest:
    request = GenerateRequest(str(name), (1,) * (name + 1), SamplingParams(0, 4, priority=priority))
    return ScheduledRequest(request, submitted_s=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(removed=st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(-1, 1)), max_size=40))
def test_requests_wait_by_priority_and_then_in_the_order_in_which_they_came_whichever_leave(removed):
    waiting, model, names = WaitingRequests(), list[Any](), itertools.count()
    for adds, place, priority in removed:
        if adds or not model:
            waiting.append(new := entry(next(names), priority))
            model = sorted([*model, new], key=lambda each: each.request.params.priority)  # stable
        else:
            waiting.remove(model.pop(place % len(model)))
        for bound in (-2, -1, 0, 1, 2):
            before = [each.num_tokens for each in model if each.request.params.priority <= bound]
            assert waiting.num_tokens_before(bound) == sum(before)
        assert list(waiting) == model
        assert list(reversed(waiting)) == model[::-1]
        assert [waiting[i] for i in range(-len(model), len(model))] == model + model
        assert waiting[1:3] == model[1:3]
        assert len(waiting) == len(model)
        assert all(each in waiting and waiting.find(each.request.request_id) is each for each in model)
    stranger = entry(0)
    assert stranger not in waiting
    with pytest.raises(ValueError, match="is not waiting"):
        waiting.remove(stranger)
    with pytest.raises(IndexError):
        waiting[len(model)]


def ready_handle(role: Role, name: str, turn: int) -> InstanceHandle:
    handle = InstanceHandle(name, role, "127.0.0.1:1", SchedulerConfig(), lambda _: None, lambda _: None)
    handle._set_info(InstanceInfo(name, role, name, "ready"))
    handle.turn = turn
    return handle


@pytest.mark.parametrize("key", [round_robin, least_loaded])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), max_size=120))
def test_the_first_by_a_policy_is_the_one_that_a_look_at_all_of_them_finds(key, changes):
    handles = [ready_handle("prefill", f"p{i}", i) for i in range(5)]
    available = Available(LowestKey(key), lambda each: each.num_inflight < 3)
    turns = itertools.count(10)
    for number, load, is_given in changes:
        handle = handles[number]
        handle.load = handle.num_inflight = load
        handle.turn = next(turns) if is_given else handle.turn
        available.update(handle)
        there = [each for each in handles if each in available]
        assert set(available) == set(there)
        assert all(each.num_inflight < 3 for each in there)
        if there:
            assert available.choose(PROMPT) is min(there, key=key)
            assert available.least_load() == min(each.load for each in there)
        assert all(available[i] in there for i in range(len(available)))
    assert len(available._by_policy._heap) <= 2 * len(handles) + SPARE_ENTRIES + 1


def all_available(policy: Any, loads: list[int]) -> Available:
    available = Available(policy, lambda _: True)
    for number, load in enumerate(loads):
        handle = ready_handle("prefill", f"p{number}", number)
        handle.load = load
        available.update(handle)
    return available


def test_the_power_of_two_choices_takes_neither_the_busiest_nor_always_the_idlest():
    loads = [5, 0, 3, 9, 1, 7]
    available = all_available(PowerOfTwo(), loads)
    chosen = Counter(available.choose(PROMPT).load for _ in range(600))
    assert chosen[9] == 0, "of any two instances, the other one has less to do"
    assert set(chosen) == {0, 1, 3, 5, 7}, "else all schedulers would take the same one until its next report"
    assert chosen[0] == pytest.approx(200, abs=100), "one pair in three has the idlest one in it"


def test_a_scheduler_that_is_alone_takes_the_idlest_and_one_among_others_the_idler_of_two():
    available = all_available(make_policy("x", SchedulerConfig().prefill_policy, Prefixes()), [5, 0, 3, 9, 1, 7])
    busiest = max(available, key=least_loaded)
    busiest._on_change = available.update

    def chosen() -> set[int]:
        return {available.choose(PROMPT).load for _ in range(200)}

    def hear(others: int) -> None:
        busiest._take(InstanceReport(InstanceStats(busiest.instance_id, "prefill", "ready"), other_tokens=others))

    assert chosen() == {0}
    busiest.is_full = True
    hear(40)
    assert chosen() == {0, 1, 3, 5}, "what another scheduler gives the idlest one is not known for up to a second"
    hear(0)
    assert chosen() == {0}
    hear(40)
    available.forget(busiest)
    assert chosen() == {0}, "it was removed"


def test_one_of_one_instance_and_the_idler_of_two_is_chosen():
    assert all_available(PowerOfTwo(), [4]).choose(PROMPT).load == 4
    two = all_available(PowerOfTwo(), [4, 3])
    assert {two.choose(PROMPT).load for _ in range(50)} == {3}


class LongPromptsLast:
    """A policy of a user's own."""

    def choose(self, candidates: Any, prompt: PromptShape) -> InstanceHandle:
        return candidates[-1] if prompt.num_tokens > 100 else candidates[0]


class Broken:
    def choose(self, candidates: Any, prompt: PromptShape) -> InstanceHandle:
        if prompt.num_tokens > 100:
            raise ZeroDivisionError
        return object()  # type: ignore[return-value]


def test_a_users_own_policy_is_found_by_its_place_and_sees_the_prompt(monkeypatch, tmp_path):
    own = "class Last:\n    def choose(self, candidates, prompt): return candidates[-1]\n"
    (tmp_path / "own_policy.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert all_available(make_policy("key", "own_policy:Last", Prefixes()), [1, 2]).choose(PROMPT).load == 2
    mine = all_available(LongPromptsLast(), [1, 2, 3])
    assert [mine.choose(PromptShape(length)).load for length in (5, 500)] == [1, 3]
    assert mine.choose(PromptShape(500), mine[:2]).load == 2, "and only what it may choose"


@pytest.mark.parametrize("name", ["no_such_module:Class", "json:NoSuchClass", "json:dumps", "json:JSONEncoder", "rr"])
def test_a_policy_that_is_none_is_refused_by_its_name(name):
    with pytest.raises(ConfigError, match=rf"scheduler\.prefill_policy='{name}'"):
        make_policy("scheduler.prefill_policy", name, Prefixes())


@pytest.mark.parametrize(("length", "problem"), [(5, "none of the candidates"), (500, "ZeroDivisionError")])
def test_a_policy_that_fails_stops_no_request(caplog, length, problem):
    available = all_available(Broken(), [4, 3, 6])
    assert available.choose(PromptShape(length)).load == 3
    assert available.choose(PromptShape(length), [available[2], available[0]]).load == 4, "of those that it may choose"
    assert problem in caplog.text


async def fleet_of(num_instances: int, **settings: Any) -> Fleet:
    """Ready and connected; nothing is dialled."""
    fleet = Fleet(SchedulerConfig(max_warm_links=0, **settings), lambda: None)
    for i in range(num_instances):
        role: Role = "decode" if i % 2 else "prefill"
        await fleet.add(f"{role[0]}{i}", role, "127.0.0.1:1")
    decodes = [handle.instance_id for handle in fleet.handles.values() if handle.role == "decode"]
    for handle in fleet.handles.values():
        info = InstanceInfo(
            handle.instance_id, handle.role, handle.instance_id, "ready", max_prompt_len=9, vocab_size=9
        )
        handle._set_info(info)
    for number, handle in enumerate(each for each in fleet.handles.values() if each.role == "prefill"):
        handle.links = dict.fromkeys((decodes * 2)[number : number + 8], True)
    return fleet


async def test_a_place_is_found_without_a_look_at_every_instance(monkeypatch):
    fleet, looked = await fleet_of(400, prefill_policy="least_loaded", decode_policy="least_loaded"), []
    for available in fleet._available.values():

        def noting(each, update=available.update):
            looked.append(each)
            return update(each)

        monkeypatch.setattr(available, "update", noting)
        monkeypatch.setattr(Available, "__iter__", lambda _: pytest.fail("it looked at all of them"))
    places = []
    for _ in range(100):
        assert fleet.has_room()
        assert fleet.may_serve()
        assert len(fleet.limiting_infos()) == 2
        places.append(present(fleet.place_request(entry(4))))
    assert len(looked) < 100 * 15, "those to which a prefill instance is connected, and those that were chosen"
    for chosen in zip(*[(place.prefill, place.decode) for place in places], strict=True):
        assert len({each.instance_id for each in chosen}) == 100, "nobody has two while another has none"


async def test_the_limits_of_requests_follow_the_instances_that_are_ready():
    fleet = await fleet_of(4)
    handle = fleet.handles["d1"]
    handle._set_info(InstanceInfo("d1", "decode", "d1", "ready", max_prompt_len=5, vocab_size=7))
    bounds = [(each.max_prompt_len, each.vocab_size) for each in fleet.limiting_infos()]
    assert (min(length for length, _ in bounds), min(size for _, size in bounds)) == (5, 7)
    handle.lost("it is gone")
    assert {(each.max_prompt_len, each.vocab_size) for each in fleet.limiting_infos()} == {(9, 9)}
    for each in list(fleet.handles):
        await fleet.remove(each)
    assert fleet.limiting_infos() == []
    assert not fleet.has_room()
    assert not fleet.may_serve()


async def test_busy_decode_instances_that_are_connected_give_way_to_one_that_is_not_yet():
    fleet = await fleet_of(40, max_pending_reservations=100)
    prefill = fleet.handles["p0"]
    linked = [handle for handle in fleet.handles.values() if handle.instance_id in prefill.links]
    for handle in linked:
        handle.load = 5
        handle.changed()
    for handle in fleet.handles.values():
        if handle.role == "prefill" and handle is not prefill:
            handle.num_inflight = 1000
            handle.changed()
    chosen = present(fleet.place_request(entry(4))).decode
    assert chosen not in linked
    assert chosen.role == "decode"


@pytest.mark.parametrize("links", [{"d1": False}, {"gone": True, "d1": False}], ids=["lost", "to one that has left"])
async def test_links_that_are_lost_or_lead_to_nobody_are_none(links):
    fleet = await fleet_of(4)
    for handle in fleet.handles.values():
        if handle.role == "prefill":
            handle.links.clear()
            handle.links.update(links)
    assert present(fleet.place_request(entry(4))).decode.instance_id == "d3"
