"""What senders say, and what happens to them, in any order: a transfer's end is published once, and leaves nothing."""

import asyncio
import contextlib
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from hbserve_kv_layouts import layout_of, whole_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbserve_kv import HeadRange, Link, Outcome, Part, TransferTimeout, Transport
from hbserve_kv.config import KVTransferConfig
from hbserve_kv.memory.memory import Memory
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.handshake import Identity
from hbserve_kv.protocol.messages import Abandon, AnnouncedPart, Begin, Commit, Handshake, PartsAnnounced
from hbserve_kv.protocol.transfer_state import Phase
from hbserve_kv.receiving.lookup_buffer import LookupBuffer
from hbserve_kv.receiving.receiver import Receiver
from hbserve_kv.receiving.transfer import IncomingLink, IncomingTransfer
from hbserve_rpc import InvalidRequest, Peer, connected_client

HEADS = 2
NUM_BLOCKS = 4
EXPIRY_S = 3600.0


class Wire(Transport):
    """Takes parts when the test says so, and takes the right to write from a sender when the test lets it."""

    name = "wire"

    def __init__(self, one_sided: bool) -> None:
        self.one_sided = one_sided  # type: ignore[misc]  # a constant of the class for real ones
        self.accepting: dict[str, list[asyncio.Future[None]]] = {}
        self.revocable: set[str] = set()

    async def start(self, memory): ...

    async def connect(self, link): ...

    async def push(self, link, part): ...

    async def close(self): ...

    def describe(self) -> bytes:
        return b""

    async def accept(self, link: Link, part: Part) -> None:
        arriving = asyncio.get_running_loop().create_future()
        self.accepting.setdefault(link.key, []).append(arriving)
        try:
            await arriving
        finally:
            self.accepting[link.key].remove(arriving)

    async def revoke(self, link: Link) -> set[str]:
        return self.revocable & {link.key}

    async def disconnect(self, link: Link) -> None:
        for arriving in self.accepting.get(link.key, []):
            arriving.cancel()


def link_of(sender: int, heads: HeadRange, one_sided: bool) -> IncomingLink:
    key = f"link {sender}"
    hello = Handshake(messages.PROTOCOL_VERSION, sender, "epoch", "127.0.0.1:1", {}, heads, layout_of(), {}, key)
    link = Link(key, is_sender=False, peer_rank=sender, peer_description=b"", **whole_blocks(heads=heads))
    return IncomingLink(hello, link, Wire(one_sided), heads, peer_of(key))


def peer_of(key: str) -> Peer:
    """Whose link is called so: "1, life 3" is one of sender 1."""
    return Peer(key.partition(",")[0].encode(), None, "127.0.0.1")


# ---- one transfer, event by event ----------------------------------------------------------------------------------

PARTS = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)
SENDER = st.integers(0, 2)
EVENTS = st.one_of(
    st.tuples(st.just("begin"), SENDER),
    st.tuples(st.just("start_parts"), SENDER, PARTS),
    st.tuples(st.just("end_part"), SENDER, st.sampled_from(["", "", "it broke"])),
    st.tuples(st.just("commit"), SENDER, st.integers(0, 3)),
    st.tuples(st.just("sender_drained"), SENDER),
    st.tuples(st.just("fail")),
    st.tuples(st.just("give_up")),
)


