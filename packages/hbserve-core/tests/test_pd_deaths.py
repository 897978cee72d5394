"""When one of two instances dies or freezes in the middle of a transfer, the other gives every block back."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from hbserve_core import InstanceConfig
from hbserve_kv import KVTransferConfig
from hbserve_rpc import KVTransferFailed, RemoteError, SamplingParams
from hbserve_rpc.messages import DESCRIBE, Empty, Granted, Role, TokenEvent
from hbserve_testing.instances import InstanceClient, start_process, tokens_of
from hbserve_testing.narrowing import of_type
from hbserve_testing.processes import children_of, freeze
from hbserve_testing.waits import reading, until

pytestmark = pytest.mark.warm

NUM_BLOCKS, BLOCK, CHUNK = 100, 16, 32
NUM_HELD = 9  # blocks of a prompt of 140 tokens
DEADLINE_S = 60
# hbserve_kv's own tests have every state on every transport; here each end is on a two-sided or on a one-sided one, and
# on both where the engine is told something else by them.
TWO_SIDED, ONE_SIDED = "nccl", "ipc"
KV_TIMEOUT_S = 3

# `python -m hbserve_core`, but its second step waits until the receiver has accepted the transfer, and after that the
# engine computes nothing until SIGUSR1 comes.
HALTING = """
import signal, threading
from hbserve_core import ModelRunner
from hbserve_core.instance import process as instance_process
from hbserve_kv import KVTransferManager
may_go_on, steps, launch = threading.Event(), [], ModelRunner.launch
is_accepted, open_send = threading.Event(), KVTransferManager.open_send
signal.signal(signal.SIGUSR1, lambda *_: may_go_on.set())
async def opening(self, transfer_id, grant):
    transfer = await open_send(self, transfer_id, grant)
    is_accepted.set()
    return transfer
def halting(self, batch):
    if len(steps) == 1:
        is_accepted.wait(60)
    if len(steps) == 2:
        may_go_on.wait(60)
    steps.append(batch)
    return launch(self, batch)
