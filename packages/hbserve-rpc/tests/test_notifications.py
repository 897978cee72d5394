"""Notifications: messages that nobody answers."""

import asyncio

import msgspec
import pytest

from hbserve_rpc import InvalidRequest, Notification, PeerLost, RpcClient, RpcServer, calling_peer, wire


@pytest.fixture(params=["task", "function"])
def telling(request, rpc, start, connect):
    """A server that writes down what it is told and asked, and a client of it. Its handler of notifications is either
    kind."""

    async def make():
        heard = []

        def tell_now(ask):
            heard.append(("told", ask.value))
            if ask.value == 13:
                raise KeyError("unlucky")
            if ask.value == 14:
                raise InvalidRequest("no")

        async def tell(ask):
            tell_now(ask)

        async def call(ask):
            heard.append(("called", ask.value))
            return ask

        async def stream(ask):
            heard.append(("streamed", ask.value))
            yield ask

        server = RpcServer()
        server.serve_notification(rpc.TELL, tell if request.param == "task" else tell_now)
        server.serve(rpc.CALL, call)
        server.serve_stream(rpc.STREAM, stream)
        await start(server)
        return await connect(server.address), server, heard

    return make


async def test_notifications_are_handled_in_order_among_calls_and_streams(rpc, telling):
    client, server, heard = await telling()
    asked = []
    for number in range(0, 300, 3):
        client.notify(rpc.TELL, rpc.Ask(1000 + number))
        asked.append(asyncio.create_task(client.call(rpc.CALL, rpc.Ask(number + 1), timeout_s=20)))
        asked.append(asyncio.create_task(anext(client.stream(rpc.STREAM, rpc.Ask(number + 2)))))
        await asyncio.sleep(0)  # the two tasks send
    await asyncio.gather(*asked)
    kinds = ["told", "called", "streamed"]
    assert heard == [(kinds[i % 3], i + 1000 * (i % 3 == 0)) for i in range(300)]
    assert server.failed_notifications == 0


async def test_a_notification_that_fails_is_logged_and_counted_and_stops_nothing(rpc, telling, caplog):
    client, server, heard = await telling()
    for value in (13, 14, 15):
        client.notify(rpc.TELL, rpc.Ask(value))
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    assert heard == [("told", 13), ("told", 14), ("told", 15), ("called", 0)]
    assert server.failed_notifications == 2
    assert "KeyError: 'unlucky'" in caplog.text
    assert "notification test.tell failed: no" in caplog.text


async def test_a_notification_that_is_not_served_or_not_readable_is_counted(rpc, telling, caplog):
    class Other(msgspec.Struct, frozen=True, tag=True):
        text: str

    client, server, heard = await telling()
    client.notify(Notification("test.unknown", rpc.Ask), rpc.Ask())
    client.notify(Notification("test.tell", Other), Other("?"))
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    assert heard == [("called", 0)]
    assert server.failed_notifications == 2
    assert "does not serve 'test.unknown'; it serves ['test.tell']" in caplog.text


async def test_what_a_restarted_server_missed_is_not_told_to_it_and_a_call_says_so(rpc, telling, start, connect):
    client, server, heard = await telling()
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    await server.stop()
    told = []

    async def tell(ask):
        told.append(ask.value)

    client.notify(rpc.TELL, rpc.Ask(1))
    waiting = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(2), timeout_s=20))
    await asyncio.sleep(0)
    again = RpcServer(port=server.port)
    again.serve_notification(rpc.TELL, tell)
    await start(again)
    with pytest.raises(PeerLost, match="restarted"):
        await waiting
    assert told == []
    assert ("told", 1) not in heard


async def test_stopping_the_server_ends_what_a_notification_started(rpc, start, connect):
    began, stopped = asyncio.Event(), asyncio.Event()

    async def linger(ask):
        try:
            began.set()
            await asyncio.sleep(60)
        finally:
            stopped.set()

    server = RpcServer()
    server.serve_notification(rpc.TELL, linger)
    await start(server)
    client = await connect(server.address)
    client.notify(rpc.TELL, rpc.Ask())
    async with asyncio.timeout(20):
        await began.wait()
        await server.stop()
        await stopped.wait()
    assert server.failed_notifications == 0


async def test_a_plain_handler_knows_its_caller_and_is_not_called_for_a_client_that_has_left(rpc, start, connect):
    callers, heard = [], []

    def tell(ask):
        heard.append(ask.value)
        callers.append(calling_peer().connection)

    async def name(ask):
        callers.append(calling_peer().connection)
        return ask

    server = RpcServer()
    server.serve_notification(rpc.TELL, tell)
    server.serve(rpc.CALL, name)
    await start(server)
    one, other = [await connect(server.address) for _ in range(2)]
    for client in (one, other):
        client.notify(rpc.TELL, rpc.Ask(1))
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    assert callers[0] == callers[1] != callers[2] == callers[3]
    notify = wire.Notify(7, rpc.TELL.name)
    server._handle(callers[0], notify, msgspec.msgpack.encode(rpc.Ask(2)))
    server._handle(callers[0], wire.Goodbye(), b"")
    await asyncio.sleep(0)
    await other.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    assert heard == [1, 1]


async def test_a_client_that_is_not_started_or_is_closed_says_so(rpc, start):
    server = await start(RpcServer())
    client = RpcClient(server.address)
    with pytest.raises(PeerLost, match="not started"):
        client.notify(rpc.TELL, rpc.Ask())
    await client.start()
    await client.close()
    with pytest.raises(PeerLost, match="not started"):
        client.notify(rpc.TELL, rpc.Ask())
