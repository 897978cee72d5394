"""`hbserve serve --ray` without a cluster: the resources that each instance takes on a node, and refusals."""

import socket
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hbserve.commands.serve import ServeArgs
from hbserve.ray_cluster import cluster
from hbserve.ray_cluster.cluster import bundle_of, connect, pairs
from hbserve_scheduler import ConfigError, DeploymentConfig, convert


def deployment(num_prefill: int = 1, num_decode: int = 1, **sections: Any) -> DeploymentConfig:
    roles = ["prefill"] * num_prefill + ["decode"] * num_decode
    entries = [
        {"instance_id": f"{role[0]}{rank}", "instance_type": role, "kv_rank": rank} for rank, role in enumerate(roles)
    ]
    return convert({"gpu_instances": entries, **sections})


@pytest.mark.parametrize(
    ("numbers", "place", "groups"),
    [
        ((1, 1), "any", ["p0", "d1"]),
        ((1, 1), "pair", ["p0 d1"]),
        ((2, 3), "pair", ["p0 d2", "p1 d3", "d4"]),
        ((2, 1), "pair", ["p0 d2", "p1"]),
    ],
)
def test_instances_that_are_to_be_on_one_node_share_a_place(numbers, place, groups):
    config = deployment(*numbers)
    found = [" ".join(each.instance_id for each in group) for group in pairs(config.gpu_instances, place)]
    assert found == groups


def test_an_instance_takes_cores_gpus_and_what_its_role_wants_of_a_node(monkeypatch):
    ray = {"resources": {"decode": {"big": 2}}, "accelerator_type": {"prefill": "H100"}}
    config = deployment(ray=ray, engine={"num_threads": 3})
    prefill, decode = config.gpu_instances
    monkeypatch.setattr(cluster, "_has_gpus", lambda: True)
    assert bundle_of(config, prefill, 2) == {"CPU": 3.0, "GPU": 2.0, "accelerator_type:H100": 0.001}
    assert bundle_of(config, decode, 1) == {"CPU": 3.0, "GPU": 1.0, "big": 2}
    monkeypatch.setattr(cluster, "_has_gpus", lambda: False)
    assert "GPU" not in bundle_of(config, decode, 1)
    asked_for = deployment(engine={"device": "cuda"})
    assert bundle_of(asked_for, decode, 1) == {"CPU": 1.0, "GPU": 1.0}, "an autoscaler has to add such a node first"


def test_without_ray_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray: pip install 'hbserve-compat\[ray\]'"):
        connect("auto")


def test_several_front_ends_are_refused_over_a_cluster():
    args = ServeArgs(None, Path("/model"), "INFO", {"api_servers": 2}, ray="auto")
    with pytest.raises(ConfigError, match=r"server\.api_servers=2: expected 1 with --ray"):
        args.deployment()


def test_whatever_ray_says_when_it_cannot_start_is_one_line(monkeypatch):
    ray: Any = ModuleType("ray")

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen")  # as it does

    ray.init = init
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ConfigError, match=r"^--ray=local: The current node timed out during startup\. This could"):
        connect("local")


def test_a_cluster_that_asks_for_a_token_is_told_as_that(monkeypatch):
    ray: Any = ModuleType("ray")

    def init(**_: object) -> None:
        cause = RuntimeError("Failed to connect to GCS.\nUnauthenticated: RPC error: InvalidAuthToken: it is missing")
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from cause  # as it does

    ray.init = init
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:6379; it asks for a token: set RAY_AUTH_MODE=token, with the"):
        connect("auto")


def test_where_nobody_listens_ray_is_not_left_to_try_for_minutes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))  # it would be called in vain
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConfigError, match=rf"^--ray={address}: no cluster is at {address}: .*refused"):
        connect(address)


def test_a_cluster_that_was_killed_and_that_ray_still_knows_is_told_at_once_too(monkeypatch):
    """Ray keeps the cluster's address in a file, which only `ray stop` removes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    services: Any = ModuleType("ray._private.services")
    services.canonicalize_bootstrap_address = lambda _: address
    for name in ("ray", "ray._private"):  # init, which is not there, would be called in vain
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "ray._private.services", services)
    with pytest.raises(ConfigError, match=rf"^--ray=auto: no cluster is at {address}: .*refused"):
        connect("auto")


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\x06\4"])
def test_what_is_no_cluster_is_told_at_once_as_that(monkeypatch, says):
    """Ray itself tries for 14 minutes if something else listens at the address."""
    tried: list[str] = []
    ray: Any = ModuleType("ray")
    ray.init = lambda address, **_: tried.append(address)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(says)
                accepted.recv(100)  # its greeting
                accepted.recv(100)  # until it has gone

        address = f"127.0.0.1:{listener.getsockname()[1]}"
        somebody = threading.Thread(target=answer)
        somebody.start()
        if says.startswith(b"\0"):
            connect(address)  # as the head of a cluster begins
            assert tried == [address]
        else:
            with pytest.raises(
                ConfigError, match=rf"^--ray={address}: no cluster is at {address}: (timed out|.*no head of Ray)"
            ):
                connect(address)
            assert tried == []
        somebody.join()
