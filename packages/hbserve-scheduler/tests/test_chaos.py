"""Whatever happens to requests and instances, every request ends and every place is given back."""

import asyncio
import random

import pytest

from hbserve_rpc import HBServeRpcError, InvalidRequest, Overloaded, RemoteError


@pytest.mark.parametrize("free_blocks", [0, 1000], ids=["reserved first", "computed before the grant"])
@pytest.mark.parametrize("seed", range(3))
async def test_random_failures_aborts_and_restarts_leave_nothing_behind(
    make_scheduler, make_instance, ask, collect, seed, free_blocks
):
    """Each stream is right as far as it goes, which `collect` checks; the teardown checks that nothing is left."""
    chance = random.Random(seed)
    kinds = [("prefill", "p0"), ("prefill", "p1"), ("decode", "d0"), ("decode", "d1")]
    instances = [await make_instance(*kind) for kind in kinds]
    for instance in instances:
        instance.free_blocks = free_blocks
    scheduler = await make_scheduler(*instances, max_inflight_prefills=4, max_pending_reservations=2)
    ends: list[str] = []

    async def one(number: int) -> None:
        await asyncio.sleep(chance.random() * 0.5)
        max_tokens = chance.randint(1, 30)
        events = scheduler.submit(ask(f"r{number}", length=chance.randint(1, 60), max_tokens=max_tokens))
        if chance.random() < 0.2:
            await anext(events, None)
            await events.aclose()
            ends.append("left")
            return
        try:
            tokens, end = await collect(events)
        except HBServeRpcError as error:
            ends.append(type(error).__name__)
        else:
            assert tokens == [100 + i for i in range(len(tokens))]
            assert end.finish_reason == "abort" or len(tokens) == max_tokens
            ends.append(end.finish_reason)

    async def disturb() -> None:
        for _ in range(40):
            await asyncio.sleep(0.02)
            instance = chance.choice(instances)
            phase = chance.choice(["grant", "first", "done", "tokens"])
            error = chance.choice([RemoteError("chaos"), Overloaded("chaos"), InvalidRequest("chaos")])
            instance.fail[phase].append(error)
            if chance.random() < 0.1:
                await instance.restart()
            await scheduler.abort(f"r{chance.randrange(150)}")
            if chance.random() < 0.3:  # nobody grants or computes for a moment, so that others meet requests there
                phase, held = chance.choice(["grant", "first"]), chance.sample(instances, 2)
                for instance in held:
                    instance.hold.add(phase)
                await asyncio.sleep(0.03)
                for instance in held:
                    instance.release()

    async with asyncio.timeout(50):
        results = await asyncio.gather(disturb(), *(one(i) for i in range(150)), return_exceptions=True)
    unexpected = [each for each in results if isinstance(each, Exception) and not isinstance(each, HBServeRpcError)]
    assert unexpected == []
    assert ends.count("length") > 50
    early = sum(request.grant_follows for instance in instances[:2] for request in instance.requests)
    assert early > 50 if free_blocks else early == 0
    assert not any(instance.granted for instance in instances)
