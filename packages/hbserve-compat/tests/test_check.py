"""`hbserve check`: what it says of addresses, of this host, and of a file that will not work."""

import asyncio
import json
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hbserve.__main__ import app
from hbserve.check import network, this_host
from hbserve.check.finding import Finding
from hbserve.check.network import check_network, own_address, places
from hbserve.check.this_host import Gpu, check_host
from hbserve_rpc.keys import make_keys, save_keys
from hbserve_scheduler import DeploymentConfig, convert
from hbserve_scheduler.discovery import DnsName


def deployment(*instances: dict[str, Any], **sections: Any) -> DeploymentConfig:
    """Make a deployment of a prefill instance and decode instances, each changed by its dict."""
    entries = [
        {"instance_id": f"{'d' if rank else 'p'}{rank}", "instance_type": "decode" if rank else "prefill"}
        | {"kv_rank": rank, **each}
        for rank, each in enumerate(instances or ({}, {}))
    ]
    return convert({"gpu_instances": entries, "server": {"port": 0}, "scheduler": {"port": 0}, **sections})


def of(subject: str, findings: Any) -> Finding:
    (found,) = [each for each in findings if each.subject == subject]
    return found


def test_every_address_of_a_file_is_looked_at():
    config = deployment(
        {"host": "10.0.0.1", "port": 5600}, {"port": 5601}, {"port": 5602}, kv_transfer={"port": 7000},
        scheduler={"host": "::", "port": 5550, "health_port": 5551}, server={"port": 8000},
        engine={"health_port": 5680},
    )  # fmt: skip
    found = [(each.subject, each.host, each.port) for each in places(config)]
    assert found == [
        ("server", "127.0.0.1", 8000),
        ("scheduler", "::", 5550),
        ("scheduler health", "::", 5551),
        ("p0", "10.0.0.1", 5600),
        ("p0 KV", "10.0.0.1", 7000),
        ("p0 health", "10.0.0.1", 5680),
        ("d1", "127.0.0.1", 5601),
        ("d1 KV", "127.0.0.1", 7001),
        ("d1 health", "127.0.0.1", 5681),
        ("d2", "127.0.0.1", 5602),
        ("d2 KV", "127.0.0.1", 7002),
        ("d2 health", "127.0.0.1", 5682),
    ]
    beside = deployment(scheduler={"host": "192.0.2.77"}, server={"port": 8000})
    assert "server" not in {each.subject for each in places(beside)}, "it is beside the scheduler, on that host"


async def test_addresses_of_this_host_are_free_or_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        findings = await check_network(deployment({"port": port}, {"host": "localhost"}))
    assert of("p0", findings) == Finding(
        "FAIL", "p0", f"127.0.0.1:{port} of this host is in use: by this deployment, if it is running; "
        "otherwise choose another gpu_instances[0].port",
    )  # fmt: skip
    assert of("d1", findings) == Finding("ok", "d1", "localhost:0 belongs to this host and is free")


async def test_other_hosts_are_reached_or_it_is_said_why_not(monkeypatch):
    monkeypatch.setattr(network, "is_here", lambda host: False)
    monkeypatch.setattr(network, "REACH_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as closed:
        open_port, closed_port = (each.getsockname()[1] for each in (listening, closed))
        closed.close()
        config = deployment({"port": open_port}, {"port": closed_port}, {"host": "nobody.invalid", "port": 1}, {})
        findings = await check_network(config)
    assert of("p0", findings).text.endswith("is reached from 127.0.0.1; somebody listens there")
    assert of("d1", findings).text.endswith("is reached from 127.0.0.1; nobody listens there yet")
    assert of("d2", findings).text.startswith("gpu_instances[2].host='nobody.invalid': no name server knows it")
    assert of("d3", findings).text.startswith("gpu_instances[3].port=0 on another host")
    assert [each.verdict for each in findings] == ["FAIL", "ok", "ok", "FAIL", "FAIL"], "the scheduler's port is 0 too"

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio, "open_connection", never)
    silent = of("p0", await check_network(deployment({"port": 9}, {"port": 10})))
    assert silent == Finding("FAIL", "p0", "127.0.0.1:9: no answer in 0.05 s: a firewall, or a host that is off")