class Model:
    """What the senders of one transfer have done, counted without its state machine."""

    def __init__(self, one_sided: bool, may_be_partial: bool) -> None:
        self.links = [link_of(i, HeadRange(min(i, 1), 1, HEADS), one_sided) for i in range(3)]
        """The last two bring the same head, so that only one of them can begin."""
        self.one_sided = one_sided
        self.may_be_partial = may_be_partial
        self.failures: list[IncomingTransfer] = []
        self.transfer = IncomingTransfer(
            "t", "pool", [0, 1], range(HEADS), self.failures.append, may_be_partial=may_be_partial
        )
        self.results: list[Outcome] = []
        self.has_failed = self.was_given_up = self.was_undrained_at_failure = False
        self.begun: set[int] = set()
        self.committed: dict[int, int] = {}
        """How many blocks each has brought."""
        self.silent: set[int] = set()
        """Said that they write no more."""
        self.announced: set[tuple[int, int]] = set()
        """Sender and block; each block comes once."""
        self.arriving: list[tuple[int, AnnouncedPart]] = []
        self.landed: list[tuple[int, int]] = []

    @property
    def is_complete(self) -> bool:
        return not self.has_failed and len(self.committed) == HEADS

    @property
    def may_be_written(self) -> bool:
        return any(i not in self.committed.keys() | self.silent for i in self.begun) or bool(self.arriving)

    def begin(self, i: int) -> None:
        taken = {min(each, 1) for each in self.begun}
        fits = not self.has_failed and not self.is_complete and min(i, 1) not in taken
        assert self.transfer.begin(self.links[i]) is fits
        self.begun |= {i} if fits else set()

    def start_parts(self, i: int, indices: tuple[int, ...]) -> None:
        parts = [AnnouncedPart(index, index % 2, 1) for index in indices]
        blocks = {(i, index % 2) for index in indices}
        is_over = self.is_complete or self.transfer.drained.is_set() or self.transfer.result.done()
        fits = i in self.begun - self.committed.keys() - self.silent and not is_over
        fits = fits and len(blocks - self.announced) == len(indices)
        assert (self.transfer.start_parts(self.links[i].link.key, parts) == "") is fits
        self.arriving += [(i, part) for part in parts] if fits else []
        self.announced |= blocks if fits else set()

    def end_part(self, i: int, error: str) -> None:
        mine = [entry for entry in self.arriving if entry[0] == i]
        if mine:
            self.arriving.remove(mine[0])
            self.landed += [(i, mine[0][1].index)] if not error else []
            self.noted_failure(error != "")
            self.transfer.end_part(self.links[i].link.key, mine[0][1], error=error)

    def commit(self, i: int, num_parts: int) -> None:
        is_open = i in self.begun - self.committed.keys() and not self.has_failed and not self.is_complete
        landed = {index for sender, index in self.landed if sender == i}
        num_blocks = num_parts if self.one_sided else len({index % 2 for index in landed})
        has_all = num_blocks == 2 or (num_blocks < 2 and self.may_be_partial)
        fits = is_open and has_all and (self.one_sided or landed == set(range(num_parts)))
        self.committed |= {i: num_blocks} if fits else {}
        self.noted_failure(is_open and not fits)
        message = Commit("t", self.links[i].link.key, num_parts, 10 * num_parts, 0.0, f"of {i}".encode())
        assert self.transfer.commit(message, whole_blocks(head_bytes=10)["mine"]) is fits

    def sender_drained(self, i: int) -> None:
        if i in self.begun and not self.is_complete and not self.transfer.drained.is_set():
            self.silent.add(i)
        self.transfer.sender_drained(self.links[i].link.key)

    def fail(self) -> None:
        self.noted_failure(True)
        self.transfer.fail("no longer wanted")

    def give_up(self) -> None:
        self.was_given_up |= self.has_failed and self.may_be_written
        self.transfer.give_up()

    def noted_failure(self, fails: bool) -> None:
        if fails and not self.has_failed and not self.is_complete:
            self.has_failed = True
            self.was_undrained_at_failure = self.may_be_written

    def check(self) -> None:
        is_drained = self.is_complete or (self.has_failed and not self.may_be_written)
        assert self.transfer.drained.is_set() is is_drained
        assert self.transfer.result.done() is (is_drained or self.was_given_up)
        assert len(self.failures) == self.was_undrained_at_failure
        for i, link in enumerate(self.links):
            assert link.transfers == ({self.transfer} if i in self.begun and not is_drained else set())
            assert link.notices.qsize() == (self.has_failed and i in self.begun)

    def check_result(self) -> None:
        result = self.transfer.result.result()
        if self.is_complete:
            assert (result.outcome, result.num_bytes) == (Outcome.COMPLETED, 10 * sum(self.committed.values()))
            assert result.is_partial is any(num_blocks < 2 for num_blocks in self.committed.values())
            assert result.payload in {f"of {i}".encode() for i in self.committed}
        else:
            expected = Outcome.UNKNOWN if self.was_given_up else Outcome.FAILED_DRAINED
            assert (result.outcome, result.error) == (expected, self.transfer.cause)


