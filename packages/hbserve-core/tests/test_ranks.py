"""Ranks as processes: what an instance does when one of them dies, freezes or does not load, and that none is left."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hbserve_core import Engine, GpuInstance, InstanceConfig, InvalidInstanceConfig, RankFailed, make_runner
from hbserve_core.model.shard import Shard
from hbserve_core.ranks.distributed_group import DistributedRankGroup, host_store, reach_store
from hbserve_core.ranks.tensor_parallel_runner import TensorParallelRunner
from hbserve_core.ranks.workers import Workers
from hbserve_kv import KVTransferConfig
from hbserve_rpc import RemoteError, RpcClient, SamplingParams
from hbserve_rpc.messages import (
    DECODE,
    DESCRIBE,
    GENERATE,
    PREFILL,
    DecodeRequest,
    Empty,
    GenerateRequest,
    Granted,
    PrefillRequest,
    TokenEvent,
)
from hbserve_testing.instances import tokens_of
from hbserve_testing.narrowing import of_type, present
from hbserve_testing.processes import alive, children_of, strike

pytestmark = pytest.mark.warm

DEADLINE_S = 90
END_WITHIN_S = 5.0
"""What an instance promises, from a rank's end to its own."""


def config(folder: Any, **settings: Any) -> InstanceConfig:
    defaults: dict[str, Any] = {"device": "cpu", "num_blocks": 50, "num_threads": 2, "tensor_parallel_size": 2}
    return InstanceConfig(model_path=str(folder), **(defaults | settings))


def run_out(engine: Engine) -> dict[str, list[int]]:
    """Step until nothing is left to do; each request's tokens."""
    found: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


@pytest.mark.cold
def test_processes_give_the_tokens_of_one_and_none_is_left(model_folder, greedy_tokens, prompt):
    given = config(model_folder("qwen3"), block_size=8)
    runner: Any = make_runner(given)
    engine = Engine(given, runner)
    for i in range(4):
        engine.add(str(i), prompt(5 + 20 * i, salt=i), SamplingParams(0, 8, ignore_eos=True))
    found = run_out(engine)
    assert found == {str(i): greedy_tokens("qwen3", prompt(5 + 20 * i, salt=i), 8) for i in range(4)}
    (pid,) = runner.workers.pids
    assert alive(pid)
    runner.close()
    assert not alive(pid)
    runner.close()


@contextlib.asynccontextmanager
async def serving(folder: Any) -> Any:
    instance = GpuInstance(config(folder))
    await instance.start()
    try:
        await instance.wait_ready()
        async with RpcClient(instance.address) as client:
            yield instance, client
        (pid,) = of_type(TensorParallelRunner, instance.runner).workers.pids
    finally:
        await instance.stop()
    assert not alive(pid)


NAMELESS = signal.SIGRTMIN + 3
"""Has no name of Python's. systemd ends containers by it."""
CAUSES = {
    signal.SIGKILL: r"RankFailed: rank 1 of 2 \(pid {pid}\) was ended by SIGKILL",
    NAMELESS: r"RankFailed: rank 1 of 2 \(pid {pid}\) was ended by SIGRTMIN\+3",
    signal.SIGSTOP: r"RankFailed: rank 1 of 2 \(pid {pid}\) is frozen: it has said nothing for 3 s",
}


@pytest.mark.parametrize(
    ("number", "busy"),
    [(signal.SIGKILL, True), (signal.SIGKILL, False), (signal.SIGSTOP, True), (NAMELESS, False)],
    ids=["killed-at-work", "killed-while-idle", "frozen-at-work", "ended-by-another-signal"],
)
async def test_a_rank_that_is_lost_ends_the_instance_with_one_error(model_folder, prompt, number, busy):
    async with serving(model_folder("qwen3")) as (instance, client):
        request = GenerateRequest("r", prompt(3), SamplingParams(0, 500, ignore_eos=True))
        events = client.stream(GENERATE, request, timeout_s=DEADLINE_S)
        if busy:
            await anext(events)
        (pid,) = of_type(TensorParallelRunner, instance.runner).workers.pids
        strike(pid, number)
        begin_s = time.monotonic()
        async with asyncio.timeout(DEADLINE_S):
            error = await instance.wait_failed()
        assert time.monotonic() - begin_s < END_WITHIN_S
        assert error == CAUSES[number].replace("\\", "").format(pid=pid)
        assert (await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)).error == error
        if busy:
            with pytest.raises(RemoteError, match=CAUSES[number].format(pid=pid)):
                async for _ in events:
                    pass