async def test_names_by_which_instances_are_found_are_looked_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        discovered = [f"dns:localhost:{port}", "dns:nobody.invalid:5600"]
        config = convert({"gpu_instances": [{"instance_type": "hybrid", "discover": each} for each in discovered]})
        findings = await check_network(config)
    found = [each for each in findings if each.subject == discovered[0]]
    here = [each for each in found if each.text.startswith(f"127.0.0.1:{port} ")]
    assert here == [Finding("ok", discovered[0], f"127.0.0.1:{port} is reached from 127.0.0.1; somebody listens there")]
    unknown = of(discovered[1], findings)
    assert unknown.verdict == "note", "a name of Kubernetes has no addresses before its first pod"
    assert unknown.text.startswith("gpu_instances[1].discover='dns:nobody.invalid:5600': no name server knows it: ")

    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(network, "DISCOVERY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(DnsName, "addresses", never)
    (silent,) = await network._check_name("gpu_instances[0]", "dns:name:5600")
    assert (silent.verdict, silent.text.count("no name server answers")) == ("note", 1)


def test_the_address_that_a_peer_would_see_is_known_without_a_packet():
    assert own_address("127.0.0.1") == "127.0.0.1"


GPUS = [Gpu(0, "H100", 79 << 30, 80 << 30), Gpu(1, "H100", 20 << 30, 80 << 30)]


def test_gpus_have_the_memory_that_instances_will_take_or_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setattr(this_host, "list_gpus", lambda: GPUS)
    findings = list(check_host(deployment({"gpu_id": 0}, {"gpu_id": 1})))
    assert of("GPU 0", findings) == Finding("ok", "GPU 0", "H100, 79.0 of 80.0 GiB free, for p0")
    assert of("GPU 1", findings).verdict == "FAIL"
    assert "20.0 of 80.0 GiB free; d1 would take 90%" in of("GPU 1", findings).text
    less = deployment({"gpu_id": 0}, {"gpu_id": 0}, engine={"gpu_memory_utilization": 0.2})
    assert [each.verdict for each in check_host(less) if "GPU" in each.subject] == ["ok", "ok"]
    beyond = list(check_host(deployment({"gpu_id": 0}, {"gpu_id": 1, "tensor_parallel_size": 2})))
    assert of("d1", beyond) == Finding("FAIL", "d1", "needs GPU 2; this host has 2")


def test_a_host_without_gpus_computes_on_the_cpu_unless_cuda_was_asked_for(monkeypatch):
    monkeypatch.setattr(this_host, "list_gpus", list)
    assert of("GPU", check_host(deployment())).verdict == "ok"
    assert of("p0", check_host(deployment(engine={"device": "cuda"}))).text == "needs GPU 0; this host has 0"
    assert "Gloo, over TCP" in of("NCCL", check_host(deployment())).text
    assert not [each for each in check_host(deployment(kv_transfer={"backend": "ipc"})) if each.subject == "NCCL"]


def test_the_path_of_nccl_between_hosts_is_rdma_where_a_card_has_a_link(monkeypatch, tmp_path):
    monkeypatch.setattr(this_host, "list_gpus", lambda: GPUS)
    monkeypatch.setattr(this_host, "INFINIBAND", tmp_path)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    config = deployment({}, {"host": "192.0.2.1"})
    assert "all instances are on this host" in of("NCCL", check_host(deployment())).text
    assert of("NCCL", check_host(config)).text == "TCP over eth7: no active InfiniBand or RoCE port here"
    port = tmp_path / "mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    assert of("NCCL", check_host(config)).text.startswith("RDMA over mlx5_0:1, ")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert of("NCCL", check_host(config)).text == "TCP over eth7: NCCL_IB_DISABLE=1"


def test_what_the_driver_says_of_gpus_is_read(monkeypatch):
    lines = "0, NVIDIA H100 80GB HBM3, 80000, 81559\n1, NVIDIA H100 80GB HBM3 MIG 1g, [N/A], [N/A]\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, lines, ""))
    assert this_host.list_gpus() == [Gpu(0, "NVIDIA H100 80GB HBM3", 80000 << 20, 81559 << 20)]


def test_few_open_files_and_little_shared_memory_are_noted(monkeypatch, tmp_path):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(this_host, "SHARED_MEMORY", tmp_path / "none")
    findings = list(check_host(deployment()))
    assert of("open files", findings) == Finding("note", "open files", "1024, one for each client and peer: few")
    assert of("shared memory", findings).verdict == "note"
    assert of("clock", findings).verdict in ("ok", "note")


def check(config: Path) -> tuple[int, list[str], str]:
    done = CliRunner().invoke(app, ["check", "--config", str(config)])
    return done.exit_code, done.stdout.splitlines(), done.stderr


def test_keys_are_there_or_it_is_said_who_could_do_without(config, tmp_path, monkeypatch):
    monkeypatch.setattr(this_host, "list_gpus", list)
    folder = tmp_path / "keys"
    status, lines, _ = check(config(security={"keys": str(folder)}))
    assert (status, lines[1].startswith("FAIL  keys ")) == (1, True)
    assert f"there is no such file; `hbserve keys {folder}` makes it" in lines[1]
    save_keys(make_keys(), folder)
    assert check(config(security={"keys": str(folder)}))[1][1].endswith(f"{folder}: of scheduler and instance")
    open_to_all = config(scheduler={"port": 0, "host": "0.0.0.0"})
    assert check(open_to_all)[1][1].startswith(
        "note  keys           none: whoever reaches the addresses of scheduler may"
    )


def test_instances_that_are_found_by_a_name_are_reached_by_others_even_if_the_scheduler_is_not(config, monkeypatch):
    async def nothing(_: Any) -> list[Any]:
        return []

    monkeypatch.setattr("hbserve.check.deployment.check_network", nothing)
    for name, told in {
        "pods.invalid": "whoever reaches the addresses of dns:pods.invalid:5",
        "localhost": "none; this host alone",
    }.items():
        discovered = config(gpu_instances=[{"discover": f"dns:{name}:5", "instance_type": "hybrid"}])
        assert any(told in line for line in check(discovered)[1])


def test_a_deployment_that_will_work_is_status_0_and_one_that_will_not_names_what(config, monkeypatch):
    monkeypatch.setattr(this_host, "list_gpus", list)
    status, lines, error = check(config())
    assert (status, error) == (0, "")
    assert "prefill-0, decode-0; on this host prefill-0, decode-0" in lines[0]
    assert lines[1].endswith("none; this host alone reaches the deployment")
    assert lines[2].startswith("ok    model ")
    status, lines, error = check(config(model={"path": "/nowhere"}))
    assert (status, error) == (1, "error: this will not work: model\n")
    assert lines[2].startswith("FAIL  model ")
    assert "'/nowhere' does not exist" in lines[2]
    status, lines, error = check(config(kv_transfer={"backend": "nclc"}))
    assert (status, error) == (1, "error: this will not work: settings\n")
    assert lines[2].startswith("FAIL  settings ")
    assert "kv_transfer.backend='nclc': there are" in lines[2]
    status, lines, error = check(config(modle={}))
    assert (status, lines) == (2, [])
    assert "modle: unknown key" in error


@pytest.mark.netns
def test_a_host_whose_loopback_is_down_is_told_in_place_of_a_start(make_network, tmp_path):
    """Addresses can be bound there, but not reached: each instance would wait for itself, for half a minute."""
    network = make_network({"alone": "10.9.9.1"})
    namespace = network.namespace("alone")
    subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "down"], check=True, timeout=30)
    for host in ("127.0.0.1", "10.9.9.1"):
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps({"gpu_instances": [{"instance_id": "h", "instance_type": "hybrid", "host": host}],
                                    "security": {"allow_insecure": True}, "scheduler": {"host": host}}))  # fmt: skip
        for command, status in (("serve", 2), ("check", 1)):
            whole = ["ip", "netns", "exec", namespace, sys.executable, "-m", "hbserve", command, "--config", str(path)]
            done = subprocess.run(whole, capture_output=True, text=True, timeout=120)
            assert done.returncode == status, done.stderr
            why = "(Network is unreachable|timed out); is its interface `lo` up"
            assert re.search(f"{host}:5550 is not reached from this host itself: {why}", done.stdout + done.stderr)