async def drive(events: list[tuple], one_sided: bool, may_be_partial: bool) -> None:
    model = Model(one_sided, may_be_partial)
    model.transfer.result.add_done_callback(lambda done: model.results.append(done.result().outcome))
    for name, *arguments in events:
        before = model.transfer.result.result() if model.transfer.result.done() else None
        getattr(model, name)(*arguments)
        model.check()
        assert before is None or model.transfer.result.result() is before
    model.fail()
    for i, _ in list(model.arriving):
        model.end_part(i, "")
    for i in range(3):
        model.sender_drained(i)
    model.check()
    model.check_result()
    await asyncio.sleep(0)
    assert len(model.results) == 1, "published exactly once"
    assert model.transfer.drained.is_set()


@pytest.mark.parametrize("may_be_partial", [True, False])
@pytest.mark.parametrize("one_sided", [True, False])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(events=st.lists(EVENTS, max_size=30))
def test_a_transfer_publishes_its_end_once_and_is_drained_exactly_when_nothing_can_land(
    one_sided, may_be_partial, events
):
    asyncio.run(drive(events, one_sided, may_be_partial))


# ---- all that one instance receives ----------------------------------------------------------------------------------

NAME = st.sampled_from(["a", "a", "a", "b", "whole"])
"""Transfers into the pool, which are posted, and one into the lookup buffer, which is not."""
ONE_OF_TWO = st.sampled_from([0, 0, 1])
WORLD = st.one_of(
    st.tuples(st.just("open"), ONE_OF_TWO, NAME),
    st.tuples(st.just("open"), ONE_OF_TWO, NAME),
    st.tuples(st.just("deliver"), ONE_OF_TWO, NAME, st.booleans()),
    st.tuples(st.just("connect"), ONE_OF_TWO),
    st.tuples(st.just("lose"), ONE_OF_TWO),
    st.tuples(st.just("begin"), ONE_OF_TWO, NAME),
    st.tuples(st.just("announce"), ONE_OF_TWO, NAME, PARTS),
    st.tuples(st.just("announce"), ONE_OF_TWO, NAME, st.just((0, 1))),
    st.tuples(st.just("land"), ONE_OF_TWO, st.sampled_from([True, True, False])),
    st.tuples(st.just("commit"), ONE_OF_TWO, NAME, st.sampled_from([0, 1, 2, 2])),
    st.tuples(st.just("abandon"), ONE_OF_TWO, NAME, st.booleans(), st.booleans()),
    st.tuples(st.just("expire"), NAME),
    st.tuples(st.just("cancel"), NAME),
    st.tuples(st.just("revoke"), ONE_OF_TWO),
)


class Handlers:
    """Stands in for an RpcServer: the test calls what a sender would."""

    def __init__(self) -> None:
        self.of: dict[str, Any] = {}

    def serve(self, method, handler) -> None:
        self.of[method.name] = handler

    serve_stream = serve

    def serve_notification(self, method, handler) -> None:
        async def take(message) -> None:
            handler(message)

        self.of[method.name] = take

    async def call(self, method, message) -> None:
        with contextlib.suppress(InvalidRequest, TransferTimeout):  # it does not fit, or there is no room for it
            await self.of[method.name](message)


