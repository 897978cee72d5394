"""A network that is lost for longer than a heartbeat timeout, and comes back."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

import pytest

from hbserve_rpc import PeerLost, RpcClient, RpcServer
from hbserve_testing.namespaces import enter, set_namespace

HOSTS = {"here": "10.79.0.1", "there": "10.79.0.2"}
LOST_S = 14.0
"""The kernel tries an old connection again after 0.2 s, 0.4 s and so on: 12.6 s after the loss, and then 25.4 s."""

pytestmark = pytest.mark.netns


@contextlib.contextmanager
def on_host(namespace: str) -> Iterator[None]:
    """This thread, and the threads that it starts, in a network namespace."""
    before = enter(namespace)
    try:
        yield
    finally:
        set_namespace(before)


async def test_a_server_is_reached_again_soon_after_its_network_is_back(rpc, start, make_network):
    network = make_network(HOSTS)
    server = RpcServer(HOSTS["there"], 0)

    async def answer(request):
        return request

    server.serve(rpc.CALL, answer)
    with on_host(network.namespace("there")):
        await start(server)
    client = RpcClient(server.address, heartbeat_interval_s=0.1, heartbeat_timeout_s=1.0)
    with on_host(network.namespace("here")):
        await start(client)
        assert await client.call(rpc.CALL, rpc.Ask(1), timeout_s=10) == rpc.Ask(1)
    network.cut("there")
    began_s = time.monotonic()
    with pytest.raises(PeerLost):
        await client.call(rpc.CALL, rpc.Ask(2), timeout_s=10)
    await asyncio.sleep(began_s + LOST_S - time.monotonic())
    network.mend("there")
    async with asyncio.timeout(LOST_S / 2):
        while True:
            with contextlib.suppress(PeerLost):
                assert await client.call(rpc.CALL, rpc.Ask(3), timeout_s=LOST_S) == rpc.Ask(3)
                return
