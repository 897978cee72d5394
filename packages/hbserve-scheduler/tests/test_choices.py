"""Requests of several choices: placed once, told choice by choice, and apart only when an attempt has failed."""

import asyncio
from collections import defaultdict
from typing import Any

import pytest

from hbserve_rpc import InvalidRequest, RemoteError, SamplingParams
from hbserve_rpc.messages import GenerateRequest, RequestFinished
from hbserve_scheduler import RequestFailed

DEADLINE_S = 30
CHOICE = 200
"""Tokens of the scripted instances are 100, 101, … of the first choice, 300, 301, … of the second."""
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


def ask(n=3, max_tokens=5, **rest):
    params = SamplingParams(max_tokens=max_tokens, n=n, seed=0, **rest)
    return GenerateRequest("r", (7,) * 4, params)


def expected(choice, count, first=0):
    return [100 + index + CHOICE * choice for index in range(first, count)]


async def by_choice(events, seen=()):
    """Tokens and end of each, after what was seen of them; no token is missing, doubled, out of order or of one that
    has ended."""
    tokens, ends = defaultdict[int, list[int]](list), {}
    async with asyncio.timeout(DEADLINE_S):
        for event in [*seen, *[event async for event in events]]:
            assert event.choice not in ends
            if isinstance(event, RequestFinished):
                ends[event.choice] = event
                continue
            assert event.index == len(tokens[event.choice])
            tokens[event.choice] += event.token_ids
    return dict(tokens), ends


@pytest.mark.parametrize("early", [False, True])
async def test_a_prompt_is_computed_and_moved_once_for_all_choices(make_scheduler, pair, until, early):
    prefill, decode = pair
    decode.free_blocks = 900 * early
    decode.choice_stops = prefill.choice_stops = {1: 2, 2: 0}
    scheduler = await make_scheduler(*pair)
    await until(lambda: scheduler.fleet.handles["d0"].reports_room(4, 3) is early)
    decode.hold.add("tokens")
    events = scheduler.submit(ask())
    seen: list[Any] = []
    while not any(isinstance(event, RequestFinished) for event in seen):
        seen.append(await anext(events))
    assert seen[-1].choice == 2, "it need not wait for the others"
    decode.release()
    tokens, ends = await by_choice(events, seen)
    assert tokens == {0: expected(0, 5), 1: expected(1, 3), 2: expected(2, 1)}
    assert {choice: end.finish_reason for choice, end in ends.items()} == {0: "length", 1: "stop", 2: "stop"}
    assert [end.num_output_tokens for _, end in sorted(ends.items())] == [5, 3, 1]
    assert (ends[0].kv_bytes, ends[1].kv_bytes, ends[0].decode_instance, ends[2].num_attempts) == (1000, 1000, "d0", 1)
    assert [len(each.requests) for each in pair] == [1, 1]
    stats = scheduler.stats()
    assert (stats.total_requests, stats.completed_requests) == (1, 1)


async def test_all_choices_may_end_at_their_first_tokens(make_scheduler, pair):
    for instance in pair:
        instance.stop_at = 0
    scheduler = await make_scheduler(*pair)
    tokens, ends = await by_choice(scheduler.submit(ask()))
    assert tokens == {choice: expected(choice, 1) for choice in range(3)}
    assert {end.finish_reason for end in ends.values()} == {"stop"}


async def test_of_one_token_each_nothing_is_decoded(make_scheduler, pair):
    prefill, decode = pair
    scheduler = await make_scheduler(*pair)
    tokens, ends = await by_choice(scheduler.submit(ask(max_tokens=1, prompt_logprobs=0)))
    assert tokens == {choice: expected(choice, 1) for choice in range(3)}
    assert (len(prefill.requests), decode.requests, ends[1].kv_bytes) == (1, [], 0)


@pytest.mark.parametrize("role", ["decode", "hybrid"])
async def test_one_choice_is_aborted_and_the_others_go_on(make_scheduler, make_instance, pair, until, role):
    instance = pair[1] if role == "decode" else await make_instance("hybrid", "h0")
    instance.hold.add("tokens")
    scheduler = await make_scheduler(*(pair if role == "decode" else [instance]))
    events = scheduler.submit(ask())
    await until(lambda: (instance.instance_id, "tokens") in instance.journal)
    assert await scheduler.abort("r", "stop", 1)
    assert not await scheduler.abort("r", "stop", 1)
    assert not await scheduler.abort("r", "stop", 3)
    await until(lambda: instance.ended_choices == [1])
    instance.release()
    tokens, ends = await by_choice(events)
    assert {choice: each for choice, each in tokens.items() if choice != 1} == {0: expected(0, 5), 2: expected(2, 5)}
    assert len(tokens.get(1, [])) <= 1
    assert [ends[choice].finish_reason for choice in range(3)] == ["length", "stop", "length"]
    await until(lambda: instance.open == 0)


