"""What one attempt leaves to the next: of whose death a request may be the cause, and what its client has already."""

from typing import Any

from hbserve_rpc import Overloaded, SamplingParams
from hbserve_rpc.messages import GenerateRequest, RequestFinished, TokenEvent
from hbserve_scheduler.request import ScheduledRequest


def of_two_choices() -> ScheduledRequest:
    return ScheduledRequest(GenerateRequest("r", (7, 8), SamplingParams(max_tokens=4, n=2)))


async def dies_after_one_token(scheduler: Any, prefill: Any, decodes: list[Any], ask: Any, until: Any) -> Any:
    """The events of request "r", of which one token was delivered. Its decode instance has died, after the prefill
    instance was done with it; the next attempt's prefill is held."""
    for instance in decodes:
        instance.hold = {"tokens"}
    events = scheduler.submit(ask())
    assert (await anext(events)).token_ids == [100]
    await until(lambda: prefill.open == 0 and scheduler.fleet.handles["p0"].num_inflight == 0)
    prefill.hold = {"first"}
    await next(each for each in decodes if each.open).die()
    await until(lambda: prefill.num_held == 1)
    return events


async def test_only_those_that_had_it_when_it_failed_are_suspected_to_die_of_it(
    make_scheduler, make_instance, pair, ask, collect, until
):
    decodes = [pair[1], await make_instance("decode", "d1")]
    scheduler = await make_scheduler(pair[0], *decodes)
    events = await dies_after_one_token(scheduler, pair[0], decodes, ask, until)
    was_on = [handle.instance_id for handle, _ in scheduler.running_requests["r"].was_on]
    assert len(was_on) == 1, was_on
    assert was_on[0] in ("d0", "d1"), "the prefill instance was done with it"
    for each in (pair[0], *decodes):
        each.release()
    await collect(events)


async def test_a_request_with_tokens_is_suspect_after_a_death_until_it_has_another(
    make_scheduler, make_instance, pair, ask, collect, until
):
    decodes = [pair[1], await make_instance("decode", "d1")]
    scheduler = await make_scheduler(pair[0], *decodes)
    events = await dies_after_one_token(scheduler, pair[0], decodes, ask, until)
    entry = scheduler.running_requests["r"]
    assert entry.num_delivered == 1
    assert entry.is_suspect
    for each in (pair[0], *decodes):
        each.release()
    await collect(events)
    assert not entry.is_suspect


async def test_who_has_refused_a_request_does_not_die_of_it(make_scheduler, pair, ask, collect, until):
    pair[1].fail["grant"] = [Overloaded("no room")]
    pair[1].hold = {"tokens"}
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    await until(lambda: scheduler.stats().refusals == 1 and pair[1].num_held == 1)
    assert scheduler.running_requests["r"].was_on == []
    pair[1].release()
    await collect(events)


async def test_prompt_logprobs_that_come_with_a_later_token_are_left_out(ask):
    entry = ScheduledRequest(ask())
    for index in range(2):
        entry.deliver(TokenEvent(index, [5], prompt_logprobs=[{8: -1.0}]))
        event: Any = entry.take()
        assert (event.index, event.prompt_logprobs) == (index, [] if index else [{8: -1.0}])


async def test_the_end_of_a_choice_is_told_when_it_is_known_what_was_moved():
    entry = of_two_choices()
    entry.is_prefilling = True
    entry.deliver(TokenEvent(0, [5], "stop"))
    assert isinstance(entry.take(), TokenEvent)
    assert not entry.events
    entry.is_prefilling, entry.kv_bytes = False, 100
    entry.tell_ends()
    end = entry.take()
    assert isinstance(end, RequestFinished)
    assert end.kv_bytes == 100


async def test_what_was_moved_before_the_choices_parted_counts_once():
    entry = of_two_choices()
    entry.kv_bytes, entry.kv_transfer_time_s = 100, 1.0
    for choice in entry.choices:
        entry.hand_down(choice)
        choice.kv_bytes += 50
        choice.kv_transfer_time_s += 0.5
    for choice in entry.choices:
        entry.gather(choice, 100, 1.0)
    assert (entry.kv_bytes, entry.kv_transfer_time_s) == (200, 2.0)


async def test_an_instance_without_a_counterpart_is_avoided_too(make_scheduler, make_instance, ask):
    hybrids = [await make_instance("hybrid", f"h{i}") for i in range(2)]
    fleet = (await make_scheduler(*hybrids)).fleet
    decodes = [await make_instance("decode", f"d{i}") for i in range(2)]
    for decode in decodes:
        decode.serves_generate = True
    prefill = await make_instance("prefill", "p0")
    local = (await make_scheduler(prefill, *decodes, local_prefill_tokens=30)).fleet
    for which, first, second in ((fleet, "h0", "h1"), (local, "d0", "d1")):
        for avoided, chosen in ((first, second), (second, first)):
            places = [which.place_request(ScheduledRequest(ask(), failed_on={avoided})) for _ in range(3)]
            assert {place.decode.instance_id for place in places} == {chosen}
            assert {place.prefill for place in places} == {None}
            for place in places:
                place.end()