def test_after_a_step_that_was_interrupted_no_other_is_computed(model_folder, prompt):
    """The other rank still waits for the rest of it, and would take the next step for that."""

    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    given = config(model_folder("qwen3"))
    runner: Any = make_runner(given)
    try:
        engine = Engine(given, runner)
        engine.add("r", prompt(3), SamplingParams(0, 8, ignore_eos=True))
        engine.step()
        runner._runner.launch = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        del runner._runner.launch
        with pytest.raises(RankFailed, match="rank 0 has left a step unfinished: KeyboardInterrupt"):
            engine.step()
    finally:
        runner.close()


def test_closing_a_group_frees_the_graphs_that_its_end_waits_for():
    """As NCCL's does, whose communicators outlive no graph with an operation of theirs."""
    freed = threading.Event()
    aborted: list[bool] = []

    class Waiting:
        def abort(self) -> None:
            aborted.append(freed.wait(DEADLINE_S))

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    group = DistributedRankGroup(Shard(0, 1), torch.device("cpu"), host_store(listening.detach(), port), seed=0)
    group.connect()
    real, group._process_group, group.on_close = group._process_group, Waiting(), freed.set
    group.close()
    group.close()
    assert aborted == [True]
    real.abort()


class TriedMemory:
    """Stands for MappedMemory, which needs GPUs. `fails`: by rank, at what it does."""

    def __init__(self, shard: Shard, fails: dict[int, str]) -> None:
        self._fails = fails.get(shard.rank)
        self.is_closed = False
        if self._fails == "map":
            raise OSError("the GPUs do not reach each other")

    def adds(self) -> bool:
        return self._fails != "add"

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("fails", [{}, {1: "map"}, {0: "add"}], ids=["all can", "one cannot map", "one adds wrong"])
def test_memory_is_mapped_on_all_ranks_or_none(monkeypatch, caplog, fails):
    """Else one would wait in a kernel for what another gives to NCCL."""
    pytest.importorskip("triton", reason="torch has Triton on Linux only")
    made: list[TriedMemory] = []

    def make(shard: Shard, device: torch.device, store: Any) -> TriedMemory:
        made.append(TriedMemory(shard, fails))
        return made[-1]

    monkeypatch.setattr("hbserve_core.ranks.mapped_memory.MappedMemory", make)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = host_store(listening.detach(), port)

    def find(rank: int) -> Any:
        group = DistributedRankGroup(Shard(rank, 2), torch.device("cpu"), reach_store(port), seed=0)
        group.connect()
        try:
            return group._map_memory(store)
        finally:
            group.close()

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(find, range(2)))
    assert [each is not None for each in found] == [not fails] * 2
    assert {each.is_closed for each in made} == {bool(fails)}
    assert ("sums are left to NCCL" in caplog.text) == bool(fails)


def test_a_rank_that_does_not_load_is_told_with_its_own_words(model_folder, tmp_path):
    workers = Workers(config(tmp_path / "nothing"), on_failure=lambda _: None)
    try:
        with pytest.raises(RankFailed, match=r"rank 1 of 2 \(pid \d+\) failed: ModelFilesMissing: .*nothing"):  # noqa: SIM117
            with workers.naming_the_lost_rank():
                # Rank 0 has the model, and waits for the other to have as many blocks.
                workers.join().least(50)
    finally:
        workers.close()


async def test_no_rank_outlives_a_killed_instance(model_folder):
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "hbserve_core"]
    popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)  # noqa: ASYNC220
    pids: list[int] = []
    try:
        settings = {"model_path": str(model_folder("qwen3")), "device": "cpu", "num_blocks": 50, "num_threads": 2}
        assert popen.stdin is not None
        popen.stdin.write(json.dumps(settings | {"tensor_parallel_size": 2}).encode() + b"\n")
        popen.stdin.flush()
        address = json.loads(present(popen.stdout).readline())["address"]
        async with RpcClient(address) as client, asyncio.timeout(DEADLINE_S):
            while (await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)).status != "ready":
                await asyncio.sleep(0.05)
        pids = children_of(popen.pid)
        assert len(pids) == 1
    finally:
        popen.kill()
        popen.communicate(timeout=DEADLINE_S)
    async with asyncio.timeout(DEADLINE_S):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_id": 1}, "gpu_id=1 with tensor_parallel_size=2 needs CUDA devices 1 to 2: this host has 2 CUDA devices"),
        ({"device": "cuda:1"}, "device='cuda:1' with tensor_parallel_size=2 needs CUDA devices 1 to 2"),
        ({"tensor_parallel_size": 4}, "gpu_id=None with tensor_parallel_size=4 needs CUDA devices 0 to 3"),
    ],
)
def test_a_gpu_that_is_not_there_is_named_before_any_process_starts(model_folder, monkeypatch, settings, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InvalidInstanceConfig, match=message):
        make_runner(config(model_folder("qwen3"), **({"device": "auto"} | settings)))


