"""A scheduler behind RPC is used as if it were in this process."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hbserve_rpc import (
    AddressInUse,
    HBServeRpcError,
    InvalidRequest,
    Overloaded,
    RemoteError,
    RpcServer,
    SamplingParams,
    wire,
)
from hbserve_rpc.messages import GenerateRequest, TokenEvent
from hbserve_scheduler import CpuScheduler, NotReady, RemoteScheduler, SchedulerConfig, SchedulerServer


@pytest.fixture
async def serve(until: Any, assert_empty: Any) -> AsyncIterator[Any]:
    """Makes a SchedulerServer of instances that are ready, and a client of it."""
    made: list[tuple[SchedulerServer, RemoteScheduler]] = []

    async def make(*instances: Any, **options: Any) -> tuple[SchedulerServer, RemoteScheduler]:
        config = SchedulerConfig(port=0, heartbeat_interval_s=0.1, heartbeat_timeout_s=2.0, **options)
        server = SchedulerServer(CpuScheduler(config, model_path="/models/demo"))
        for instance in instances:
            await server.scheduler.add_instance(instance.instance_id, instance.role, instance.address)
        await server.start()
        remote = RemoteScheduler(server.address)
        made.append((server, remote))
        await remote.start()
        await server.scheduler.wait_ready(30)
        return server, remote

    yield make
    for server, remote in made:
        await remote.stop()
        await assert_empty(server.scheduler)
        await server.stop()


async def test_tokens_and_the_end_arrive_over_rpc(serve, pair, ask, collect):
    _, remote = await serve(*pair)
    tokens, end = await collect(remote.submit(ask()))
    assert tokens == [100, 101, 102, 103]
    assert (end.prefill_instance, end.decode_instance) == ("p0", "d0")
    stats = await remote.fetch_stats()
    assert (stats.completed_requests, [each.instance_id for each in stats.instances]) == (1, ["p0", "d0"])


async def test_find_tells_what_the_deployment_is(serve, pair):
    _, remote = await serve(*pair)
    info = await remote.find(30)
    assert (info.ready, info.model_path, info.max_model_len) == (True, "/models/demo", 128)
    assert [each.role for each in info.instances] == ["prefill", "decode"]


async def test_refusals_keep_their_class(serve, pair, ask, collect, until):
    pair[0].hold = {"first"}
    server, remote = await serve(*pair, max_queue_size=1, max_inflight_prefills=1)
    with pytest.raises(InvalidRequest, match="at least one token"):
        await anext(remote.submit(GenerateRequest("r", (), SamplingParams())))
    running = asyncio.create_task(collect(remote.submit(ask("r0"))))
    await until(lambda: pair[0].requests)
    waiting = asyncio.create_task(collect(remote.submit(ask("r1"))))
    await until(lambda: server.scheduler.waiting_requests)
    server.scheduler.waiting_requests[0].submitted_s -= 40
    with pytest.raises(Overloaded, match="max_queue_size") as refused:
        await anext(remote.submit(ask("r2")))
    assert 20 <= refused.value.retry_after_s < 60, "half of the time that the first one has waited"
    pair[0].release()
    await running
    await waiting


async def test_a_request_that_fails_says_why_over_rpc(serve, pair, ask, collect):
    pair[0].fail["first"] = [RemoteError("mishap")]
    _, remote = await serve(*pair, max_attempts=1)
    with pytest.raises(RemoteError, match="attempt 1: p0: mishap"):
        await collect(remote.submit(ask()))


async def test_an_abort_over_rpc_ends_the_stream(serve, pair, ask, collect):
    pair[1].hold = {"tokens"}
    _, remote = await serve(*pair)
    events = remote.submit(ask())
    assert await anext(events) == TokenEvent(0, [100])
    assert await remote.abort("r")
    assert (await collect(events))[1].finish_reason == "abort"
    assert not await remote.abort("r")


async def test_a_closed_stream_aborts_its_request(serve, pair, ask, until):
    pair[1].hold = {"tokens"}
    server, remote = await serve(*pair)
    events = remote.submit(ask())
    await anext(events)
    await events.aclose()
    await until(lambda: pair[0].open == pair[1].open == 0)
    assert server.scheduler.stats().aborted_requests == 1


async def test_a_client_that_goes_away_aborts_its_requests(serve, pair, ask, until):
    pair[1].hold = {"tokens"}
    server, _ = await serve(*pair)
    leaving = RemoteScheduler(server.address, heartbeat_timeout_s=1.0)
    await leaving.start()
    await anext(leaving.submit(ask()))
    await leaving.stop()  # it says nothing more, as a killed process does
    await until(lambda: not server.scheduler.running_requests)
    await until(lambda: pair[0].open == pair[1].open == 0)
    assert server.scheduler.stats().aborted_requests == 1


async def test_stats_do_not_wait_for_a_dead_instance(serve, pair):
    _, remote = await serve(*pair)
    await pair[1].server.stop()
    stats = await remote.fetch_stats()
    assert [each.instance_id for each in stats.instances] == ["p0", "d0"]


async def test_a_scheduler_of_another_version_is_told_at_once_and_not_waited_for(serve, pair):
    _, remote = await serve(*pair)
    refused = asyncio.create_task(remote.find(600))
    await asyncio.sleep(0)
    remote._client._handle(wire.Refused(99, "epoch"), b"")
    with pytest.raises(NotReady, match=f"^{remote.address} speaks version 99 of the protocol, this side"):
        await refused


async def test_find_says_by_name_that_nobody_answers():
    server = RpcServer()  # finds a port on which nobody will be
    await server.start()
    await server.stop()
    remote = RemoteScheduler(server.address)
    await remote.start()
    try:
        with pytest.raises(NotReady, match=r"^no scheduler within 0\.5 s: .* nothing .* listens there$") as caught:
            await remote.find(0.5)
        assert str(caught.value).count(server.address) == 1
    finally:
        await remote.stop()


async def test_find_waits_for_a_scheduler_that_comes_later(make_instance):
    port = RpcServer()
    await port.start()
    await port.stop()
    remote = RemoteScheduler(port.address)
    await remote.start()
    finding = asyncio.create_task(remote.find(30))
    scheduler = SchedulerServer(CpuScheduler(SchedulerConfig(port=port.port), model_path="late"))
    await scheduler.start()
    try:
        assert (await finding).model_path == "late"
    finally:
        await remote.stop()
        await scheduler.stop()


async def test_a_taken_port_is_an_error_that_leaves_nothing_behind(serve, pair):
    server, _ = await serve(*pair)
    before = asyncio.all_tasks()
    second = SchedulerServer(CpuScheduler(SchedulerConfig(port=int(server.address.rpartition(":")[2]))))
    with pytest.raises(AddressInUse, match=rf"{server.address} is in use.*scheduler\.port"):
        await second.start()
    assert asyncio.all_tasks() == before


async def test_a_server_that_stops_ends_the_streams_of_its_clients(serve, pair, ask):
    pair[1].hold = {"tokens"}
    server, _ = await serve(*pair)
    client = RemoteScheduler(server.address, heartbeat_timeout_s=1.0)
    await client.start()
    events = client.submit(ask())
    await anext(events)
    await server.stop()
    with pytest.raises(HBServeRpcError):
        async with asyncio.timeout(30):
            await anext(events)
    await client.stop()


async def test_probes_of_a_scheduler_are_answered_over_http_if_it_has_a_port_for_them(serve, make_instance, until):
    prefill, decode = await make_instance("prefill", "p0"), await make_instance("decode", "d0")
    server, _ = await serve(prefill, decode, health_port=0)

    async def ask(path: str) -> str:
        reader, writer = await asyncio.open_connection(*server.health.address.split(":"))
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        found = (await reader.read()).decode()
        writer.close()
        return found

    assert (await ask("/health")).startswith("HTTP/1.1 200 ")
    assert (await ask("/ready")).startswith("HTTP/1.1 200 ")
    assert 'hbserve:instance_up{instance_id="d0",role="decode"} 1\n' in await ask("/metrics")
    decode.status = "failed"
    await until(lambda: server.scheduler.fleet.handles["d0"].status == "failed")
    found = await ask("/ready")
    assert found.startswith("HTTP/1.1 503 ")
    assert "d0 (decode)" in found
    assert (await ask("/health")).startswith("HTTP/1.1 200 "), "to end it would help nobody"
    decode.status = "ready"
    await until(lambda: server.scheduler.fleet.may_serve())
