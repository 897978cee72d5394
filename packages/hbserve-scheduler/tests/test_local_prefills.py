"""Decode instances that compute prompts: short ones, those of which they have nearly all, and all if nobody is left."""

import asyncio
from typing import Any

import msgspec
import pytest

from hbserve_rpc import SamplingParams, Unavailable
from hbserve_rpc.messages import DecodeRequest, GenerateRequest, PrefillRequest
from hbserve_rpc.prompt_shape import shape_of
from hbserve_scheduler import CpuScheduler
from hbserve_scheduler.request import ScheduledRequest

BLOCK = 16
"""Of the instances here."""
PROMPT = list(range(100, 140))


@pytest.fixture
async def three(make_instance: Any) -> Any:
    """A prefill instance, and two decode instances that compute prompts too."""
    made = [await make_instance(*each) for each in (("prefill", "p0"), ("decode", "d0"), ("decode", "d1"))]
    for decode in made[1:]:
        decode.serves_generate = True
    return made


def request(name: str, prompt: list[int] = PROMPT) -> GenerateRequest:
    return GenerateRequest(name, (*prompt,), SamplingParams(max_tokens=4))


def kinds(instance: Any) -> list[type]:
    return [type(each) for each in instance.requests]


def say_cached(scheduler: CpuScheduler, instance_id: str, num_tokens: int) -> None:
    handle = scheduler.fleet.handles[instance_id]
    scheduler.fleet.prefixes.set(handle, shape_of(PROMPT[:num_tokens], BLOCK).digests)


async def test_short_prompts_are_computed_where_they_are_decoded_and_long_ones_apart(make_scheduler, three, collect):
    prefill, *decodes = three
    scheduler = await make_scheduler(*three, local_prefill_tokens=30)
    tokens, end = await collect(scheduler.submit(request("short", PROMPT[:29])))
    assert (tokens, end.kv_bytes) == ([100, 101, 102, 103], 0)
    assert end.prefill_instance == end.decode_instance
    assert kinds(prefill) == []
    assert kinds(decodes[0]) + kinds(decodes[1]) == [GenerateRequest]
    await collect(scheduler.submit(request("long", PROMPT[:30])))
    assert kinds(prefill) == [PrefillRequest]
    assert scheduler.stats().local_prefills == 1


async def test_a_prompt_that_is_nearly_all_cached_is_computed_where_it_is(make_scheduler, three, collect):
    prefill, cached, other = three
    scheduler = await make_scheduler(*three, local_prefill_tokens=10)
    assert scheduler.digest_block_size == BLOCK
    say_cached(scheduler, "d0", 32)
    await collect(scheduler.submit(request("8 left")))
    assert (kinds(cached), kinds(other), kinds(prefill)) == ([GenerateRequest], [], [])
    say_cached(scheduler, "d0", 16)
    await collect(scheduler.submit(request("24 left")))
    assert kinds(prefill) == [PrefillRequest]


async def test_a_request_that_failed_where_its_prompt_is_cached_is_not_computed_there_again(make_scheduler, three):
    fleet = (scheduler := await make_scheduler(*three, local_prefill_tokens=10)).fleet
    say_cached(scheduler, "d0", 32)
    asked = msgspec.structs.replace(request("r"), shape=shape_of(PROMPT, BLOCK))
    there, elsewhere = [fleet.place_request(ScheduledRequest(asked, failed_on=avoid)) for avoid in (set(), {"d0"})]
    assert (there.prefill, there.decode.instance_id) == (None, "d0")
    assert (elsewhere.prefill.instance_id, elsewhere.decode.instance_id) == ("p0", "d1")
    for each in (there, elsewhere):
        each.end()


async def test_a_busy_instance_computes_no_prompt_for_its_cache(make_scheduler, three, collect, until):
    prefill, cached, other = three
    cached.hold = {"tokens"}
    scheduler = await make_scheduler(*three, local_prefill_tokens=10)
    say_cached(scheduler, "d0", 32)
    streams = [scheduler.submit(request(f"r{number}")) for number in range(7)]
    await until(lambda: len(cached.requests) >= 5 and prefill.requests)
    assert kinds(cached)[:5] == [GenerateRequest] * 5
    await until(lambda: other.requests)
    cached.release()
    await asyncio.gather(*map(collect, streams))


async def test_where_no_prefill_instance_is_left_decode_instances_compute_prompts_until_one_is_back(
    make_scheduler, three, collect, until
):
    # Known elsewhere: SGLang #14284.
    prefill, *decodes = three
    scheduler = await make_scheduler(*three)
    await collect(scheduler.submit(request("with it")))
    await prefill.server.stop()
    await until(lambda: scheduler.fleet.handles["p0"].status not in ("ready", "suspect"))
    tokens, _ = await collect(scheduler.submit(request("without it")))
    assert tokens == [100, 101, 102, 103]
    assert scheduler.stats().local_prefills == 1
    assert GenerateRequest in kinds(decodes[0]) + kinds(decodes[1])
    await prefill.restart()
    await until(lambda: scheduler.fleet.handles["p0"].status == "ready")
    await collect(scheduler.submit(request("with it again")))
    assert (len(prefill.requests), scheduler.stats().local_prefills) == (2, 1)


async def test_an_attempt_that_lost_its_prefill_instance_goes_on_where_it_is_decoded(
    make_scheduler, three, collect, until
):
    prefill, *_ = three
    prefill.hold = {"first"}
    scheduler = await make_scheduler(*three)
    stream = scheduler.submit(request("r"))
    await until(lambda: prefill.requests)
    await scheduler.remove_instance("p0")
    tokens, end = await collect(stream)
    assert (tokens, end.num_attempts) == ([100, 101, 102, 103], 2)
    prefill.release()


@pytest.mark.parametrize("why", ["by the configuration", "because they are of an older version"])
async def test_decode_instances_that_shall_not_or_cannot_compute_prompts_do_not(make_scheduler, three, collect, why):
    _, *decodes = three
    for decode in decodes:
        decode.serves_generate = why == "by the configuration"
    scheduler = await make_scheduler(
        *decodes, local_prefill_fallback=not decodes[0].serves_generate, instance_wait_s=0.2
    )
    with pytest.raises(Unavailable):
        await collect(scheduler.submit(request("r")))
    assert not scheduler.fleet.has_room()
    assert [each.requests for each in decodes] == [[], []]


async def test_no_more_prompts_are_with_a_decode_instance_than_may_wait_there(make_scheduler, three, collect, until):
    _, decode, _ = three
    decode.hold = {"tokens"}
    scheduler = await make_scheduler(decode, max_pending_reservations=2)
    streams = [scheduler.submit(request(f"r{number}")) for number in range(5)]
    await until(lambda: len(decode.requests) == 2)
    assert (scheduler.stats().running_requests, scheduler.stats().waiting_requests) == (2, 3)
    decode.release()
    await asyncio.gather(*map(collect, streams))
    assert DecodeRequest not in kinds(decode)


async def test_a_prompt_that_is_computed_makes_room_for_the_next_while_its_answer_is_decoded(
    make_scheduler, three, collect, until
):
    _, decode, _ = three
    decode.hold = {"tokens"}
    scheduler = await make_scheduler(decode, max_pending_reservations=1)
    streams = [scheduler.submit(request(f"r{number}")) for number in range(2)]
    await until(lambda: decode.num_held == 1)
    decode.release()
    decode.hold = {"tokens"}
    await until(lambda: decode.num_held == 2)
    assert (scheduler.stats().running_requests, scheduler.stats().completed_requests) == (2, 0)
    decode.release()
    await asyncio.gather(*map(collect, streams))
