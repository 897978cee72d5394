"""Strangers to a deployment: with keys, none is served at any port; and whose KV is used for whose requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from hbserve.monitoring.stats import lines_of
from hbserve_core import GpuInstance, InstanceConfig
from hbserve_kv import KVTransferConfig
from hbserve_kv.protocol import messages as kv_messages
from hbserve_rpc import NotAllowed, RpcClient, SamplingParams, make_keys, wire
from hbserve_rpc.keys import Party
from hbserve_rpc.messages import (
    DESCRIBE,
    SCHEDULER_INFO,
    SCHEDULER_INSTANCE_DIED,
    Empty,
    GenerateRequest,
    InstanceDied,
    InstanceStats,
    RequestFinished,
    Role,
    SchedulerStats,
)
from hbserve_rpc.metrics_text import text_of
from hbserve_scheduler import CpuScheduler, NotReady, RemoteScheduler, SchedulerConfig, SchedulerServer
from hbserve_scheduler.metrics import deployment_metrics

pytestmark = pytest.mark.warm

KEYS = make_keys()
PROMPT = tuple(3 + 7 * i % 250 for i in range(64))
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@contextlib.asynccontextmanager
async def deployment(folder, *, keyed: bool = True) -> AsyncIterator[SimpleNamespace]:
    """A scheduler, a prefill and a decode instance in this process."""
    keys = KEYS if keyed else {}
    roles: tuple[Role, Role] = ("prefill", "decode")
    instances = [
        GpuInstance(
            InstanceConfig(
                model_path=str(folder), instance_id=f"{role}-0", role=role, kv_rank=rank, device="cpu", num_threads=1,
                num_blocks=64, block_size=16, kv_transfer=KVTransferConfig(backend="ipc", buffer_size=1 << 20),
                keys=keys.get("instance"),
            )
        )
        for rank, role in enumerate(roles)
    ]  # fmt: skip
    scheduler = CpuScheduler(SchedulerConfig(port=0, heartbeat_interval_s=0.1))
    scheduler.use_keys(keys.get("scheduler"))
    server = SchedulerServer(scheduler, keys=keys.get("scheduler"))
    try:
        for instance in instances:
            await instance.start()
            await scheduler.add_instance(instance.config.instance_id, instance.config.role, instance.address)
        await server.start()
        await scheduler.wait_ready(60)
        yield SimpleNamespace(server=server, scheduler=scheduler, prefill=instances[0], decode=instances[1])
    finally:
        await server.stop()
        for instance in instances:
            await instance.stop()


async def ask(asked, name: str = "r") -> RequestFinished:
    events = [event async for event in asked.submit(GenerateRequest(name, PROMPT, PARAMS))]
    assert sum(len(event.token_ids) for event in events[:-1]) == PARAMS.max_tokens
    return events[-1]


async def test_a_stranger_is_served_at_no_port_and_each_party_only_at_its_own(small_model):
    async with deployment(small_model("qwen3")) as made, asyncio.timeout(120):
        ports: dict[str, tuple[Any, Any, set[Party], Party]] = {
            made.server.address: (SCHEDULER_INFO, Empty(), {"client", "scheduler", "instance"}, "scheduler"),
            made.prefill.address: (DESCRIBE, Empty(), {"scheduler"}, "instance"),
            made.decode.address: (DESCRIBE, Empty(), {"scheduler"}, "instance"),
            **{
                each.transfers._manager.address: (kv_messages.ALIVE, kv_messages.Nothing(), {"instance"}, "instance")
                for each in (made.prefill, made.decode)
            },
        }
        assert len(ports) == 5
        strangers = [None, make_keys()["scheduler"]]

        async def knock(address, keys):
            method, request, allowed, server = ports[address]
            async with RpcClient(address, keys=keys, server=server, heartbeat_timeout_s=60) as client:
                if keys not in strangers and keys.party in allowed:
                    await client.call(method, request, timeout_s=60)
                    return
                with pytest.raises(NotAllowed):
                    await client.call(method, request, timeout_s=60)

        await asyncio.gather(*(knock(address, keys) for address in ports for keys in (*strangers, *KEYS.values())))
        stranger = RemoteScheduler(made.server.address)
        await stranger.start()
        with pytest.raises(NotReady, match="does not let this side in"):
            await stranger.find(60)
        await stranger.stop()
        # And who should be served was, all the while.
        client = RemoteScheduler(made.server.address, keys=KEYS["client"])
        await client.start()
        await client.find(60)
        first, again = await ask(client, "a"), await ask(client, "b")
        await client.stop()
        assert first.num_cached_tokens == 0
        assert again.num_cached_tokens >= 48, "what came from who has a key is found by others"


async def test_a_client_cannot_say_that_an_instance_has_died(small_model):
    async with deployment(small_model("qwen3")) as made, asyncio.timeout(60):
        told = InstanceDied("decode-0", "says a client")
        parties: list[tuple[Party, bool]] = [("client", False), ("scheduler", True)]
        for party, is_believed in parties:
            epoch = made.scheduler.fleet.handles["decode-0"].client
            async with RpcClient(made.server.address, keys=KEYS[party], server="scheduler") as client:
                client.notify(SCHEDULER_INSTANCE_DIED, told)
                await client.call(SCHEDULER_INFO, Empty(), timeout_s=60)  # which comes after it
                assert (made.scheduler.fleet.handles["decode-0"].client is not epoch) == is_believed
        assert made.server._server.failed_notifications == 1


async def test_messages_that_have_no_effect_are_counted_where_somebody_who_watches_sees_them(small_model):
    async with deployment(small_model("qwen3"), keyed=False) as made, asyncio.timeout(60):
        kv = made.decode.transfers._manager.address
        for times, address in enumerate([made.server.address, made.prefill.address, made.decode.address, kv], start=1):
            with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
                socket.connect(f"tcp://{address}")
                for _ in range(times):
                    socket.send_multipart([b"no message", b""])
                socket.send_multipart([wire.encode(wire.Hello(wire.PROTOCOL_VERSION, 60.0)), b""])
                for id_ in range(10 * times):
                    socket.send_multipart([wire.encode(wire.Notify(id_, "no_method")), b""])
                assert await asyncio.to_thread(socket.poll, 60_000), "greeted"

        expected = {"": (1, 10), "prefill-0": (2, 20), "decode-0": (3 + 4, 30 + 40)}
        stats = SchedulerStats()
        while expected != {"": faults(stats), **{each.instance_id: faults(each) for each in stats.instances}}:
            await asyncio.sleep(0.05)
            stats = await made.server.fetch_stats()
        told = text_of(deployment_metrics(stats)).decode()
        assert "hbserve:rpc_frames_dropped_total 1\n" in told
        assert "hbserve:rpc_notifications_failed_total 10\n" in told
        assert 'hbserve:instance_rpc_frames_dropped_total{instance_id="decode-0",role="decode"} 7\n' in told
        shown = list(lines_of(stats))
        assert "at the scheduler, whose log says why: 1 messages dropped, 10 notifications failed" in shown
        assert "at prefill-0, whose log says why: 2 messages dropped, 20 notifications failed" in shown
        assert not any("whose log" in line for line in lines_of(SchedulerStats(instances=[])))


def faults(stats: SchedulerStats | InstanceStats) -> tuple[int, int]:
    return stats.rpc.dropped_frames, stats.rpc.failed_notifications


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1"], ids=["this host", "another host"])
async def test_without_keys_what_another_host_has_sent_is_found_by_no_other_request(small_model, monkeypatch, address):
    async with deployment(small_model("qwen3"), keyed=False) as made, asyncio.timeout(60):
        socket = made.decode.transfers._manager._server._socket
        monkeypatch.setattr(socket, "said_by_connection", lambda what: address if what == "Peer-Address" else "")
        for peer in made.decode.transfers._manager._receiver.links.values():
            monkeypatch.setattr(peer, "peer", type(peer.peer)(peer.peer.connection, None, address))
        await ask(made.scheduler, "a")
        again = await ask(made.scheduler, "b")
        is_local = address == "127.0.0.1"
        assert (again.num_cached_tokens > 0) == is_local


async def test_a_request_over_a_keyed_scheduler_names_the_instance_whose_kv_is_taken(small_model):
    async with deployment(small_model("qwen3")) as made, asyncio.timeout(60):
        receiver = made.decode.transfers._manager._receiver
        expected: list[str] = []
        expect = receiver.expect

        def note(*args, **settings):
            expected.append(settings["sender"])
            return expect(*args, **settings)

        receiver.expect = note
        await ask(made.scheduler)
        assert expected == ["prefill-0"]
