"""Streams: items in order, credit, and an end on both sides."""

import asyncio

import pytest

from hbserve_rpc import RemoteError, RpcServer, wire


@pytest.fixture
def counting(rpc, start, connect):
    """A server that counts up to what it is asked, a client of it, and what the server noticed."""

    async def make():
        seen = {"sent": 0, "closed": asyncio.Event()}

        async def count(ask):
            try:
                for value in range(ask.value):
                    yield rpc.Ask(value)
                    seen["sent"] = value + 1
                if ask.value == 13:
                    raise ValueError("unlucky")
            finally:
                seen["closed"].set()

        server = RpcServer()
        server.serve_stream(rpc.STREAM, count)
        await start(server)
        return await connect(server.address), seen

    return make


async def test_items_arrive_in_order_and_the_stream_ends(rpc, counting):
    client, _ = await counting()
    for length in (0, 1, wire.CREDIT - 1, wire.CREDIT, 10 * wire.CREDIT + 1):
        items = [item.value async for item in client.stream(rpc.STREAM, rpc.Ask(length))]
        assert items == list(range(length))


async def test_an_error_comes_after_the_items_before_it(rpc, counting):
    client, _ = await counting()
    items = []
    stream = client.stream(rpc.STREAM, rpc.Ask(13))
    for _ in range(13):
        items.append(await anext(stream))
    with pytest.raises(RemoteError, match="ValueError: unlucky"):
        await anext(stream)
    assert [item.value for item in items] == list(range(13))


async def test_a_client_that_does_not_read_stops_the_server_at_its_credit(rpc, counting):
    client, seen = await counting()
    stream = client.stream(rpc.STREAM, rpc.Ask(10_000))
    await anext(stream)
    async with asyncio.timeout(20):
        while seen["sent"] < wire.CREDIT:
            await asyncio.sleep(0.01)
    for _ in range(20):  # it could go on now, if nothing held it
        await asyncio.sleep(0.01)
    assert seen["sent"] == wire.CREDIT
    assert [item.value async for item in stream] == list(range(1, 10_000))


async def test_closing_a_stream_closes_the_servers_generator(rpc, counting):
    client, seen = await counting()
    async with client.stream(rpc.STREAM, rpc.Ask(10_000)) as stream:
        await anext(stream)
    async with asyncio.timeout(20):
        await seen["closed"].wait()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_closed_client_ends_its_streams_on_the_server(rpc, counting):
    client, seen = await counting()
    await anext(client.stream(rpc.STREAM, rpc.Ask(10_000)))
    await client.close()
    async with asyncio.timeout(30):
        await seen["closed"].wait()
