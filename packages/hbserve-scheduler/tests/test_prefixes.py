"""Requests go where their prompts are cached, as instances say it, and not for any price."""

import asyncio
from typing import Any

import pytest

from hbserve_rpc import PeerLost, RemoteError
from hbserve_rpc.messages import CACHED_PREFIXES, CachedPrefixes, CachedPrefixesRequest, InstanceInfo
from hbserve_rpc.prompt_shape import PromptShape, shape_of
from hbserve_scheduler import SchedulerConfig
from hbserve_scheduler.instances import InstanceHandle
from hbserve_scheduler.policies import Available, PrefixAware
from hbserve_scheduler.prefixes import AT_ONCE, Prefixes
from hbserve_scheduler.virtual_time import VirtualTimeLoop

BLOCK = 4
PROMPT = list(range(100, 140))


def handle(name: str, role: Any = "prefill", load: int = 0) -> InstanceHandle:
    made = InstanceHandle(name, role, "127.0.0.1:1", SchedulerConfig(), lambda _: None, lambda _: None)
    made._set_info(InstanceInfo(name, role, name, "ready", block_size=BLOCK))
    made.load, made.turn = load, int(name[1:])
    return made


def digests(num_tokens: int, prompt: list[int] = PROMPT) -> list[bytes]:
    return shape_of(prompt[:num_tokens], BLOCK).digests


class Handles:
    """Some instances that are available, and what is known of their caches."""

    def __init__(self, *loads: int, role: Any = "prefill") -> None:
        self.prefixes = Prefixes()
        self.all = [handle(f"i{number}", role, load) for number, load in enumerate(loads)]
        self.available = Available(PrefixAware(self.prefixes), lambda each: each.load < 1000)
        for each in self.all:
            self.available.update(each)

    def chosen(self, prompt: list[int] = PROMPT) -> int:
        return self.all.index(self.available.choose(shape_of(prompt, BLOCK)))


def test_the_longest_prefix_is_found_among_those_that_are_asked_for():
    handles = Handles(0, 0, 0)
    one, two, three = handles.all
    handles.prefixes.set(one, digests(8))
    handles.prefixes.set(two, digests(24))
    handles.prefixes.set(three, digests(40, [7, *PROMPT]))

    def longest(*among: InstanceHandle) -> Any:
        num_blocks, holders = handles.prefixes.longest(digests(40), among)
        return num_blocks, [*holders]

    assert longest(one, two, three) == (6, [two])
    assert longest(one, three) == (2, [one])
    assert longest(three) == (0, [])
    assert handles.prefixes.num_cached(digests(40), two) == 6
    assert handles.prefixes.num_cached(digests(12), two) == 3
    assert handles.prefixes.num_cached(digests(40), handle("i9")) == 0


def test_what_an_instance_holds_no_more_is_forgotten_altogether():
    prefixes, one, two = Prefixes(), handle("i0"), handle("i1")
    prefixes.set(one, digests(24))
    prefixes.set(two, digests(8))
    prefixes.set(one, digests(40, [7, *PROMPT]))
    assert prefixes.longest(digests(40), [one, two])[0] == 2
    for each in (one, two):
        prefixes.set(each, ())
    assert not prefixes._holders
    assert not prefixes._held


def test_a_request_goes_to_who_holds_its_prompt_and_to_the_idler_of_two_if_nobody_does():
    handles = Handles(10, 0, 5)
    handles.prefixes.set(handles.all[0], digests(40))
    assert {handles.chosen() for _ in range(30)} == {0}
    assert {handles.chosen([7, *PROMPT]) for _ in range(60)} == {1, 2}


def test_who_holds_more_of_a_prompt_is_preferred_and_of_those_that_hold_the_same_the_idler():
    handles = Handles(3, 2, 5, 0, 6, 9)
    for number, num_tokens in enumerate((24, 24, 24, 8, 16)):
        handles.prefixes.set(handles.all[number], digests(num_tokens))
    chosen = [handles.chosen() for _ in range(300)]
    assert {*chosen} == {0, 1, 2}, "the others hold less; and several schedulers should not all take the same one"
    assert chosen.count(1) > 150, "one of two that are looked at anyway may be another that holds as much"


