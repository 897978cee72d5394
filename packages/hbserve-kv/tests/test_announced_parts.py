"""Parts that a sender announces: how few messages that takes, and what happens if they are not taken."""

import asyncio
import contextlib

import pytest
import torch

from hbserve_kv import Outcome, TransferFailed
from hbserve_kv.protocol.messages import PARTS, AnnouncedPart, PartsAnnounced
from hbserve_kv.receiving.transfer import IncomingLink
from hbserve_kv.testing import LoopbackNetwork, is_empty
from hbserve_kv.transports.base import Transport
from hbserve_rpc import RpcClient, RpcServer, wire


class Pipes:
    """Two-sided, within one process. `faults` says what goes wrong with the part of an index."""

    def __init__(self):
        self.buffered = False
        """A push returns before its part was accepted, like a socket's."""
        self.queues = {}
        self.faults = {}
        self.begun = []
        self.accepted = []

    def transport(self):
        return Pipe(self)


class Pipe(Transport):
    name = "pipe"
    one_sided = False

    def __init__(self, pipes):
        self._pipes = pipes

    async def start(self, memory):
        self._memory = memory

    def describe(self):
        return b""

    async def connect(self, link):
        self._pipes.queues.setdefault(link.key, asyncio.Queue())

    async def push(self, link, part):
        taken = asyncio.get_running_loop().create_future()
        self._pipes.queues[link.key].put_nowait((self._memory.pool[part.block_ids].clone(), taken))
        if not self._pipes.buffered:
            await taken

    async def accept(self, link, part):
        self._pipes.begun.append((part.transfer_id, part.index))
        fault = self._pipes.faults.get(part.index)
        if fault == "never":
            await asyncio.Event().wait()
        if fault == "fail":
            raise MemoryError("no memory for it")
        if fault == "late":
            await asyncio.sleep(0.2)
        blocks, taken = await self._pipes.queues[link.key].get()
        self._memory.pool[part.block_ids] = blocks
        self._pipes.accepted.append((part.transfer_id, part.index))
        if not taken.done():
            taken.set_result(None)

    async def disconnect(self, link):
        pass

    async def close(self):
        pass


@pytest.fixture
def pipes():
    return Pipes()


@pytest.fixture
async def pair(managers, pipes):
    """A sender and a receiver over pipes, and their pools."""

    async def make(**settings):
        pools = [torch.rand(64, 2, 3, 64), torch.zeros(64, 2, 3, 64)]
        both = [await managers(i, "nccl", pools[i], transport=pipes.transport(), **settings) for i in range(2)]
        return (*both, *pools)

    return make


def spy_on_messages(monkeypatch):
    """All that is sent from now on in this process, but for greetings and heartbeats."""
    sent = []

    def spy(owner, name, position):
        real = getattr(owner, name)

        def noting(self, *arguments):
            if not isinstance(arguments[position], wire.Hello | wire.Welcome | wire.Ping | wire.Pong):
                sent.append(arguments[position])
            real(self, *arguments)

        monkeypatch.setattr(owner, name, noting)

    spy(RpcClient, "send", 0)
    spy(RpcServer, "_send", 1)
    return sent


async def count_messages(sender, receiver, sent, num_parts, one_by_one):
    """Control messages of one transfer, of a pair that is connected already."""
    await (await sender.open_send("connects", receiver.post_receive("connects", []).grant)).commit()
    sent.clear()
    posted = receiver.post_receive("t", list(range(num_parts)))
    transfer = await sender.open_send("t", posted.grant)
    for block in range(num_parts):
        transfer.push([block], block)
        async with asyncio.timeout(20):
            while one_by_one and transfer.state.legs[0].num_moved <= block:
                await asyncio.sleep(0.001)
    assert (await transfer.commit()).num_parts == num_parts
    assert (await posted.wait()).outcome is Outcome.COMPLETED
    return len(sent)


@pytest.mark.parametrize("num_parts", [0, 1, 8])
async def test_control_messages_of_a_transfer_are_at_most_four_and_one_for_each_part(
    backend, managers, monkeypatch, num_parts
):
    sent = spy_on_messages(monkeypatch)
    sender, receiver = await managers(0, backend), await managers(1, backend)
    assert await count_messages(sender, receiver, sent, num_parts, one_by_one=True) <= 4 + num_parts
    together = await count_messages(sender, receiver, sent, num_parts, one_by_one=False)
    assert together <= 4 + (num_parts > 0), "parts that wait together are announced together"


async def test_control_messages_over_loopback_are_four(managers, monkeypatch):
    sent, network = spy_on_messages(monkeypatch), LoopbackNetwork()
    sender, receiver = [await managers(i, "nccl", transport=network.transport()) for i in range(2)]
    assert await count_messages(sender, receiver, sent, 8, one_by_one=True) == 4


