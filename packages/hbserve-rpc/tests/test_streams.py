"""Streams: items in order, credit, and an end on both sides."""

import asyncio

import msgspec
import pytest

from hbserve_rpc import ProtocolMismatch, RemoteError, RpcServer, RpcTimeout, StreamMethod, wire


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


async def test_an_item_that_does_not_come_in_time_ends_the_stream_on_both_sides(rpc, start, connect):
    closed = asyncio.Event()

    async def once(ask):
        try:
            yield ask
            await asyncio.sleep(600)
        finally:
            closed.set()

    server = RpcServer()
    server.serve_stream(rpc.STREAM, once)
    await start(server)
    stream = (await connect(server.address)).stream(rpc.STREAM, rpc.Ask(), timeout_s=0.3)
    await anext(stream)
    with pytest.raises(RpcTimeout, match=r"test\.stream within 0\.3 s"):
        await anext(stream)
    async with asyncio.timeout(20):
        await closed.wait()


class Other(msgspec.Struct, frozen=True, tag=True):
    text: str = ""


async def test_an_item_of_another_type_ends_the_stream_on_both_sides(rpc, counting):
    client, seen = await counting()
    other = StreamMethod(rpc.STREAM.name, rpc.Ask, Other)
    with pytest.raises(ProtocolMismatch, match=r"test\.stream with"):
        await anext(client.stream(other, rpc.Ask(10_000)))
    async with asyncio.timeout(20):
        await seen["closed"].wait()


async def test_a_lost_item_ends_the_stream_on_both_sides(rpc, counting):
    client, seen = await counting()
    stream = client.stream(rpc.STREAM, rpc.Ask(10_000))
    await anext(stream)
    stream._num_received += 1
    with pytest.raises(ConnectionError, match="lost item"):
        [item async for item in stream]
    async with asyncio.timeout(20):
        await seen["closed"].wait()


async def test_a_generator_whose_own_work_was_cancelled_fails_its_stream(rpc, start, connect):
    async def wait_for_what_is_cancelled(ask):
        yield ask
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    server = RpcServer()
    server.serve_stream(rpc.STREAM, wait_for_what_is_cancelled)
    await start(server)
    stream = (await connect(server.address)).stream(rpc.STREAM, rpc.Ask())
    await anext(stream)
    async with asyncio.timeout(20):
        with pytest.raises(RemoteError, match="CancelledError"):
            await anext(stream)


async def test_one_slow_stream_holds_up_no_other(rpc, counting):
    client, _ = await counting()
    slow = client.stream(rpc.STREAM, rpc.Ask(10_000))
    await anext(slow)
    async with asyncio.timeout(20):
        assert len([item async for item in client.stream(rpc.STREAM, rpc.Ask(500))]) == 500
    await slow.aclose()
    await slow.aclose()


async def test_a_stream_that_was_never_read_asks_nothing_of_the_server(rpc, counting):
    client, seen = await counting()
    async with client.stream(rpc.STREAM, rpc.Ask(3)):
        pass
    assert [item.value async for item in client.stream(rpc.STREAM, rpc.Ask(1))] == [0]
    assert seen["sent"] == 1