@pytest.mark.parametrize(("role", "spare"), [("prefill", 20), ("decode", 4), ("hybrid", 4)])
def test_an_instance_that_has_too_much_to_do_is_not_chosen_for_its_cache(role, spare):
    """Of a prefill instance too much is more than the cached part of the prompt: to wait would take longer."""
    for load, chosen in ((spare, 0), (spare + 1, 1)):
        handles = Handles(load, 0, role=role)
        handles.prefixes.set(handles.all[0], digests(20))
        assert handles.chosen() == chosen


def test_a_prefix_that_all_hold_is_looked_for_in_few():
    class Counted(Prefixes):
        num_seen = 0

        def longest(self, digests: Any, among: Any) -> Any:
            num_blocks, holders = super().longest(digests, among)

            def seen() -> Any:
                for each in holders:
                    Counted.num_seen += 1
                    yield each

            return num_blocks, seen()

    prefixes = Counted()
    available = Available(PrefixAware(prefixes), lambda _: True)
    for number in range(500):
        each = handle(f"i{number}", load=number)
        prefixes.set(each, digests(40 if number % 2 else 20))
        available.update(each)
    for _ in range(20):
        available.choose(PromptShape(40, 0, digests(40)))
    assert Counted.num_seen <= 20 * 32


class Answering:
    """In place of an instance's RpcClient."""

    def __init__(self) -> None:
        self.held, self.version, self.asked = digests(40), 3, list[Any]()
        self.error: Exception | None = None

    async def call(self, method: Any, request: CachedPrefixesRequest, *, timeout_s: float) -> CachedPrefixes:
        assert method is CACHED_PREFIXES
        self.asked.append(request.known)
        if self.error is not None:
            raise self.error
        return CachedPrefixes(self.version, None if request.known == self.version else b"".join(self.held))


def test_instances_are_asked_again_and_again_and_say_only_what_is_new():
    async def job() -> None:
        prefixes, one = Prefixes(), handle("i0")
        client = Answering()
        one.client = client  # type: ignore[assignment]
        keeping = asyncio.create_task(prefixes.keep(lambda: [one], 1.0))
        await asyncio.sleep(2.5)
        assert client.asked == [-1, 3, 3]
        assert prefixes.num_cached(digests(40), one) == 10
        client.held, client.version = digests(8), 4
        await asyncio.sleep(1)
        assert prefixes.num_cached(digests(40), one) == 2
        client.error = RemoteError("of an older version")
        await asyncio.sleep(1)
        assert prefixes.num_cached(digests(40), one) == 2, "it may come back"
        client.error = None
        one._set_info(InstanceInfo("i0", "prefill", "another life", "ready", block_size=BLOCK))
        await asyncio.sleep(1)
        assert client.asked[-1] == -1, "what its former life has said is not known of this one"
        client.error = PeerLost("gone")
        one.lost("gone")
        await asyncio.sleep(1)
        assert prefixes.num_cached(digests(40), one) == 0
        keeping.cancel()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(job())


def test_a_long_report_is_taken_in_part_by_part_and_others_go_on_meanwhile():
    async def job() -> None:
        prefixes, one, client, num_turns = Prefixes(), handle("i0"), Answering(), 0
        one.client = client  # type: ignore[assignment]

        async def count_turns() -> None:
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count_turns())
        for client.version, num_changes in ((10, 20 * AT_ONCE), (11, 40 * AT_ONCE)):
            client.held = [f"{client.version}{number:06}".encode() for number in range(20 * AT_ONCE)]
            before = num_turns
            await prefixes._ask(one)
            assert num_turns - before >= num_changes // AT_ONCE
            assert {*prefixes._holders} == {*client.held}
        counting.cancel()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(job())
