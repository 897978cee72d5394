"""The rendezvous of the two ends of a link."""

import asyncio

import pytest

from hbserve_kv.transports.base import MAX_BYTES, MAX_VALUES, HeldRendezvous
from hbserve_kv.transports.nccl import link_store


async def test_who_asks_before_it_is_told_waits_for_it_and_all_hear_the_same():
    held = HeldRendezvous()
    asking = [asyncio.create_task(held.get("0/1")) for _ in range(3)]
    await asyncio.sleep(0)
    asking.pop().cancel()
    await held.set("0/1", b"here")
    assert await asyncio.gather(*asking, held.get("0/1")) == [b"here"] * 3


async def test_the_end_of_the_link_ends_every_wait():
    held = HeldRendezvous()
    asking = asyncio.create_task(held.get("0"))
    in_a_thread = asyncio.create_task(asyncio.to_thread(link_store(held, 60).get, "1"))
    while len(held._values) < 2:
        await asyncio.sleep(0.001)
    held.end()
    for waiting in (asking, in_a_thread, held.get("2"), held.set("2", b"")):
        with pytest.raises(ConnectionError, match="the link has ended"):
            await waiting


async def test_a_peer_cannot_fill_the_memory_nor_say_otherwise_later():
    held = HeldRendezvous()
    with pytest.raises(ValueError, match="1048577 bytes"):
        await held.set("long", bytes(MAX_BYTES + 1))
    for name in range(MAX_VALUES):
        await held.set(str(name), b"")
    with pytest.raises(ValueError, match="set once"):
        await held.set("0", b"other")
    with pytest.raises(ValueError, match="64 values already"):
        await held.set("one more", b"")


async def test_the_store_of_a_process_group_gives_up_after_its_timeout():
    store = link_store(HeldRendezvous(), timeout_s=0.01)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(store.get, "nobody tells it")
    await asyncio.to_thread(store.set, "told", b"value")
    await asyncio.to_thread(store.wait, ["told"])
    assert not store.check(["exception_dump"]), "what NCCL's watchdog looks for"
    assert await asyncio.to_thread(store.get, "told") == b"value"


async def test_the_store_of_a_loop_that_has_ended_is_an_error_and_no_endless_wait():
    def make():
        async def store():
            return link_store(HeldRendezvous(), timeout_s=60)

        return asyncio.run(store())

    store = await asyncio.to_thread(make)
    with pytest.raises(ConnectionError, match="event loop"):
        await asyncio.to_thread(store.get, "0")