def two_gpus(test: Any) -> Any:
    count = torch.cuda.device_count()
    skip = pytest.mark.skipif(count < 2, reason=f"two ranks need two CUDA devices; there are {count}")
    return pytest.mark.gpu(skip(test))


@two_gpus
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_two_gpus_give_the_tokens_of_one(model_folder, greedy_tokens, prompt, graphs):
    given = config(model_folder("qwen3"), device="auto", gpu_id=0, cuda_graph_enabled=graphs, max_num_seqs=8)
    runner: Any = make_runner(given)
    try:
        engine = Engine(given, runner)
        for i in range(6):
            engine.add(str(i), prompt(5 + 20 * i, salt=i), SamplingParams(0, 8, ignore_eos=True))
        found = run_out(engine)
        assert found == {str(i): greedy_tokens("qwen3", prompt(5 + 20 * i, salt=i), 8) for i in range(6)}
    finally:
        runner.close()


@two_gpus
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_a_rank_that_is_lost_on_a_gpu_ends_the_step(model_folder, prompt, graphs, number):
    """The other device waits in a kernel for it, which the host must end."""
    given = config(model_folder("qwen3"), device="auto", gpu_id=0, cuda_graph_enabled=graphs, max_num_seqs=8)
    runner: Any = make_runner(given)
    try:
        engine = Engine(given, runner)
        engine.add("r", prompt(3), SamplingParams(0, 500, ignore_eos=True))
        for _ in range(5):
            engine.step()
        (pid,) = runner.workers.pids
        strike(pid, number)
        begin_s = time.monotonic()
        with pytest.raises(RankFailed, match=rf"rank 1 of 2 \(pid {pid}\)"):
            run_out(engine)
        assert time.monotonic() - begin_s < END_WITHIN_S
    finally:
        runner.close()


@two_gpus
@pytest.mark.parametrize("backend", ["ipc", "nccl"])
@pytest.mark.parametrize(("senders", "receivers"), [(1, 2), (2, 1)])
async def test_kv_moves_between_one_gpu_and_ranks_on_two(
    model_folder, greedy_tokens, prompt, backend, senders, receivers
):
    """Ranks that send wait on their own devices for the steps that rank 0 has launched."""
    given = {
        "folder": model_folder("qwen3"),
        "gpu_id": 0,
        "device": "auto",
        "kv_transfer": KVTransferConfig(backend=backend),
    }
    p = GpuInstance(config(**given, role="prefill", tensor_parallel_size=senders))
    d = GpuInstance(config(**given, role="decode", tensor_parallel_size=receivers, kv_rank=1))
    async with contextlib.AsyncExitStack() as stack:
        for instance in (p, d):
            await instance.start()
            stack.push_async_callback(instance.stop)
            await instance.wait_ready()
        to_p, to_d = [await stack.enter_async_context(RpcClient(instance.address)) for instance in (p, d)]
        for length in (5, 200):
            ids, params = prompt(length), SamplingParams(0, 8, ignore_eos=True)
            request = DecodeRequest(str(length), f"t-{length}", ids, params)
            async with to_d.stream(DECODE, request, timeout_s=DEADLINE_S) as decoding:
                grant = of_type(Granted, await anext(decoding)).grant
                prefill = PrefillRequest(str(length), f"t-{length}", ids, params, grant)
                first, _ = [event async for event in to_p.stream(PREFILL, prefill, timeout_s=DEADLINE_S)]
                found = [*of_type(TokenEvent, first).token_ids, *await tokens_of(decoding)]
            assert found == greedy_tokens("qwen3", ids, 8)
