"""MessageSocket: no message is overlooked, none waits for others too long, and none comes after the end."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from operator import methodcaller

import pytest
import zmq

from hbserve_rpc.message_socket import MESSAGES_PER_TURN, MessageSocket, SharedContext
from hbserve_testing.narrowing import of_type
from hbserve_testing.waits import until

NUM_MESSAGES = 10 * MESSAGES_PER_TURN


class Pair:
    """A ROUTER and a DEALER that is connected to it; what came to each."""

    def __init__(self) -> None:
        self.at_router: list[list[bytes]] = []
        self.at_dealer: list[list[bytes]] = []
        self.router = MessageSocket(zmq.ROUTER, {}, self.at_router.append, SharedContext())
        self.dealer = MessageSocket(zmq.DEALER, {zmq.IDENTITY: b"dealer"}, self.at_dealer.append, SharedContext())
        self.router.open(lambda socket: socket.bind("tcp://127.0.0.1:*"))
        address = of_type(bytes, self.router._socket.getsockopt(zmq.LAST_ENDPOINT)).decode()
        self.dealer.open(lambda socket: socket.connect(address))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    pair.dealer.close()
    pair.router.close()


async def test_all_messages_come_in_order_and_the_loop_goes_on_between_them(pair):
    pair.dealer.send([b"first"])
    await until(lambda: pair.at_router)
    for number in range(NUM_MESSAGES):
        pair.dealer.send([b"%d" % number])
    turns: list[int] = []
    while len(pair.at_router) < 1 + NUM_MESSAGES:
        turns.append(len(pair.at_router))
        await asyncio.sleep(0)
    assert [int(body) for _, body in pair.at_router[1:]] == list(range(NUM_MESSAGES))
    assert max(after - before for before, after in itertools.pairwise(turns)) <= MESSAGES_PER_TURN


async def test_a_message_that_came_while_others_were_sent_is_not_overlooked(pair):
    """Sending takes away what would tell the loop of it."""
    pair.dealer.send([b"hello"])
    await until(lambda: pair.at_router)
    for number in range(200):
        pair.router.send([b"dealer", b"%d" % number])
        for _ in range(20):
            pair.dealer.send([b"meanwhile"])
        await until(lambda number=number: len(pair.at_dealer) == number + 1)


async def test_a_message_that_raises_is_reported_and_those_after_it_come(pair):
    reported: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
    came: list[bytes] = []

    def take(frames: list[bytes]) -> None:
        if frames[-1] == b"bad":
            raise RuntimeError("a bad message")
        came.append(frames[-1])

    pair.router._on_message = take
    for body in (b"bad", b"good", b"bad", b"better"):
        pair.dealer.send([body])
    await until(lambda: len(came) == 2)
    assert came == [b"good", b"better"]
    assert reported == ["a bad message"] * 2


async def test_nothing_comes_after_reading_was_stopped_and_what_was_sent_still_leaves(pair):
    pair.dealer.send([b"hello"])
    await until(lambda: pair.at_router)
    pair.dealer.stop_reading()
    pair.router.send([b"dealer", b"too late"])
    pair.dealer.send([b"goodbye"])
    await until(lambda: len(pair.at_router) == 2)
    assert pair.at_dealer == []


async def test_a_peer_that_does_not_read_keeps_nobody_waiting(pair):
    pair.router.stop_reading()
    for _ in range(1000):
        pair.dealer.send([bytes(100_000)])


async def test_it_is_closed_if_it_cannot_be_bound(pair):
    taken = pair.router._socket.getsockopt(zmq.LAST_ENDPOINT)
    other = MessageSocket(zmq.ROUTER, {}, pair.at_router.append, SharedContext())
    with pytest.raises(zmq.ZMQError):
        other.open(lambda socket: socket.bind(taken))
    assert not other.is_open
    other.close()


async def test_nothing_is_remembered_of_connections_that_have_come_and_gone():
    """Each had a file, whose number ZeroMQ tells when it ends."""
    context, events, held = SharedContext(), list[int](), list[int]()
    num_known = len(zmq.Event._value2member_map_)
    for number in range(1, 9):
        server = MessageSocket(zmq.ROUTER, {}, lambda frames: None, SharedContext())
        server.open(lambda socket: socket.bind("tcp://127.0.0.1:*"))
        address = of_type(bytes, server._socket.getsockopt(zmq.LAST_ENDPOINT)).decode()
        client = MessageSocket(zmq.DEALER, {}, lambda frames: None, context)
        client.open(methodcaller("connect", address), on_event=events.append)
        await until(lambda number=number: events.count(zmq.EVENT_HANDSHAKE_SUCCEEDED) == number)
        server.close()
        await until(lambda number=number: events.count(zmq.EVENT_DISCONNECTED) == number)
        client.close()
        held += [os.open(os.devnull, os.O_RDONLY) for _ in range(16)]  # the next one's file has another number
    for each in held:
        os.close(each)
    assert len(zmq.Event._value2member_map_) == num_known