class World:
    """One receiver and three senders, each of which may have several lives."""

    def __init__(self, one_sided: bool, room_timeout_s: float = 0.001) -> None:
        self.memory = Memory(torch.zeros(NUM_BLOCKS, 8, dtype=torch.uint8), NUM_BLOCKS * 8)
        self.transport = Wire(one_sided)
        self.buffer = LookupBuffer(self.memory, timeout_s=room_timeout_s, expiry_s=0.0)
        self.handlers = Handlers()
        config = KVTransferConfig(timeout_s=EXPIRY_S, expiry_s=EXPIRY_S)
        me = Identity(9, "mine", {}, HeadRange(), self.memory.layout)
        self.receiver = Receiver(me, self.memory, {"wire": self.transport}, self.buffer, config)
        self.receiver.serve_on(self.handlers)  # type: ignore[arg-type]  # as much of a server as it uses
        self.streams: dict[int, Any] = {}
        self.lives: Counter[int] = Counter()
        self.calls: list[asyncio.Task[None]] = []
        self.ends: Counter[IncomingTransfer] = Counter()
        self.links: list[IncomingLink] = []

    def key(self, sender: int) -> str:
        return f"{sender}, life {self.lives[sender]}"

    def watch(self) -> None:
        for transfer in self.receiver.transfers.values():
            if transfer not in self.ends and not transfer.result.done():
                self.ends[transfer] = 0
                transfer.result.add_done_callback(partial(self._ended, transfer))

    def _ended(self, transfer: IncomingTransfer, _: object) -> None:
        self.ends[transfer] += 1

    def call(self, method, message) -> None:
        connected_client._calling.set(peer_of(message.link))
        self.calls.append(asyncio.create_task(self.handlers.call(method, message)))

    def post(self, name: str) -> None:
        if name != "whole" and name not in self.receiver.transfers:
            self.receiver.expect(name, "pool", [0, 1])

    async def connect(self, sender: int) -> None:
        await self.lose(sender)
        self.lives[sender] += 1
        hello = Handshake(
            messages.PROTOCOL_VERSION, sender, "epoch", f"127.0.0.1:{1 + sender}", {}, HeadRange(), self.memory.layout,
            {"wire": b""}, self.key(sender),
        )  # fmt: skip
        connected_client._calling.set(peer_of(hello.link))
        self.streams[sender] = self.handlers.of[messages.LINK.name](hello)
        await anext(self.streams[sender])
        self.links.append(self.receiver.links[self.key(sender)])

    async def lose(self, sender: int) -> None:
        if sender in self.streams:
            await self.streams.pop(sender).aclose()

    async def open(self, sender: int, name: str) -> None:
        """What goes well as a rule, so that what comes next is about a transfer."""
        if sender not in self.streams:
            await self.connect(sender)
        self.post(name)
        self.begin(sender, name)

    async def deliver(self, sender: int, name: str, asks_early: bool) -> None:
        """Two parts and their commit, which may be asked while they are under way."""
        self.announce(sender, name, (0, 1))
        if asks_early:
            self.commit(sender, name, 2)
        for _ in range(2):
            await self.settle()
            self.land(sender, True)
        await self.settle()
        if not asks_early:
            self.commit(sender, name, 2)

    async def settle(self) -> None:
        for _ in range(4):
            self.watch()
            await asyncio.sleep(0)

    def begin(self, sender: int, name: str) -> None:
        self.call(messages.BEGIN, Begin(name, self.key(sender), 16 if name == "whole" else None))

    def announce(self, sender: int, name: str, indices: tuple[int, ...]) -> None:
        if not self.transport.one_sided:
            parts = [AnnouncedPart(index, index % 2, 1) for index in indices]
            self.call(messages.PARTS, PartsAnnounced(name, self.key(sender), parts))

    def land(self, sender: int, is_whole: bool) -> None:
        for arriving in self.transport.accepting.get(self.key(sender), [])[:1]:
            if not arriving.done():
                arriving.set_result(None) if is_whole else arriving.set_exception(ConnectionError("it broke"))

    def commit(self, sender: int, name: str, num_parts: int) -> None:
        self.call(messages.COMMIT, Commit(name, self.key(sender), num_parts, 8 * num_parts, 0.0, b""))

    def abandon(self, sender: int, name: str, drained: bool, buffered: bool) -> None:
        self.call(messages.ABANDON, Abandon(name, self.key(sender), "gone", drained, buffered))

    def expire(self, name: str) -> None:
        if name in self.receiver.transfers:
            self.receiver._expire(self.receiver.transfers[name])

    def cancel(self, name: str) -> None:
        if name in self.receiver.transfers:
            self.receiver.transfers[name].fail("no longer wanted")

    def revoke(self, sender: int) -> None:
        self.transport.revocable.add(self.key(sender))

    def check(self) -> None:
        for transfer in self.ends:
            assert self.ends[transfer] <= 1
            if transfer.drained.is_set():
                assert transfer.result.done()
                assert not any(transfer in link.transfers for link in self.links)
                taken = [each for link in self.links for each, _ in link.announced]
                assert transfer not in taken, "a part of it may still land"

    async def end(self) -> None:
        """Every sender goes, and what it writes with is taken from it: then nothing may be left."""
        for sender in list(self.streams):
            await self.lose(sender)
        self.transport.revocable = {link.link.key for link in self.links}
        for transfer in list(self.receiver.transfers.values()):
            transfer.fail("test over")
        async with asyncio.timeout(20):
            await asyncio.gather(*self.calls)
            while self.receiver.transfers or len(self.receiver.quarantine) or self.memory.buffered_bytes:
                await asyncio.sleep(0.001)
        self.check()
        assert set(self.ends.values()) <= {1}
        assert all(transfer.drained.is_set() for transfer in self.ends)
        assert not any(link.transfers or link.announced for link in self.links)
        await self.receiver.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def run_world(events: list[tuple], one_sided: bool) -> None:
    world = World(one_sided)
    for name, *arguments in events:
        done = getattr(world, name)(*arguments)
        if asyncio.iscoroutine(done):
            await done
        await world.settle()
        world.check()
    await world.end()


