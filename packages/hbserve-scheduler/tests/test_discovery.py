"""Instances behind a name, and in a file that is read again."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from hbserve_rpc import InvalidRequest
from hbserve_rpc.messages import Empty
from hbserve_scheduler import ConfigError, SchedulerServer, convert, discovery, membership
from hbserve_scheduler.config_file import load_config
from hbserve_scheduler.declared import DeclaredInstances
from hbserve_scheduler.discovery import DnsName
from hbserve_scheduler.fleet import Fleet

HYBRID = {"instance_type": "hybrid"}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(membership, "LOOK_S", 0.01)
    monkeypatch.setattr(membership, "DESCRIBE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(discovery, "INTERVAL_S", 0.02)


@pytest.fixture
def names(monkeypatch) -> dict[tuple[str, int], Any]:
    """What name servers say: addresses, or an error."""
    found: dict[tuple[str, int], Any] = {}

    async def addresses(self: DnsName) -> set[str]:
        answer = found[self.host, self.port]
        if isinstance(answer, Exception):
            raise answer
        return set(answer)

    monkeypatch.setattr(DnsName, "addresses", addresses)
    return found


@pytest.fixture
async def serve(make_scheduler):
    """Makes a SchedulerServer of what a file declares."""
    made: list[SchedulerServer] = []

    async def make(*instances: Any, load: Any = None) -> SchedulerServer:
        server = SchedulerServer(await make_scheduler(starts=False))
        config = convert({"gpu_instances": list(instances)})
        server.declared = DeclaredInstances(server.members, config, load)
        await server.start()
        made.append(server)
        return server

    yield make
    for server in made:
        await server.stop()


def statuses(server: SchedulerServer) -> dict[str, str]:
    return {each.instance_id: each.status for each in server.scheduler.fleet.handles.values()}


async def test_whoever_is_found_joins_with_an_id_of_its_own_and_leaves_when_it_is_found_no_more(
    serve, names, make_instance, ask, collect, until
):
    pods = [await make_instance("hybrid", f"pod-{i}") for i in range(3)]
    names["h", 7] = [pods[0].address, pods[1].address]
    server = await serve(HYBRID | {"discover": "dns:h:7"})
    await until(lambda: statuses(server) == {"pod-0": "ready", "pod-1": "ready"})
    pods[0].hold = {"tokens"}
    stream = server.scheduler.submit(ask())
    await until(lambda: pods[0].requests or pods[1].requests)
    if pods[1].requests:  # the one that has nothing was chosen by chance
        await collect(stream)
        stream = server.scheduler.submit(ask())
        await until(lambda: pods[0].requests)
    names["h", 7] = [pods[1].address, pods[2].address]
    await until(lambda: statuses(server) == {"pod-0": "draining", "pod-1": "ready", "pod-2": "ready"})
    pods[0].release()
    assert (await collect(stream))[1].num_attempts == 1, "it finished what it had"
    await until(lambda: statuses(server) == {"pod-1": "ready", "pod-2": "ready"})


@pytest.mark.parametrize("error", [socket.gaierror(-2, "no such name"), TimeoutError()])
async def test_a_look_up_that_fails_removes_nobody_and_is_said_once(serve, names, make_instance, until, caplog, error):
    pod = await make_instance("hybrid", "pod-0")
    names["h", 7] = [pod.address]
    server = await serve(HYBRID | {"discover": "dns:h:7"})
    await until(lambda: statuses(server) == {"pod-0": "ready"})
    asked = 0

    async def addresses(_: DnsName) -> set[str]:
        nonlocal asked
        asked += 1
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DnsName, "addresses", addresses)
        await until(lambda: asked > 3)
    assert statuses(server) == {"pod-0": "ready"}
    (told,) = [each.message for each in caplog.records if "h cannot be looked up; still trying" in each.message]
    assert told.endswith(": no name server answers" if isinstance(error, TimeoutError) else ": no such name")


async def test_one_that_does_not_answer_or_has_another_role_is_asked_on_and_told_once(
    serve, names, make_instance, free_ports, until, caplog
):
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    other = await make_instance("prefill", "p0")
    names["h", 7] = [nobody, other.address]
    server = await serve(HYBRID | {"discover": "dns:h:7"})
    pod = await make_instance("hybrid", "pod-0")

    def said(words: str) -> int:
        return len([each for each in caplog.records if words in each.message])

    await until(lambda: said("it is a prefill instance, expected hybrid"))
    await until(lambda: said(f"{nobody}, of h, does not join"))
    other.role = other.started_as = "hybrid"
    names["h", 7] = [nobody, other.address, pod.address]
    await until(lambda: statuses(server) == {"p0": "ready", "pod-0": "ready"})
    assert said("it is a prefill instance") == 1


async def test_another_instance_at_the_address_of_a_lost_one_takes_its_place(serve, names, make_instance, until):
    pod = await make_instance("hybrid", "pod-0")
    names["h", 7] = [pod.address]
    server = await serve(HYBRID | {"discover": "dns:h:7"})
    await until(lambda: statuses(server) == {"pod-0": "ready"})
    pod.instance_id = "pod-1"
    await pod.restart()
    await until(lambda: statuses(server) == {"pod-1": "ready"})


async def test_who_is_found_again_stays_or_comes_back(serve, names, make_instance, ask, collect, until):
    pod, other = await make_instance("hybrid", "pod-0"), await make_instance("hybrid", "pod-1")
    names["h", 7] = [pod.address, other.address]
    server = await serve(HYBRID | {"discover": "dns:h:7"})
    await until(lambda: statuses(server) == {"pod-0": "ready", "pod-1": "ready"})
    pod.hold = other.hold = {"tokens"}
    streams = [server.scheduler.submit(ask(f"{i}")) for i in range(2)]
    await until(lambda: pod.requests and other.requests)
    names["h", 7] = [other.address]
    await until(lambda: statuses(server)["pod-0"] == "draining")
    names["h", 7] = [pod.address, other.address]
    await until(lambda: statuses(server)["pod-0"] == "ready")
    for each in (pod, other):
        each.release()
    await asyncio.gather(*map(collect, streams))
    names["h", 7] = [other.address]
    await until(lambda: list(statuses(server)) == ["pod-1"])
    names["h", 7] = [pod.address, other.address]
    await until(lambda: statuses(server) == {"pod-1": "ready", "pod-0": "ready"})


async def test_two_addresses_of_one_life_are_one_instance(serve, names, make_instance, until):
    pod = await make_instance("hybrid", "pod-0")
    again = f"localhost:{pod.server.port}"
    names["h", 7] = [again, pod.address]
    server = await serve(HYBRID | {"discover": "dns:h:7"})
    await until(lambda: len(server.declared._discoveries[0]._ids) == 2 and statuses(server) == {"pod-0": "ready"})
    names["h", 7] = [again]
    await until(lambda: len(server.declared._discoveries[0]._ids) == 1)
    assert statuses(server) == {"pod-0": "ready"}
    assert not server.members._leaving


async def test_addresses_of_one_life_that_are_found_together_do_not_replace_each_other(
    names, make_instance, until, monkeypatch, serve
):
    """Before the first of them has been reached, too."""
    pod = await make_instance("hybrid", "pod-0")
    names["h", 7] = [f"localhost:{pod.server.port}", pod.address, f"127.0.0.2:{pod.server.port}"]
    removed, remove = [], Fleet.remove

    async def noted(fleet: Fleet, instance_id: str, *why: str) -> None:
        removed.append(instance_id)
        await remove(fleet, instance_id, *why)

    monkeypatch.setattr(Fleet, "remove", noted)
    server = await serve(HYBRID | {"discover": "dns:h:7"})
    await until(lambda: len(server.declared._discoveries[0]._ids) >= 2 and statuses(server) == {"pod-0": "ready"})
    assert removed == []


async def test_a_life_that_is_lost_at_one_address_is_used_at_another(names, make_instance, until, serve):
    pod = await make_instance("hybrid", "pod-0")
    server = await serve(HYBRID | {"instance_id": "pod-0", "host": "127.0.0.1", "port": 9})
    assert statuses(server) == {"pod-0": "lost"}
    info = await server.members.join(pod.address)
    assert info.instance_id == "pod-0"
    await until(lambda: statuses(server) == {"pod-0": "ready"})
    assert server.scheduler.fleet.handles["pod-0"].address == pod.address


async def test_a_name_is_looked_up_beside_the_event_loop():
    found = await DnsName("localhost", 5555).addresses()
    assert "127.0.0.1:5555" in found


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (
            {"discover": "h:7"},
            r"gpu_instances\[0\].discover='h:7': expected dns:NAME:PORT, with a port from 1",
        ),
        ({"discover": "dns:h:0"}, r"discover='dns:h:0': expected dns:NAME:PORT, with a port from 1"),
        ({"discover": "dns:-h:7"}, r"discover='dns:-h:7': its name is '-h': expected an IP address or a name"),
        ({"discover": "dns:h:7", "host": "a"}, r"gpu_instances\[0\].host='a': expected none with discover"),
        ({"discover": "dns:h:7", "instance_id": "a"}, r"instance_id='a': expected none with discover"),
        ({}, r"gpu_instances\[0\].instance_id='': expected a name"),
    ],
)
def test_what_cannot_be_discovered_is_refused_with_its_place(entry, problem):
    with pytest.raises(ConfigError, match=problem):
        convert({"gpu_instances": [HYBRID | entry]})


# ---- the file ----------------------------------------------------------------------------------------------------


def entry(instance: Any, number: int) -> dict[str, Any]:
    port = int(instance.address.rpartition(":")[2])
    return {"instance_id": instance.instance_id, "instance_type": instance.role, "port": port, "kv_rank": number}


async def test_a_file_that_is_read_again_has_its_new_instances_join_and_those_that_are_gone_leave(
    serve, names, make_instance, until
):
    pods = [await make_instance("hybrid", f"pod-{i}") for i in range(4)]
    names["h", 7], names["h", 8] = [pods[2].address], [pods[3].address]
    later = {
        "gpu_instances": [entry(pods[1], 1), HYBRID | {"discover": "dns:h:8"}],
        "scheduler": {"max_attempts": 5},
    }
    server = await serve(entry(pods[0], 0), HYBRID | {"discover": "dns:h:7"}, load=lambda: convert(later))
    await until(lambda: statuses(server) == {"pod-0": "ready", "pod-2": "ready"})
    found = await server._reload(Empty())
    assert (found.joining, found.leaving, found.for_a_restart) == (["pod-1"], ["pod-0", "pod-2"], ["scheduler"])
    await until(lambda: statuses(server) == {"pod-1": "ready", "pod-3": "ready"})
    again = await server._reload(Empty())
    assert (again.joining, again.leaving, again.for_a_restart) == ([], [], [])


async def test_one_that_is_declared_elsewhere_is_used_there(serve, make_instance, until):
    here, there = await make_instance("hybrid", "pod-0"), await make_instance("hybrid", "pod-0")
    server = await serve(entry(here, 0), load=lambda: convert({"gpu_instances": [entry(there, 0)]}))
    await until(lambda: statuses(server) == {"pod-0": "ready"})
    await server._reload(Empty())
    assert server.scheduler.fleet.handles["pod-0"].address == there.address
    await until(lambda: statuses(server) == {"pod-0": "ready"})


async def test_a_file_that_is_wrong_changes_nothing_and_says_what_is_wrong(serve, make_instance, tmp_path: Path, until):
    pod = await make_instance("hybrid", "pod-0")
    path = tmp_path / "deployment.yaml"
    path.write_text("gpu_instances: [{instance_id: a, instance_typo: hybrid}]\n")
    server = await serve(entry(pod, 0), load=lambda: load_config(path))
    with pytest.raises(InvalidRequest, match="instance_typo"):
        await server._reload(Empty())
    assert list(statuses(server)) == ["pod-0"]


async def test_who_has_no_file_says_so(make_scheduler, serve):
    server = SchedulerServer(await make_scheduler(starts=False))
    with pytest.raises(InvalidRequest, match="has no file"):
        await server._reload(Empty())
    with pytest.raises(InvalidRequest, match="has no file"):
        await (await serve(HYBRID | {"discover": "dns:127.0.0.1:7"}))._reload(None)
    await asyncio.sleep(0)
