"""Streams: items in order, credit, and an end on both sides."""

import asyncio
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from hbserve_rpc import PeerLost, ProtocolMismatch, RemoteError, RpcServer, RpcTimeout, StreamMethod, wire
from hbserve_rpc.messages import TokenEvent
from hbserve_rpc.trace_context import TRACEPARENT, in_trace


@pytest.fixture
def counting(rpc, start, connect):
    """A server that counts up to what it is asked, a client of it, and what the server noticed."""

    async def make():
        seen: dict[str, Any] = {"sent": 0, "closed": asyncio.Event()}

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


async def test_items_are_given_one_after_the_other_as_they_come_to_whoever_takes_each(rpc, counting):
    client, _ = await counting()
    taken: list[int] = []

    def take(item):
        taken.append(item.value)
        return False

    for length in (0, 1, wire.CREDIT, 10 * wire.CREDIT + 1):
        taken.clear()
        stream = client.stream(rpc.STREAM, rpc.Ask(length))
        if length > 1:  # some have come before
            take(await anext(stream))
        await stream.each(take)
        assert taken == list(range(length))
    taken.clear()
    with pytest.raises(RemoteError, match="unlucky"):
        await client.stream(rpc.STREAM, rpc.Ask(13)).each(take)
    assert taken == list(range(13))


async def test_who_takes_each_item_may_have_enough_or_fail_which_is_not_the_connections_end(rpc, counting):
    client, seen = await counting()
    taken: list[int] = []

    def take(item):
        if item.value == 5:
            raise KeyError("of the taker")
        taken.append(item.value)
        return item.value == 3

    async with client.stream(rpc.STREAM, rpc.Ask(1000)) as stream:
        await stream.each(take)
        assert taken == [0, 1, 2, 3], "no further one is taken"
        with pytest.raises(KeyError, match="of the taker"):
            await stream.each(take)
        assert (await anext(stream)).value == 6
    await asyncio.wait_for(seen["closed"].wait(), 10)
    assert [item.value async for item in client.stream(rpc.STREAM, rpc.Ask(2))] == [0, 1]


async def test_who_takes_each_item_may_cancel_whoever_waits_for_them(rpc, counting):
    mishaps: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: mishaps.append(context))
    client, seen = await counting()

    async def read(has_enough: bool) -> None:
        def take(_: Any) -> bool:
            reading.cancel()
            return has_enough

        async with client.stream(rpc.STREAM, rpc.Ask(1000)) as stream:
            await stream.each(take)

    for has_enough in (True, False):
        seen["closed"].clear()
        reading = asyncio.create_task(read(has_enough))
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.wait_for(seen["closed"].wait(), 10)
    assert mishaps == [], "the reader of messages has no part in it"
    assert [item.value async for item in client.stream(rpc.STREAM, rpc.Ask(2))] == [0, 1]


async def test_a_stream_belongs_to_the_trace_of_whoever_asks_for_it_and_so_does_what_its_handler_asks(
    rpc, start, connect
):
    seen = []

    async def last(_):
        seen.append(TRACEPARENT.get())
        yield rpc.Ask(0)

    behind = RpcServer()
    behind.serve_stream(rpc.STREAM, last)
    await start(behind)
    onward = await connect(behind.address)

    async def first(ask):
        async for item in onward.stream(rpc.STREAM, ask):
            yield item

    server = RpcServer()
    server.serve_stream(rpc.STREAM, first)
    await start(server)
    client = await connect(server.address)
    traces = [f"00-{'0af7651916cd43dd' * 2}-b7ad6b716920333{number}-01" for number in range(2)]
    for trace in (*traces, "none of them", ""):
        with in_trace(trace):
            stream = client.stream(rpc.STREAM, rpc.Ask(1))
        assert [item async for item in stream] == [rpc.Ask(0)]
    assert seen == [*traces, "", ""]


def test_who_sends_what_is_no_traceparent_is_not_understood():
    known = wire.Open(1, "test.stream", f"00-{'a' * 32}-{'b' * 16}-01")
    assert wire.decode_from_client(wire.encode(known)) == known
    for wrong in ("\n", "x", known.traceparent + "\n", known.traceparent * 2):
        with pytest.raises(msgspec.ValidationError, match=r"\$\.traceparent"):
            wire.decode_from_client(wire.encode(wire.Open(1, "test.stream", wrong)))


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


