"""Who takes each event of a request is given it soon, without being woken, and is no part of what brings it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from hbserve_rpc import InvalidRequest, RemoteError, SamplingParams
from hbserve_rpc.messages import ClientEvent, GenerateRequest, RequestFinished, TokenEvent
from hbserve_scheduler import CpuScheduler, EventStream
from hbserve_scheduler.event_stream import TurnEnd
from hbserve_scheduler.request import ScheduledRequest


def tokens_of(events: list[ClientEvent]) -> list[list[int]]:
    return [each.token_ids for each in events if isinstance(each, TokenEvent)]


@pytest.fixture
def stream(ask) -> Callable[..., tuple[ScheduledRequest, EventStream]]:
    def make(**options):
        entry = ScheduledRequest(ask(max_tokens=100, **options))
        return entry, EventStream(entry, lambda entry: entry.finish("abort"), TurnEnd())

    return make


async def test_what_a_turn_of_the_loop_brings_is_given_together_at_its_end(stream):
    entry, events = stream()
    taken: list[ClientEvent] = []
    entry.deliver(TokenEvent(0, [1]))
    entry.deliver(TokenEvent(1, [2]))
    taking = asyncio.create_task(events.each(lambda event: taken.append(event)))
    await asyncio.sleep(0)
    assert tokens_of(taken) == [[1, 2]], "what waits is together"
    for token in (3, 5):
        entry.deliver(TokenEvent(token - 1, [token]))
        entry.deliver(TokenEvent(token, [token + 1]))
        await asyncio.sleep(0)
        assert taken[-1] == TokenEvent(token - 1, [token, token + 1])
    assert not taking.done()
    entry.deliver(TokenEvent(6, [7], "length"))
    entry.finish("length")
    assert len(taken) == 3, "not in the midst of what brings it"
    assert await taking is False
    assert tokens_of(taken) == [[1, 2], [3, 4], [5, 6], [7]]
    assert isinstance(taken[-1], RequestFinished)
    assert await events.each(taken.append) is False, "and has no more"


async def test_who_has_enough_leaves_the_others_and_comes_back_for_them(stream):
    entry, events = stream()
    taken: list[ClientEvent] = []

    def take(event: ClientEvent) -> bool:
        taken.append(event)
        return True

    taking = asyncio.create_task(events.each(take))
    await asyncio.sleep(0)
    entry.deliver(TokenEvent(0, [1]))
    await asyncio.sleep(0)
    for token in (2, 3):
        entry.deliver(TokenEvent(token - 1, [token]))
    assert await taking is True
    assert tokens_of(taken) == [[1]]
    assert (await anext(events)).token_ids == [2, 3], "one by one goes on where it was left"
    entry.finish("length")
    assert await events.each(take) is False


async def test_what_who_takes_raises_is_raised_there_and_the_request_goes_on(stream):
    entry, events = stream()

    def fail(_: ClientEvent) -> bool:
        raise KeyError("of the taker")

    taking = asyncio.create_task(events.each(fail))
    await asyncio.sleep(0)
    entry.deliver(TokenEvent(0, [1]))
    await asyncio.sleep(0)
    entry.deliver(TokenEvent(1, [2]))
    with pytest.raises(KeyError, match="of the taker"):
        await taking
    assert entry.output == [1, 2]
    assert (await anext(events)).token_ids == [2]


async def test_who_takes_an_event_may_cancel_whoever_waits_for_them(stream):
    mishaps: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: mishaps.append(context))
    entry, events = stream()
    taking: asyncio.Task[bool] = asyncio.create_task(events.each(lambda _: taking.cancel()))
    await asyncio.sleep(0)
    entry.deliver(TokenEvent(0, [1]))
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert mishaps == []


async def test_the_error_that_ends_a_request_is_raised_after_what_came_before(stream):
    entry, events = stream()
    taken: list[ClientEvent] = []
    taking = asyncio.create_task(events.each(taken.append))
    await asyncio.sleep(0)
    entry.deliver(TokenEvent(0, [1]))
    entry.fail(RemoteError("it is gone"))
    with pytest.raises(RemoteError, match="it is gone"):
        await taking
    assert tokens_of(taken) == [[1]]
    assert await events.each(taken.append) is False


async def test_who_is_cancelled_takes_no_more(stream):
    entry, events = stream()
    taken: list[ClientEvent] = []
    taking = asyncio.create_task(events.each(taken.append))
    await asyncio.sleep(0)
    entry.deliver(TokenEvent(0, [1]))
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    entry.deliver(TokenEvent(1, [2]))
    await asyncio.sleep(0)
    assert taken == []
    await events.aclose()
    assert entry.finish_reason == "abort"


@pytest.mark.parametrize("n", [1, 3])
async def test_through_a_scheduler_it_is_the_same_as_one_by_one(make_scheduler, pair, n):
    scheduler: CpuScheduler = await make_scheduler(*pair)
    found: list[list[tuple[int, int]]] = []
    for number in range(2):
        request = GenerateRequest(f"r{number}", (7,) * 4, SamplingParams(max_tokens=20, n=n))
        events = scheduler.submit(request)
        tokens: list[tuple[int, int]] = []
        ends: list[int] = []

        def take(event: ClientEvent, tokens=tokens, ends=ends) -> bool:
            if isinstance(event, RequestFinished):
                ends.append(event.choice)
            else:
                tokens += [(event.choice, token) for token in event.token_ids]
            return False

        if number:
            assert await asyncio.wait_for(events.each(take), 30) is False
        else:
            async for event in events:
                take(event)
        assert sorted(ends) == list(range(n))
        found.append(sorted(tokens))
    assert found[0] == found[1]
    assert len(found[0]) == 20 * n


async def test_a_request_that_is_refused_later_says_so_to_who_takes_each(make_scheduler, pair):
    scheduler: CpuScheduler = await make_scheduler(*pair)
    with pytest.raises(InvalidRequest):
        await scheduler.submit(GenerateRequest("r", (), SamplingParams())).each(lambda _: False)