KVTransferManager.open_send, ModelRunner.launch = opening, halting
instance_process.main()
"""


class Instance(InstanceClient):
    """One in a process of its own."""

    params = SamplingParams(0, 4, ignore_eos=True)

    async def sends_what_it_has(self) -> bool:
        s = await self.stats()
        return bool(s.active_transfers >= 1 and s.prefill_tokens == 2 * CHUNK)

    async def has_quarantined_blocks(self) -> bool:
        return bool((await self.stats()).quarantined_blocks)

    async def kill_a_rank(self) -> int:
        """Kill rank 1 of 2; returns its pid."""
        (pid,) = children_of(self.process.pid)
        os.kill(pid, signal.SIGKILL)
        return pid

    async def ends_by(self, error: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while (info := await self.client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)).status != "failed":
                await asyncio.sleep(0.01)
        assert info.error == error
        self.process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            assert await self.process.wait() == 1


PROMPT = [3 + (7 * i * i + 11 * i) % 250 for i in range(140)]
Start = Callable[..., Awaitable[Instance]]


@pytest.fixture
async def start(model_folder: Callable[[str], Any]) -> AsyncIterator[Start]:
    """Starts instances. At the end those that live must have nothing in them, and end as asked."""
    async with contextlib.AsyncExitStack() as stack:
        started: list[Instance] = []

        async def start(role: Role, backend: str, *, halting: bool = False, num_ranks: int = 1) -> Instance:
            config = InstanceConfig(
                instance_id=f"{role}-{len(started)}", role=role, model_path=str(model_folder("qwen3")), device="cpu",
                num_blocks=NUM_BLOCKS, block_size=BLOCK, chunk_size=CHUNK, num_threads=1, kv_rank=len(started),
                tensor_parallel_size=num_ranks,
                kv_transfer=KVTransferConfig(backend=backend, buffer_size=1 << 20, timeout_s=KV_TIMEOUT_S),
            )  # fmt: skip
            process, address = await start_process(config, *([("-c", HALTING)] if halting else []))
            started.append(Instance(address, process=process))
            stack.push_async_callback(started[-1].killed)
            await stack.enter_async_context(started[-1].client)
            await until(started[-1].is_ready)
            return started[-1]

        yield start
        for instance in started:
            if instance.process.returncode is None:
                await until(instance.is_empty)
                instance.process.terminate()
                async with asyncio.timeout(DEADLINE_S):
                    assert await instance.process.wait() == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def assert_a_request_succeeds(p: Instance, d: Instance) -> None:
    async with d.decode("next", PROMPT) as decoding:
        granted = of_type(Granted, await anext(decoding))
        async with p.prefill("next", PROMPT, granted.grant) as prefilling:
            first, _ = [event async for event in prefilling]
        assert len([*of_type(TokenEvent, first).token_ids, *await tokens_of(decoding)]) == 4


async def test_a_decode_instance_killed_in_mid_transfer_ends_the_prefill_with_an_error(start):
    # Known elsewhere: vLLM #38027, #41383.
    p, d = await start("prefill", TWO_SIDED, halting=True), await start("decode", TWO_SIDED)
    other = await start("decode", TWO_SIDED)
    async with d.decode("r", PROMPT) as decoding:
        granted = await anext(decoding)
        async with reading(p.prefill("r", PROMPT, granted.grant)) as prefilling:
            await until(p.sends_what_it_has)
            await d.killed()
            p.process.send_signal(signal.SIGUSR1)
            with pytest.raises(KVTransferFailed, match="KV transfer t-r failed: "):
                await prefilling
    await until(p.is_empty)
    await assert_a_request_succeeds(p, other)


async def test_a_prefill_instance_killed_in_mid_transfer_ends_the_decode_with_an_error(start):
    p, d = await start("prefill", ONE_SIDED, halting=True), await start("decode", ONE_SIDED)
    other = await start("prefill", ONE_SIDED)
    async with d.decode("r", PROMPT) as decoding:
        granted = await anext(decoding)
        async with reading(p.prefill("r", PROMPT, granted.grant)):
            await until(p.sends_what_it_has)
            assert (await d.stats()).free_blocks == NUM_BLOCKS - NUM_HELD
            await p.killed()
            with pytest.raises(KVTransferFailed, match="KV transfer failed: "):
                await anext(decoding)
    await until(d.is_empty)
    await assert_a_request_succeeds(other, d)


async def test_a_decode_instance_frozen_in_mid_transfer_ends_the_prefill_and_serves_again_when_it_goes_on(
    start,
):
    p, d = await start("prefill", ONE_SIDED, halting=True), await start("decode", ONE_SIDED)
    async with d.decode("r", PROMPT) as decoding:
        granted = await anext(decoding)
        async with reading(p.prefill("r", PROMPT, granted.grant)) as prefilling:
            await until(p.sends_what_it_has)
            freeze(d.process.pid)
            p.process.send_signal(signal.SIGUSR1)
            with pytest.raises(KVTransferFailed, match="KV transfer t-r failed: "):
                await prefilling
        await until(p.is_empty)
        os.kill(d.process.pid, signal.SIGCONT)
        with pytest.raises(KVTransferFailed, match="KV transfer failed: "):
            await anext(decoding)
    await assert_a_request_succeeds(p, d)


@pytest.mark.parametrize("backend", [TWO_SIDED, ONE_SIDED])
async def test_blocks_to_which_a_frozen_prefill_instance_may_write_are_used_by_nobody_until_it_is_dead(start, backend):
    # Known elsewhere: vLLM #32255, SGLang #24527, #27372, #32564, #35049, #37077, #38961, Mooncake #4247.
    p, d = await start("prefill", backend, halting=True), await start("decode", backend)
    async with d.decode("r", PROMPT) as decoding:
        granted = await anext(decoding)
        async with reading(p.prefill("r", PROMPT, granted.grant)):
            await until(p.sends_what_it_has)
            freeze(p.process.pid)
            await decoding.aclose()
            # Two-sided transfers need the receiver for every byte; one-sided ones may go on behind its back.
            if backend == TWO_SIDED:
                await until(d.is_empty)
            else:
                await until(d.has_quarantined_blocks)
                assert (await d.stats()).free_blocks == NUM_BLOCKS - NUM_HELD
            await p.killed()
    await until(d.is_empty)


@pytest.mark.parametrize("lost", ["prefill", "decode"])
async def test_a_rank_killed_in_mid_transfer_ends_its_instance_and_the_other_has_its_blocks_back(start, lost):
    p = await start("prefill", "ipc", halting=True, num_ranks=2 if lost == "prefill" else 1)
    d = await start("decode", "ipc", num_ranks=2 if lost == "decode" else 1)
    has_ranks, other = (p, d) if lost == "prefill" else (d, p)
    async with d.decode("r", PROMPT) as decoding:
        granted = await anext(decoding)
        async with reading(p.prefill("r", PROMPT, granted.grant)) as prefilling:
            await until(p.sends_what_it_has)
            pid = await has_ranks.kill_a_rank()
            p.process.send_signal(signal.SIGUSR1)
            await has_ranks.ends_by(f"RankFailed: rank 1 of 2 (pid {pid}) was ended by SIGKILL")
            with pytest.raises(RemoteError, match="failed: "):
                await (anext(decoding) if lost == "prefill" else prefilling)
    await until(other.is_empty)
