"""`hbserve scale`: instances of a running deployment are added, or drained and ended, while requests go on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from hbserve.commands import members
from hbserve.processes import scaling
from hbserve.processes.child_process import Restarts
from hbserve.processes.launcher import Instances
from hbserve.processes.scaling import Scaling, describe, scaled
from hbserve_core import GpuInstance, InstanceConfig
from hbserve_rpc import InvalidRequest, RemoteError, SamplingParams
from hbserve_rpc.messages import GenerateRequest, RequestFinished, Role
from hbserve_scheduler import (
    ConfigError,
    CpuScheduler,
    DeploymentConfig,
    InstanceFailed,
    InstanceSection,
    RemoteScheduler,
    SchedulerServer,
    convert,
)

PAIR = [
    {"instance_id": "prefill-0", "instance_type": "prefill", "kv_rank": 0},
    {"instance_id": "decode-0", "instance_type": "decode", "kv_rank": 1},
]
NUM_TOKENS = 12
PROMPTS = [(3 + number, *range(40, 60)) for number in range(6)]


class InstanceHere:
    """A real instance, in this process."""

    pid = None
    waits_for = "its process starts"
    held = asyncio.Event()
    """Event without which none starts; set anew for each test."""
    failure = ""
    """Why the next instances fail to start; "": they do not."""

    def __init__(self, settings: dict[str, Any], on_death: Callable[[str, str], None]) -> None:
        self.name = self.instance_id = settings["instance_id"]
        self.role = settings["role"]
        self.address = ""
        self.restarts = Restarts()
        self.on_death = on_death
        self.server = GpuInstance(msgspec.convert(settings, InstanceConfig))
        self.has_begun = False
        self.num_left: int | None = None
        """Number of requests that it had when it was stopped."""

    async def start(self) -> None:
        await InstanceHere.held.wait()
        if InstanceHere.failure:
            raise InstanceFailed(f"{self.name}: {InstanceHere.failure}")
        self.has_begun = True
        await self.server.start()
        self.address = self.server.address

    async def stop(self) -> None:
        if self.has_begun and self.num_left is None:
            self.num_left = self.server.num_active
            await self.server.stop()

    async def drain(self) -> None:
        await self.stop()

    def kill(self) -> None:
        """Do nothing: no test here kills an instance."""


class InstancesHere(Instances[InstanceHere]):
    def _make(self, config: DeploymentConfig, instance: InstanceSection) -> InstanceHere:
        return InstanceHere(self._settings(config, instance), self._died)


class Deployment:
    """A pair, its scheduler and a client, as `hbserve serve` runs them."""

    def __init__(self, model: Path) -> None:
        engine = {"num_blocks": 200, "num_threads": 1, "device": "cpu"}
        config = convert({"gpu_instances": PAIR, "engine": engine, "scheduler": {"port": 0}})
        self.scheduler = CpuScheduler(config.scheduler)
        self.server = SchedulerServer(self.scheduler)
        self.instances = InstancesHere(config, model, log_level="ERROR", on_death=self._on_death)
        self.scaling = Scaling(config, self.server, self.instances)
        self.given_up: list[str] = []

    def _on_death(self, instance_id: str, why: str) -> None:
        self.scaling.died(instance_id, why)

    async def start(self) -> None:
        await self.server.start()
        await self.instances.start()
        for each in self.instances.processes:
            await self.scheduler.add_instance(each.instance_id, each.role, each.address)
        await self.scheduler.wait_ready(60)
        self.instances.restart_the_dead(lambda name, _: self.given_up.append(name))
        self.server.scale = self.scaling.scale
        self.client = RemoteScheduler(self.server.address)
        await self.client.start()

    async def stop(self) -> None:
        await self.client.stop()
        await self.scaling.close()
        await self.server.stop()
        await self.instances.stop()

    async def scale(self, **wanted: int) -> list[str]:
        return [each.text async for each in self.client.scale(cast(dict[Role, int], wanted))]

    def find(self, name: str) -> InstanceHere:
        (found,) = [each for each in self.instances.processes if each.name == name]
        return found

    @property
    def statuses(self) -> dict[str, str]:
        return {each.instance_id: each.status for each in self.scheduler.fleet.handles.values()}

    async def answer(self, number: int, request_id: str) -> tuple[list[int], RequestFinished]:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        tokens: list[int] = []
        async for event in self.client.submit(GenerateRequest(request_id, PROMPTS[number], params)):
            if isinstance(event, RequestFinished):
                return tokens, event
            tokens += event.token_ids
        raise AssertionError("it has no end")


@pytest.fixture
async def deployment(small_model, monkeypatch) -> AsyncIterator[Deployment]:
    monkeypatch.setattr(InstanceHere, "held", asyncio.Event())
    monkeypatch.setattr(InstanceHere, "failure", "")
    monkeypatch.setattr(scaling, "LOOK_S", 0.01)
    InstanceHere.held.set()
    made = Deployment(small_model("qwen3"))
    async with asyncio.timeout(60):
        await made.start()
        yield made
        await made.stop()
    assert not made.given_up
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_every_token_comes_once_while_decode_instances_are_one_then_three_then_one(deployment):
    expected = [(await deployment.answer(number, f"before-{number}"))[0] for number in range(len(PROMPTS))]
    assert {len(tokens) for tokens in expected} == {NUM_TOKENS}
    used: set[str] = set()
    ended = asyncio.Event()

    async def ask_on(number: int) -> None:
        count = 0
        while not ended.is_set():
            tokens, finished = await deployment.answer(number, f"{number}-{count}")
            assert (tokens, finished.num_attempts) == (expected[number], 1)
            used.add(finished.decode_instance)
            count += 1

    async with asyncio.TaskGroup() as asking:
        for number in range(len(PROMPTS)):
            asking.create_task(ask_on(number))
        lines = await deployment.scale(decode=3)
        assert {"decode-1 takes requests", "decode-2 takes requests"} <= set(lines)
        assert lines[-1] == "prefill=1 decode=3"
        await until(lambda: used == {"decode-0", "decode-1", "decode-2"})
        going = [deployment.find(name) for name in ("decode-1", "decode-2")]
        lines = await deployment.scale(decode=1)
        assert {"decode-1 has left", "decode-2 has left"} <= set(lines)
        assert [each.num_left for each in going] == [0, 0], "they were ended when they had nothing left"
        used.clear()
        await until(lambda: used)
        ended.set()
    assert used == {"decode-0"}
    assert deployment.statuses == {"prefill-0": "ready", "decode-0": "ready"}
    assert [each.name for each in deployment.instances.processes] == ["prefill-0", "decode-0"]


async def test_another_wish_takes_the_place_of_one_that_waits_for_room(deployment):
    InstanceHere.held.clear()
    stream = deployment.client.scale({"decode": 3})
    lines = [(await anext(aiter(stream))).text]
    assert lines == ["waiting for decode-1: its process starts; decode-2: its process starts"]
    assert (await deployment.scale(decode=1))[-1] == "prefill=1 decode=1"
    lines += [each.text async for each in stream]
    assert set(lines[1:-1]) >= {"decode-1 is not wanted any more", "decode-2 is not wanted any more"}
    assert [each.name for each in deployment.instances.processes] == ["prefill-0", "decode-0"]
    InstanceHere.held.set()
    assert (await deployment.scale(prefill=1, decode=1)) == ["prefill=1 decode=1"]


async def test_it_goes_on_although_whoever_asked_has_gone(deployment):
    InstanceHere.held.clear()
    stream = deployment.client.scale({"decode": 2})
    await anext(aiter(stream))
    await stream.aclose()
    InstanceHere.held.set()
    await until(lambda: deployment.statuses.get("decode-1") == "ready")
    await until(lambda: deployment.find("decode-1").restarts.are_wanted)


async def test_one_that_does_not_start_is_told_with_its_reason_and_the_others_serve_on(deployment):
    InstanceHere.failure = "exit status 1: no GPU"
    with pytest.raises(RemoteError, match=r"^decode-1: exit status 1: no GPU$"):
        await deployment.scale(decode=2)
    assert list(deployment.statuses) == ["prefill-0", "decode-0"]
    InstanceHere.failure = ""
    assert (await deployment.scale(decode=2))[-1] == "prefill=1 decode=2"
    assert list(deployment.statuses) == ["prefill-0", "decode-0", "decode-1"]


async def test_one_that_dies_before_it_is_ready_does_not_come_and_is_not_started_again(deployment, monkeypatch):
    load, may_load = GpuInstance._load, asyncio.Event()

    async def load_late(instance: GpuInstance) -> None:
        await may_load.wait()
        await load(instance)

    monkeypatch.setattr(GpuInstance, "_load", load_late)
    asking = asyncio.create_task(deployment.scale(decode=2))
    await until(lambda: "decode-1" in deployment.statuses)
    process = deployment.find("decode-1")
    process.on_death("decode-1", "its process has ended (signal SIGKILL)")
    may_load.set()
    with pytest.raises(RemoteError, match=r"^decode-1: its process has ended \(signal SIGKILL\)$"):
        await asking
    assert not deployment.instances._restarting
    assert list(deployment.statuses) == ["prefill-0", "decode-0"]


async def test_one_that_dies_while_it_is_drained_is_not_started_again(deployment, monkeypatch):
    await deployment.scale(decode=2)
    left = asyncio.Event()
    monkeypatch.setattr(deployment.server.members, "until_left", lambda _: left.wait())
    asking = asyncio.create_task(deployment.scale(decode=1))
    process = deployment.find("decode-1")
    await until(lambda: not process.restarts.are_wanted)
    process.on_death("decode-1", "its process has ended (signal SIGKILL)")
    assert not deployment.instances._restarting
    left.set()
    assert (await asking)[-1] == "prefill=1 decode=1"


async def test_who_is_called_back_while_it_is_drained_stays(deployment):
    await deployment.scale(decode=2)
    process = deployment.find("decode-1")
    process.server._inboxes["held"] = None  # it has something left
    stream = deployment.client.scale({"decode": 1})
    lines = aiter(stream)
    assert (await anext(lines)).text.startswith("waiting for decode-1")
    await until(lambda: deployment.statuses["decode-1"] == "draining")
    await deployment.client.join(process.address)
    texts = [each.text async for each in stream]
    assert texts[-2:] == ["decode-1 was called back, and stays", "prefill=1 decode=2"]
    del process.server._inboxes["held"]
    assert deployment.statuses["decode-1"] == "ready"
    assert process.restarts.are_wanted


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_drain_ends_with_an_error_when_its_instance_is_called_back(deployment, leaves, capsys):
    process = deployment.find("decode-0")
    process.server._inboxes["held"] = None  # it has something left
    args = members.DrainArgs(deployment.server.address, None, "decode-0", leaves, None)
    draining = asyncio.create_task(members.drain(args))
    await until(lambda: "requests left" in capsys.readouterr().err)
    await deployment.client.join(process.address)
    async with asyncio.timeout(60):
        with pytest.raises(InvalidRequest, match="decode-0 takes requests again"):
            await draining
    del process.server._inboxes["held"]


async def test_a_drain_whose_instance_is_lost_does_not_say_that_it_has_left(deployment, capsys):
    process = deployment.find("decode-0")
    process.server._inboxes["held"] = None
    draining = asyncio.create_task(
        members.drain(members.DrainArgs(deployment.server.address, None, "decode-0", False, None))
    )
    await until(lambda: "requests left" in capsys.readouterr().err)
    del process.server._inboxes["held"]
    await process.stop()
    async with asyncio.timeout(60):
        await draining
    assert capsys.readouterr().out == (
        "decode-0 no longer answers, and its requests go on elsewhere: it may be stopped\n"
    )


async def test_who_was_drained_goes_first_and_the_number_is_of_those_that_take_requests(deployment):
    await deployment.scale(decode=2)
    await deployment.client.drain("decode-0")
    await deployment.scale(decode=1)
    assert deployment.statuses == {"prefill-0": "ready", "decode-1": "ready"}
    await deployment.client.drain("decode-1")
    assert (await deployment.scale(decode=1))[-1] == "prefill=1 decode=1"
    assert deployment.statuses == {"prefill-0": "ready", "decode-0": "ready"}
    await deployment.answer(0, "one")


async def test_who_was_told_to_leave_and_has_left_is_not_counted(deployment):
    await deployment.client.drain("decode-0", leaves=True)
    await until(lambda: list(deployment.statuses) == ["prefill-0"])
    assert (await deployment.scale(prefill=1, decode=1))[-1] == "prefill=1 decode=1"
    assert deployment.statuses == {"prefill-0": "ready", "decode-1": "ready"}
    assert [each.name for each in deployment.instances.processes] == ["prefill-0", "decode-1"]
    await deployment.answer(0, "one")


async def test_new_ones_begin_when_those_that_go_have_gone(deployment):
    await deployment.scale(decode=2)
    process = deployment.find("decode-1")
    process.server._inboxes["held"] = None  # it has something left
    stream = deployment.client.scale({"prefill": 2, "decode": 1})
    async for each in stream:
        if "others go first" in each.text:
            break
    assert "prefill-1: others go first" in each.text
    del process.server._inboxes["held"]
    texts = [each.text async for each in stream]
    assert texts.index("decode-1 has left") < texts.index("prefill-1 takes requests")


async def test_what_cannot_be_is_refused_and_changes_nothing(deployment):
    with pytest.raises(InvalidRequest, match="there is no decode instance; expected at least one prefill and one"):
        await deployment.scale(decode=0)
    deployment.server.scale = None
    with pytest.raises(InvalidRequest, match="this scheduler starts no instances"):
        await deployment.scale(decode=2)
    assert list(deployment.statuses) == ["prefill-0", "decode-0"]


async def test_the_command_says_what_is_done_line_by_line(deployment, capsys):
    await members.scale(deployment.server.address, None, ["prefill=2", "decode=1"])
    assert capsys.readouterr().out.splitlines()[-2:] == ["prefill-1 takes requests", "prefill=2 decode=1"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["decode"], "'decode': expected ROLE=NUMBER"),
        (["decode=-1"], "expected ROLE=NUMBER, of prefill, decode or hybrid; for example decode=3"),
        (["decoder=2"], "'decoder=2': expected ROLE=NUMBER"),
        (["decode=2", "decode=3"], "'decode=3': the number of decode instances is given twice"),
    ],
)
def test_a_typo_in_a_number_is_named(words, problem):
    with pytest.raises(ConfigError, match=problem):
        members.numbers_by_role(words)


def deployment_of(*instances: str, **sections: Any) -> DeploymentConfig:
    """Make a deployment of words such as `decode-0/1 gpu 3`: name, rank and GPU."""
    entries = []
    for each in instances:
        name, _, gpu = each.partition(" gpu ")
        name, rank = name.split("/")
        entries.append({"instance_id": name, "instance_type": name.split("-")[0], "kv_rank": int(rank)})
        entries[-1] |= {"gpu_id": int(gpu)} if gpu else {}
    return convert({"gpu_instances": entries, **sections})


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        (["prefill-0/0", "decode-0/1"], {"decode": 2}, ["decode-1/2"]),
        (["prefill-0/1", "decode-1/3"], {"decode": 3}, ["decode-0/0", "decode-2/2"]),
        (["prefill-0/0 gpu 0", "decode-0/1 gpu 1"], {"prefill": 3}, ["prefill-1/2 gpu 2", "prefill-2/3 gpu 3"]),
        (["prefill-0/0 gpu 0", "decode-0/1 gpu 2"], {"decode": 2}, ["decode-1/2 gpu 1"]),
        (["prefill-0/0 gpu 0", "decode-0/1", "decode-1/2 gpu 1"], {"decode": 1, "prefill": 2}, ["prefill-1/2 gpu 1"]),
        (["hybrid-0/0"], {"hybrid": 2}, ["hybrid-1/1"]),
    ],
)  # fmt: skip
def test_new_instances_have_names_ranks_and_gpus_that_nobody_else_has(there, wanted, expected):
    before = deployment_of(*there)
    after = scaled(before, wanted, {})
    new = [each for each in after.gpu_instances if each not in before.gpu_instances]
    found = [
        f"{each.instance_id}/{each.kv_rank}" + (f" gpu {each.gpu_id}" if each.gpu_id is not None else "")
        for each in new
    ]
    assert found == expected


def test_neighbouring_gpus_are_found_for_several_ranks():
    there = ["prefill-0/0 gpu 0", "decode-0/1 gpu 3"]
    after = scaled(deployment_of(*there, model={"tensor_parallel_size": 2}), {"decode": 2}, {})
    assert after.gpu_instances[-1].gpu_id == 5
    assert describe(after) == "prefill=1 decode=2"


def test_nobody_gets_the_name_or_the_rank_of_one_that_is_drained():
    before = deployment_of("prefill-0/0", "decode-0/1", "decode-1/2")
    after = scaled(before, {"decode": 2}, {}, {"decode-0"})
    assert [(each.instance_id, each.kv_rank) for each in after.gpu_instances[1:]] == [("decode-1", 2), ("decode-2", 3)]


def test_nobody_gets_the_name_or_the_rank_of_one_that_still_goes():
    before = deployment_of("prefill-0/0", "decode-0/1", "decode-1/2")
    after = scaled(before, {"decode": 1}, {})
    going = {each.instance_id: each for each in before.gpu_instances if each not in after.gpu_instances}
    new = scaled(after, {"decode": 2}, going).gpu_instances[-1]
    assert (new.instance_id, new.kv_rank) == ("decode-2", 3)
