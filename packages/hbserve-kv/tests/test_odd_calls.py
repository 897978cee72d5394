"""What an engine may call with, when, and from where: all else is refused at once, and breaks nothing that is there."""

import asyncio

import pytest
import torch

from hbserve_kv import KVTransferConfig, KVTransferManager, Outcome, TransferFailed
from hbserve_kv.testing import LoopbackNetwork
from hbserve_rpc import AddressInUse

np = pytest.importorskip("numpy", reason="torch needs no numpy")

pytestmark = pytest.mark.asyncio


def manager(rank=0, port=0, transport=None):
    pool = torch.full((8, 16), float(rank))
    config = KVTransferConfig(backend="ipc", buffer_size=1 << 12, timeout_s=30, port=port)
    return KVTransferManager(rank=rank, pool=pool, fingerprint={"model": "m"}, config=config, transport=transport)


async def move(sender, receiver, transfer_id="t"):
    posted = receiver.post_receive(transfer_id, np.array([5, 2]))
    transfer = await sender.open_send(transfer_id, posted.grant)
    transfer.push(torch.tensor([1, 3]), first=0)
    assert (await transfer.commit(bytearray(b"x"))).outcome is Outcome.COMPLETED
    assert (await posted.wait()).payload == b"x"


async def test_a_manager_that_is_started_again_goes_on_as_it_was():
    async with manager() as receiver, manager(rank=1) as sender:
        for each in (receiver, sender):
            with pytest.raises(RuntimeError, match="was started before"):
                await each.start()
        await move(sender, receiver)
    with pytest.raises(RuntimeError, match="this manager is closed"):
        await receiver.start()


async def test_a_manager_that_cannot_start_leaves_nothing_and_starts_when_it_can():
    network, before = LoopbackNetwork(), asyncio.all_tasks()
    async with manager() as other:
        port = int(other.address.rpartition(":")[2])
        new = manager(rank=1, port=port, transport=network.transport())
        with pytest.raises(AddressInUse):
            await new.start()
        assert not network.members
    assert asyncio.all_tasks() == before
    async with new:
        assert len(network.members) == 1


async def test_nothing_begins_once_a_manager_is_closed():
    async with manager() as closed:
        pass
    before = asyncio.all_tasks()
    for call in (
        lambda: closed.post_receive("t", [1]),
        lambda: closed.offer("t"),
        lambda: closed.claim("t", "127.0.0.1:9"),
    ):
        with pytest.raises(TransferFailed, match="transfer t: this manager is closed"):
            call()
    assert asyncio.all_tasks() == before


async def test_nothing_begins_before_a_manager_is_started_nor_while_it_starts():
    async with manager() as receiver:
        new = manager(rank=1)
        new.add_peer(0, receiver.address)
        grant = receiver.post_receive("g", [1]).grant

        async def refuses():
            for call in (
                lambda: new.post_receive("t", [1]),
                lambda: new.offer("t"),
                lambda: new.claim("t", receiver.address),
                lambda: new.endpoint,
                lambda: new.open_send("t", grant),
                lambda: new.open_link(receiver.endpoint),
                lambda: new.transfer_to_itself(),
                lambda: new.send_kv_cache("t", torch.zeros(3), 0),
                lambda: new.receive_kv_cache("t", 0),
            ):
                with pytest.raises(RuntimeError, match="this manager is not started"):
                    await call()

        await refuses()
        starting = asyncio.create_task(new.start())
        await asyncio.sleep(0)
        await refuses()
        await starting
        await move(new, receiver)
        await new.close()
        for call in (lambda: new.send_kv_cache("t", torch.zeros(3), 0), lambda: new.receive_kv_cache("t", 0)):
            with pytest.raises(TransferFailed, match="this manager is closed"):
                await call()


async def test_a_manager_that_is_closed_while_it_starts_leaves_nothing():
    before = asyncio.all_tasks()
    new = manager()
    starting = asyncio.create_task(new.start())
    await asyncio.sleep(0)
    await new.close()
    with pytest.raises(RuntimeError, match="was closed while it started"):
        await starting
    with pytest.raises(RuntimeError, match="is closed"):
        await new.start()
    assert asyncio.all_tasks() == before


