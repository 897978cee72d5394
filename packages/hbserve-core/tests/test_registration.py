"""An instance registers itself with schedulers, again and again, for they may be started later or again."""

import asyncio
import logging

import pytest

from hbserve_core import InstanceConfig, InvalidInstanceConfig
from hbserve_core.instance import registration
from hbserve_rpc import InvalidRequest, RpcServer
from hbserve_rpc.members import SCHEDULER_JOIN, JoinRequest
from hbserve_rpc.messages import InstanceInfo


async def test_it_is_told_on_and_what_a_scheduler_says_is_in_the_log_once(monkeypatch, caplog):
    monkeypatch.setattr(registration, "INTERVAL_S", 0.01)
    caplog.set_level(logging.INFO)
    told: list[list[JoinRequest]] = [[], []]
    servers = [RpcServer(), RpcServer()]

    async def refuse_twice(request: JoinRequest) -> InstanceInfo:
        told[0].append(request)
        if len(told[0]) <= 2:
            raise InvalidRequest("another one has its id")
        return InstanceInfo("d0", "decode", "e", "ready")

    async def take(request: JoinRequest) -> InstanceInfo:
        told[1].append(request)
        return InstanceInfo("d0", "decode", "e", "ready")

    for server, answer in zip(servers, (refuse_twice, take), strict=True):
        server.serve(SCHEDULER_JOIN, answer)
        await server.start()
    addresses = [server.address for server in servers]
    registering = asyncio.create_task(registration.keep_registered("d0", "127.0.0.1:7", addresses))
    async with asyncio.timeout(30):
        while min(map(len, told)) < 5:
            await asyncio.sleep(0.001)
    registering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await registering
    for server in servers:
        await server.stop()
    assert {each for several in told for each in several} == {JoinRequest("127.0.0.1:7")}, "and not `again`"
    said = [record.message for record in caplog.records if "regist" in record.message]
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["d0 cannot be registered; still trying: another one has its id"]
    assert sorted(said) == sorted([
        "d0 cannot be registered; still trying: another one has its id",
        *(f"d0 is registered with the scheduler at {address}" for address in addresses),
    ])  # fmt: skip


def test_where_a_scheduler_is_must_be_an_address():
    with pytest.raises(InvalidInstanceConfig, match="schedulers: 'nowhere': expected HOST:PORT"):
        InstanceConfig(model_path="/m", schedulers=("nowhere",))