@pytest.mark.parametrize("one_sided", [True, False])
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(events=st.lists(WORLD, min_size=10, max_size=40))
def test_whatever_senders_say_in_any_order_each_transfer_ends_once_and_nothing_is_left(one_sided, events, monkeypatch):
    monkeypatch.setattr("hbserve_kv.receiving.quarantine.CHECK_INTERVAL_S", 0.001)
    monkeypatch.setattr("hbserve_kv.receiving.quarantine.GRACE_S", 0.0)

    async def never_answers(_, keys):
        return False

    monkeypatch.setattr("hbserve_kv.receiving.quarantine.has_ended", never_answers)
    asyncio.run(run_world(events, one_sided))


async def test_a_sender_that_is_lost_while_it_waits_for_room_begins_nothing():
    world = World(one_sided=True, room_timeout_s=20.0)
    await world.connect(0)
    everything = await world.buffer.place("before it", NUM_BLOCKS * 8)
    world.begin(0, "whole")
    await world.settle()
    await world.lose(0)
    await world.buffer.free(everything)
    async with asyncio.timeout(20):
        await asyncio.gather(*world.calls)
    assert all(transfer.phase is Phase.FAILED_DRAINED for transfer in world.receiver.transfers.values())
    await world.end()


async def test_what_begins_while_the_receiver_closes_ends_with_it():
    world = World(one_sided=True)
    await world.receiver.say_goodbye()
    await world.open(0, "whole")
    await world.settle()
    (transfer,) = world.receiver.transfers.values()
    await world.receiver.close()
    assert transfer.result.result().outcome is Outcome.UNKNOWN
    assert transfer.drained.is_set()
    await world.lose(0)
    await world.receiver.close()


async def test_nothing_more_is_taken_over_a_link_that_is_broken():
    world = World(one_sided=False)
    await world.open(0, "a")
    await world.settle()
    (link,), (transfer,) = world.links, world.receiver.transfers.values()
    world.announce(0, "a", (0, 1))
    await world.settle()
    world.announce(0, "a", (0,))  # a second time
    await world.settle()
    assert link.broken == transfer.cause == "a part of transfer a is late or was sent twice"
    world.announce(0, "a", (2,))
    await world.settle()
    assert world.receiver.dropped_messages == 2
    world.land(0, True)
    await world.settle()
    assert not world.transport.accepting[world.key(0)], "the part behind it"
    assert not link.announced
    await world.end()


async def test_a_backend_that_swallows_a_cancellation_keeps_no_link_alive(monkeypatch):
    world = World(one_sided=False)

    async def accept(link, part):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    monkeypatch.setattr(world.transport, "accept", accept)
    await world.open(0, "a")
    await world.settle()
    world.announce(0, "a", (0, 1))
    await world.settle()
    await world.end()