async def test_parts_of_several_announcements_and_transfers_are_taken_in_order(pair, pipes):
    sender, receiver, source, target = await pair()
    pipes.buffered, pipes.faults = True, {0: "late"}
    postings = [receiver.post_receive(f"t{i}", list(range(8 * i, 8 * i + 8))) for i in range(4)]
    transfers = [await sender.open_send(f"t{i}", posted.grant) for i, posted in enumerate(postings)]
    for block in range(8):
        for number, transfer in enumerate(transfers):
            transfer.push([8 * number + block], block)
        await asyncio.sleep(0)
    results = await asyncio.gather(*(transfer.commit() for transfer in transfers))
    assert {result.outcome for result in results} == {Outcome.COMPLETED}
    for number in range(4):
        assert [index for name, index in pipes.accepted if name == f"t{number}"] == list(range(8))
    assert torch.equal(target[:32], source[:32])


async def test_a_commit_is_answered_only_when_the_parts_before_it_have_landed(pair, pipes):
    pipes.buffered = True
    pipes.faults = {0: "late", 1: "late", 2: "late"}
    sender, receiver, source, target = await pair()
    posted = receiver.post_receive("t", [1, 2, 3])
    transfer = await sender.open_send("t", posted.grant)
    for block in range(3):
        transfer.push([10 + block], block)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED
    assert torch.equal(target[1:4], source[10:13])


async def fail_a_part(pair, pipes, fault, expected, **settings):
    sender, receiver, _, _ = await pair(**settings)
    pipes.faults = {1: fault}
    posted, other = receiver.post_receive("t", [1, 2, 3]), receiver.post_receive("other", [4])
    transfer, beside = [await sender.open_send(name, it.grant) for name, it in (("t", posted), ("other", other))]
    for block in range(3):
        transfer.push([block], block)
    async with asyncio.timeout(20):
        sent, received = await transfer.commit(), await posted.wait()
        assert (await beside.commit()).outcome is Outcome.FAILED_DRAINED, "the link is of no use any more"
        assert (await other.wait()).outcome is Outcome.FAILED_DRAINED
    assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert sent.error == f"cancelled by the receiver: {expected}"
    assert received.error == expected
    pipes.faults = {}
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([9], 0)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED, "over another link"


async def test_a_part_that_the_receiver_cannot_take_ends_the_send_that_waits_for_it(pair, pipes):
    await fail_a_part(pair, pipes, "fail", "part 1: MemoryError: no memory for it")


async def test_a_part_that_never_comes_ends_at_its_deadline(pair, pipes):
    await fail_a_part(
        pair, pipes, "never", "part 1 of transfer t did not come within 0.5 s", timeout_s=0.5
    )  # fmt: skip


async def test_a_receiver_that_cannot_connect_ends_the_link_with_the_first_part_and_says_why(pair, monkeypatch):
    sender, receiver, _, _ = await pair()

    async def connect(link):
        raise OSError("no route")

    monkeypatch.setattr(receiver._transports["pipe"], "connect", connect)
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    async with asyncio.timeout(20):
        sent, received = await transfer.commit(), await posted.wait()
    assert received.error == "part 0: OSError: no route"
    assert sent.error == f"cancelled by the receiver: {received.error}"


async def test_over_gloo_too_a_part_that_the_receiver_cannot_take_ends_the_send(managers, monkeypatch):
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")

    async def accept(link, part):
        raise MemoryError("no memory for it")

    monkeypatch.setattr(receiver._transports["nccl"], "accept", accept)
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    async with asyncio.timeout(8):  # less than any deadline of Gloo or ours
        sent, received = await transfer.commit(), await posted.wait()
        await transfer.drained()
    assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert received.error == "part 0: MemoryError: no memory for it"
    assert sent.error == f"cancelled by the receiver: {received.error}"


async def test_a_send_that_nobody_takes_and_nobody_speaks_of_ends_at_a_deadline_of_its_own(pair, monkeypatch):
    sender, receiver, _, _ = await pair()
    monkeypatch.setattr(IncomingLink, "take", lambda *_: True)
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    (connection,) = sender._peers.links.values()
    connection._under_way._timeout_s = 0.2  # heartbeats, which have the same deadline, must not miss it
    transfer.push([1], 0)
    async with asyncio.timeout(20):
        while sender.stats().active_transfers:
            await asyncio.sleep(0.01)
        sent, received = await transfer.commit(), await posted.wait()
    assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert "part 0 was not taken within 20 s" in sent.error


async def announce(sender, receiver, message):
    """By the connection of their link, which nobody else speaks for; returns when the receiver has handled it."""
    before = receiver.stats().dropped_messages
    sender._peers.links[receiver.address].client.notify(PARTS, message)
    async with asyncio.timeout(20):
        while receiver.stats().dropped_messages == before:
            await asyncio.sleep(0.01)


async def test_nobody_announces_parts_of_anothers_link(pair):
    sender, receiver, source, target = await pair()
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    (link,) = receiver._receiver.links
    async with RpcClient(receiver.address) as client, asyncio.timeout(20):
        client.notify(PARTS, PartsAnnounced("t", link, [AnnouncedPart(0, 0, 1)]))
        while receiver.stats().dropped_messages == 0:
            await asyncio.sleep(0.01)
        transfer.push([5], 0)
        assert (await transfer.commit()).outcome is Outcome.COMPLETED
    assert torch.equal(target[1], source[5])