async def test_what_many_streams_bring_in_one_step_is_one_message_and_so_is_their_credit(
    rpc, start, connect, monkeypatch
):
    num_streams, num_steps = 20, wire.CREDIT
    steps, begun = [asyncio.Event() for _ in range(num_steps)], list[int]()

    async def follow(ask):
        begun.append(ask.value)
        for number, step in enumerate(steps):
            await step.wait()
            yield rpc.Ask(ask.value + number)

    server = RpcServer()
    server.serve_stream(rpc.STREAM, follow)
    await start(server)
    client = await connect(server.address)
    sent: dict[str, list[Any]] = {"server": [], "client": []}
    for name, side in (("server", server), ("client", client)):

        def noting(frames, note=sent[name], send=side._socket.send):
            error = send(frames)
            if error != zmq.EAGAIN:  # else it is sent again
                note.append(frames)
            return error

        monkeypatch.setattr(side._socket, "send", noting)

    async def collect(first):
        return [item.value async for item in client.stream(rpc.STREAM, rpc.Ask(first))]

    collecting = [asyncio.create_task(collect(1000 * i)) for i in range(num_streams)]
    async with asyncio.timeout(20):
        while len(begun) < num_streams:
            await asyncio.sleep(0.001)
        for number, step in enumerate(steps):
            step.set()
            while len([1 for frames in sent["server"] if b"Items" in frames[1]]) <= number:
                await asyncio.sleep(0)
        found = await asyncio.gather(*collecting)
    assert found == [[1000 * i + number for number in range(num_steps)] for i in range(num_streams)]
    items = [wire.decode_from_server(frames[1]) for frames in sent["server"] if b"Items" in frames[1]]
    assert [len(each.items) for each in items] == [num_streams] * num_steps
    credits = [wire.decode_from_client(frames[0]) for frames in sent["client"] if b"Credits" in frames[0]]
    counts = [count for each in credits for count in each.counts]
    assert {id_ for id_, _ in counts} == {id_ for each in items for id_, _, _ in each.items}
    assert len(credits) < len(counts) / 2


async def test_a_stream_without_credit_holds_up_no_other(rpc, counting):
    client, _ = await counting()
    unread = client.stream(rpc.STREAM, rpc.Ask(10_000))
    await anext(unread)
    async with asyncio.timeout(20):
        assert [item.value async for item in client.stream(rpc.STREAM, rpc.Ask(1000))] == list(range(1000))
    await unread.aclose()


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
    other: StreamMethod[Any, Any] = StreamMethod(rpc.STREAM.name, rpc.Ask, Other)
    with pytest.raises(ProtocolMismatch, match=r"test\.stream with"):
        await anext(client.stream(other, rpc.Ask(10_000)))
    async with asyncio.timeout(20):
        await seen["closed"].wait()


async def test_what_is_no_token_ends_the_stream_that_brings_it(rpc, start, connect):
    server = RpcServer()
    tokens: StreamMethod[Any, TokenEvent] = StreamMethod("test.tokens", rpc.Ask, TokenEvent)

    async def tell(_):
        yield TokenEvent(0, [0, 5])
        yield TokenEvent(2, [5, -1])

    server.serve_stream(tokens, tell)
    await start(server)
    stream = (await connect(server.address)).stream(tokens, rpc.Ask())
    assert (await anext(stream)).token_ids == [0, 5]
    with pytest.raises(ProtocolMismatch, match=r"test\.tokens with .*>= 0"):
        await anext(stream)


@pytest.mark.parametrize(("count", "is_whole"), [(2, True), (None, True), (3, False), (1, False)])
async def test_a_stream_whose_last_items_are_lost_ends_in_an_error(rpc, connect, count, is_whole):
    """An older server does not say how many there were: then nobody can know."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        client = await connect(f"127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", heartbeat_timeout_s=20)
        stream = client.stream(rpc.STREAM, rpc.Ask(3))
        reading = asyncio.create_task(anext(stream))
        async with asyncio.timeout(20):
            envelope = None
            while not isinstance(envelope, wire.Open):
                identity, head, _ = await socket.recv_multipart()
                envelope = wire.decode_from_client(head)
            items = [(envelope.id, number, msgspec.Raw(wire.encode(rpc.Ask(number)))) for number in range(2)]
            for each in (
                wire.Welcome(wire.PROTOCOL_VERSION, "e"),
                wire.Items("e", items),
                {"type": "End", "epoch": "e", "id": envelope.id} | ({} if count is None else {"count": count}),
            ):
                await socket.send_multipart([identity, wire.encode(each), b""])
            assert [(await reading).value, (await anext(stream)).value] == [0, 1]
            with pytest.raises(StopAsyncIteration if is_whole else PeerLost) as ended:
                await anext(stream)
    if not is_whole:
        told = f"has sent 2 items of test.stream, which has {count}: the others are lost"
        assert str(ended.value) == f"{client.address} {told}"


async def test_a_server_says_how_many_items_there_were(rpc, counting):
    client, _ = await counting()
    ends, handle = [], client._handle

    def noted(envelope, body):
        ends.append(envelope)
        handle(envelope, body)

    client._handle = noted
    for length in (0, 5, 2 * wire.CREDIT):
        assert len([item async for item in client.stream(rpc.STREAM, rpc.Ask(length))]) == length
    assert [each.count for each in ends if isinstance(each, wire.End)] == [0, 5, 2 * wire.CREDIT]


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
