"""The interface that NCCL is told: that of the address at which an instance's peers reach it."""

import os
import socket

import pytest

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import InstanceFailed
from hbserve_core.instance import process
from hbserve_core.instance.nccl_interface import interface_of, keep_nccl_to
from hbserve_kv import KVTransferConfig

NAMES = [name for _, name in socket.if_nameindex()]


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in ("NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY"):
        monkeypatch.setenv(name, "")  # so that it is as before at the end
        monkeypatch.delenv(name)


def test_an_address_belongs_to_the_interface_that_has_it():
    assert interface_of("127.0.0.1") == interface_of("127.8.0.1") == "lo"
    assert interface_of("203.0.113.9") is None  # of documents: nobody has it
    assert interface_of("2001:db8::9") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        try:
            found.connect(("192.0.2.1", 9))  # sends nothing, but has the system choose an address
        except OSError:
            pytest.skip("this host has the loopback only")
        assert interface_of(found.getsockname()[0]) in NAMES


def test_who_has_named_an_interface_knows_better(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    keep_nccl_to("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"


async def test_an_instance_has_nccl_listen_where_its_peers_reach_it(monkeypatch):
    class Broken:
        def __init__(self, config, **_):
            raise InstanceFailed(f"NCCL listens at {os.environ.get('NCCL_SOCKET_IFNAME')}")

    monkeypatch.setattr(process, "GpuInstance", Broken)
    for host, told in (("203.0.113.9", "None"), ("localhost", "=lo")):  # in this order: the first that is told stays
        config = InstanceConfig(model_path="/models/small", kv_transfer=KVTransferConfig(host=host))
        with pytest.raises(InstanceFailed, match=f"NCCL listens at {told}$"):
            await process.run_instance(config)