async def test_the_last_choice_that_is_aborted_ends_the_request(make_scheduler, pair, until):
    prefill, decode = pair
    decode.hold.add("tokens")
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask(n=2))
    await until(lambda: ("d0", "tokens") in decode.journal)
    assert await scheduler.abort("r", "stop", 0)
    assert decode.open == 1
    assert await scheduler.abort("r", "stop", 1)
    _, ends = await by_choice(events)
    assert [ends[choice].finish_reason for choice in range(2)] == ["stop", "stop"]
    await until(lambda: prefill.open == decode.open == 0)
    assert scheduler.stats().completed_requests == 1


async def test_all_choices_are_aborted_at_once_and_by_a_client_that_leaves(make_scheduler, pair, until):
    decode = pair[1]
    decode.hold.add("tokens")
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    assert await scheduler.abort("r")
    assert [end.finish_reason for end in (await by_choice(events))[1].values()] == ["abort"] * 3
    events = scheduler.submit(ask())
    await until(lambda: decode.open == 1)
    await events.aclose()
    await until(lambda: decode.open == 0)
    assert scheduler.stats().aborted_requests == 2


async def test_where_nothing_was_told_yet_the_request_is_tried_again_as_a_whole(make_scheduler, pair):
    prefill, decode = pair
    prefill.fail["first"] = [RemoteError("died")]
    scheduler = await make_scheduler(*pair)
    tokens, ends = await by_choice(scheduler.submit(ask()))
    assert tokens == {choice: expected(choice, 5) for choice in range(3)}
    assert {end.num_attempts for end in ends.values()} == {2}
    assert [each.params.n for each in decode.requests] == [3, 3]


async def test_after_a_death_each_choice_goes_on_where_it_was(make_scheduler, pair):
    decode = pair[1]
    decode.choice_stops = {2: 2}
    decode.fail["tokens"] = [None, None, RemoteError("died")]
    scheduler = await make_scheduler(*pair)
    tokens, ends = await by_choice(scheduler.submit(ask(max_tokens=6)))
    assert tokens == {0: expected(0, 6), 1: expected(1, 6), 2: expected(2, 3)}
    assert [ends[choice].num_attempts for choice in range(3)] == [2, 2, 1]
    assert [ends[choice].finish_reason for choice in range(3)] == ["length", "length", "stop"]
    again = [(each.params.n, each.params.seed, each.output_token_ids) for each in decode.requests[1:]]
    assert sorted(again) == [(1, 0, expected(0, 3)), (1, 1, expected(1, 3))]
    assert scheduler.stats().retries == 2


async def test_a_choice_may_be_aborted_when_all_go_on_by_themselves(make_scheduler, pair, until):
    decode = pair[1]
    decode.fail["tokens"] = [RemoteError("died")]
    scheduler = await make_scheduler(*pair)
    decode.hold.add("tokens")
    events = scheduler.submit(ask(n=2))
    await until(lambda: len(decode.requests) == 3 and decode.open == 2)
    assert await scheduler.abort("r", "stop", 0)
    await until(lambda: decode.open == 1)
    decode.release()
    tokens, ends = await by_choice(events)
    assert tokens == {0: expected(0, len(tokens[0])), 1: expected(1, 5)}
    assert len(tokens[0]) <= 2, "the prefill instance may have told one more"
    assert [ends[choice].finish_reason for choice in range(2)] == ["stop", "length"]
    assert scheduler.stats().completed_requests == 1


async def test_one_choice_that_fails_for_good_ends_the_request_with_the_whole_story(make_scheduler, pair, until):
    decode = pair[1]
    decode.fail["tokens"] = [RemoteError("died") for _ in range(9)]
    scheduler = await make_scheduler(*pair, max_attempts=2)
    with pytest.raises(RequestFailed, match=r"attempt 1: d0: died; attempt 2: d0: died"):
        await by_choice(scheduler.submit(ask()))
    await until(lambda: decode.open == 0)


async def test_a_choice_that_was_not_asked_for_is_a_failure_of_the_instance(make_scheduler, pair):
    prefill = pair[0]
    generate, prefill._event = prefill._event, lambda request, index, choice=0: generate(request, index, choice + 7)
    scheduler = await make_scheduler(*pair, max_attempts=1)
    with pytest.raises(RequestFailed, match="a token came of choice 7, of 3"):
        await by_choice(scheduler.submit(ask()))


async def test_more_choices_than_there_may_be_are_refused(make_scheduler, pair):
    scheduler = await make_scheduler(*pair)
    request = ask()
    request.params.n = 1025
    with pytest.raises(InvalidRequest, match=r"n=1025: expected .* 1 to 1024"):
        scheduler.submit(request)