async def test_parts_of_a_link_that_nobody_knows_are_counted_and_change_nothing(pair):
    sender, receiver, source, target = await pair()
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    links = sender.links()
    await announce(sender, receiver, PartsAnnounced("t", "an earlier life", [AnnouncedPart(0, 0, 1)]))
    assert receiver.stats().dropped_messages == 1
    assert sender.links() == links
    transfer.push([5], 0)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED
    assert torch.equal(target[1], source[5])


@pytest.mark.parametrize(
    ("name", "part", "why"),
    [
        ("t", AnnouncedPart(0, 0, 1), "late or was sent twice"),
        ("t", AnnouncedPart(1, 0, 1), "late or was sent twice"),
        ("t", AnnouncedPart(1, 1, 1, (0, 1)), "late or was sent twice"),
        ("t", AnnouncedPart(1, 1, 2), "outside what was granted"),
        ("unknown", AnnouncedPart(0, 0, 1), "a part of transfer unknown is late"),
    ],
)
async def test_parts_that_do_not_fit_end_their_link_and_tell_the_sender_why(pair, caplog, name, part, why):
    """The next part would be taken in their place."""
    sender, receiver, _, _ = await pair()
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    async with asyncio.timeout(20):
        while not transfer.state.legs[0].num_moved:
            await asyncio.sleep(0.01)
    (link,) = receiver._receiver.links
    await announce(sender, receiver, PartsAnnounced(name, link, [AnnouncedPart(2, 1, 1), part]))
    async with asyncio.timeout(20):
        result = await posted.wait()
        sent = await transfer.commit()
    assert (sent.outcome, result.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert why in result.error
    assert why in sent.error
    assert why in caplog.text
    async with asyncio.timeout(20):
        while not (is_empty(sender) and is_empty(receiver)) or sender.links():
            await asyncio.sleep(0.01)
    assert receiver.links() == []


async def test_a_sender_that_is_closed_in_a_part_fails_the_transfer_and_frees_its_blocks(pair, pipes):
    sender, receiver, _, _ = await pair()
    pipes.faults = {0: "never"}
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    async with asyncio.timeout(20):
        while not pipes.begun:
            await asyncio.sleep(0.01)
        sender._peers.links[receiver.address].lose("the sender was closed")
        assert (await posted.wait()).outcome is Outcome.FAILED_DRAINED
        with pytest.raises(TransferFailed, match="not expected"):
            await sender.open_send("t", posted.grant)


async def test_a_link_that_is_lost_at_the_moment_of_an_announcement_fails_its_parts(pair):
    """As when a frozen receiver thaws, and reads at once all that was sent to it."""
    sender, receiver, _, _ = await pair()
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    (link,) = receiver._receiver.links.values()
    message = PartsAnnounced("t", link.link.key, [AnnouncedPart(0, 0, 1)])
    assert link.take(receiver._receiver.transfers["t"], message)
    receiver._receiver.end_links({link.link.key}, "the sender was lost")
    async with asyncio.timeout(20):
        result = await posted.wait()
        assert (await transfer.wait()).outcome is Outcome.FAILED_DRAINED, "it hears that the link has ended"
        await asyncio.gather(*transfer.tasks)
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "the sender was lost")
    assert receiver.stats().dropped_messages <= 1, "an abandon may cross the link's end, and nothing else comes"


async def test_a_backend_that_ignores_that_nobody_takes_its_part_is_given_no_other_and_no_task_is_left(
    pair, monkeypatch
):
    sender, receiver, _, _ = await pair()
    pushed = []

    async def push(link, part):
        pushed.append(part.index)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    monkeypatch.setattr(sender._transports["pipe"], "push", push)
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    transfer.push([6], 1)
    async with asyncio.timeout(20):
        while not pushed:
            await asyncio.sleep(0.01)
        sender._peers.links[receiver.address].lose("the peer is gone")
        result = await transfer.wait()
        await posted.cancel("test over")
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "the peer is gone")
    assert pushed == [0]
    async with asyncio.timeout(20):
        while any("OutgoingLink" in repr(task.get_coro()) for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)


async def test_closing_a_sender_lets_the_part_that_is_under_way_end_and_waits_for_no_more(pair, pipes, monkeypatch):
    monkeypatch.setattr("hbserve_kv.manager.GOODBYE_TIMEOUT_S", 60.0)
    sender, receiver, _, _ = await pair()
    pipes.faults = {0: "late"}
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    async with asyncio.timeout(20):
        while not transfer.state.legs[0].num_begun:
            await asyncio.sleep(0.01)
        await sender.close()
        result, received = await transfer.wait(), await posted.wait()
    assert (result.outcome, result.error, result.num_parts) == (Outcome.FAILED_DRAINED, "the sender was closed", 1)
    assert received.error == "the sender was closed"
    assert pipes.accepted == [("t", 0)]