async def test_closing_goes_on_when_it_is_cancelled_and_whoever_closes_again_waits_for_its_end(monkeypatch):
    before = asyncio.all_tasks()
    new = manager()
    await new.start()
    (transport,) = new._transports.values()
    close, may_go_on = transport.close, asyncio.Event()

    async def wait_and_close():
        await may_go_on.wait()
        await close()

    monkeypatch.setattr(transport, "close", wait_and_close)
    for _ in range(2):
        closing = asyncio.create_task(new.close())
        await asyncio.wait([closing], timeout=0.05)
        assert closing.cancel(), "it has returned before anything was closed"
        await asyncio.wait([closing])
    may_go_on.set()
    await new.close()
    assert asyncio.all_tasks() == before
    assert new._memory.arena.numel() == 0


async def test_calls_from_many_threads_at_once_are_refused_and_move_nothing():
    async with manager() as receiver, manager(rank=1) as sender:
        calls = [
            asyncio.to_thread(call)
            for _ in range(50)
            for call in (lambda: receiver.post_receive("t", [1]), lambda: sender.offer("t"))
        ]
        assert {type(each) for each in await asyncio.gather(*calls, return_exceptions=True)} == {RuntimeError}
        await move(sender, receiver)


async def test_another_loop_and_another_thread_are_refused_and_close_still_closes():
    async with manager() as receiver, manager(rank=1) as sender:
        posted = receiver.post_receive("t", [1])
        transfer = await sender.open_send("t", posted.grant)
        offer = sender.offer("o")
        for call in (
            lambda: receiver.post_receive("u", [2]),
            lambda: receiver.claim("u", sender.address),
            lambda: sender.offer("u"),
            lambda: transfer.push([1], first=0),
            lambda: offer.push([1]),
            lambda: asyncio.run(sender.open_send("u", posted.grant)),
            lambda: asyncio.run(sender.close()),
        ):
            with pytest.raises(RuntimeError, match="the event loop that started their manager"):
                await asyncio.to_thread(call)
        transfer.push([1], first=0)
        assert (await transfer.commit()).outcome is Outcome.COMPLETED
        offer.withdraw("not needed")
        await move(sender, receiver)


@pytest.mark.parametrize(
    ("block_ids", "message"),
    [
        ([1.0], "expected whole numbers"),
        (["1"], "expected whole numbers"),
        (None, "block_ids=None: expected whole numbers"),
        (torch.tensor([1, 1]), r"block_ids=\[1, 1\]: expected distinct ones from 0 to 7"),
        (torch.tensor([1.5]), "expected whole numbers"),
        ([2**70], "outside the pool: expected 0 to 7"),
        (np.array([-1]), "outside the pool"),
    ],
)
async def test_blocks_that_are_none_are_named(block_ids, message):
    async with manager() as receiver, manager(rank=1) as sender:
        with pytest.raises((TypeError, ValueError), match=message):
            receiver.post_receive("t", block_ids)
        if "distinct" not in message:  # a sender may send one block to several places
            transfer = await sender.open_send("u", receiver.post_receive("u", [0, 1, 2]).grant)
            with pytest.raises((TypeError, ValueError), match=message):
                transfer.push(block_ids, first=0)
            offer = sender.offer("o")
            with pytest.raises((TypeError, ValueError), match=message):
                offer.push(block_ids)
            await transfer.abort("done")
        await move(sender, receiver)


async def test_layers_payloads_ids_and_leases_that_are_none_are_named():
    async with manager() as receiver, manager(rank=1) as sender:
        for transfer_id in (None, 3, b"t", "", "\ud800"):
            for call in (lambda: receiver.post_receive(transfer_id, [1]), lambda: sender.offer(transfer_id)):  # noqa: B023
                with pytest.raises(ValueError, match=r"transfer_id(=.*: expected a string|: character 0)"):
                    call()
        for lease_s in (float("nan"), -1, float("inf"), "x", True):
            with pytest.raises(ValueError, match=r"lease_s=.*: expected seconds, 0 or more"):
                sender.offer("o", lease_s=lease_s)
        transfer = await sender.open_send("t", receiver.post_receive("t", [1]).grant)
        for layers in (1, range(0), range(0, 1, 2), range(2), slice(0, 1)):
            with pytest.raises((TypeError, ValueError), match="layers="):
                transfer.push([1], first=0, layers=layers)
        for payload in (None, "x", 3):
            with pytest.raises(TypeError, match="payload: expected bytes"):
                await transfer.commit(payload)
        with pytest.raises(TypeError, match="grant: expected bytes"):
            await sender.open_send("u", "a string")
        transfer.push([1], first=0)
        assert (await transfer.commit()).outcome is Outcome.COMPLETED
        assert receiver.stats().active_transfers == sender.stats().num_offers == 0
