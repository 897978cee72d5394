"""KV leaves while later chunks compute: when the last chunk starts, that of all but the one before it has landed; and
that of the last one before the first token is told."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from hbserve_core import GpuInstance, InstanceConfig
from hbserve_core.engine.step import StepOutput
from hbserve_core.instance.handover import Inbox, PrefillSend
from hbserve_kv import KVTransferConfig
from hbserve_rpc import RpcClient, SamplingParams
from hbserve_rpc.messages import DECODE, PREFILL, DecodeRequest, PrefillRequest, Role
from hbserve_testing.narrowing import present

BLOCK, CHUNK, NUM_CHUNKS = 16, 32, 6
CHUNK_BLOCKS = CHUNK // BLOCK
NUM_TOKENS = NUM_CHUNKS * CHUNK
UNTOUCHED = 12345.0
DEADLINE_S = 30.0
GREEDY = SamplingParams(0, 2, ignore_eos=True)


def hold_before_the_last_chunk(instance: GpuInstance, num_landed: Callable[[], int], most: int) -> list[int]:
    """The last chunk is not computed before `most` blocks have landed, or a deadline has passed; the number is kept.

    So a slow machine only takes longer; blocks that leave after the last chunk alone cannot land before the deadline.
    """
    runner: Any = instance.runner
    launch, seen, started = runner.launch, [], []

    def holding(batch: Any) -> Any:
        started.append(batch)
        if len(started) == NUM_CHUNKS:
            deadline_s = time.monotonic() + DEADLINE_S
            while num_landed() < most and time.monotonic() < deadline_s:
                time.sleep(0.005)
            seen.append(num_landed())
        return launch(batch)

    runner.launch = holding
    return seen


@contextlib.asynccontextmanager
async def started(role: Role, backend: str, folder: str):
    """One instance in this process, and a client of it."""
    config = InstanceConfig(
        instance_id=role, role=role, model_path=folder, device="cpu", num_blocks=40, block_size=BLOCK, chunk_size=CHUNK,
        num_threads=1, kv_rank=int(role == "decode"),
        kv_transfer=KVTransferConfig(backend=backend, buffer_size=1 << 20, timeout_s=20),
    )  # fmt: skip
    instance = GpuInstance(config)
    await instance.start()
    try:
        async with RpcClient(instance.address, heartbeat_timeout_s=60) as client:
            await instance.wait_ready()
            yield instance, client
    finally:
        await instance.stop()
    engine = present(instance.engine)
    engine.check_integrity()
    assert engine.blocks.num_free == 40


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_when_the_last_chunk_starts_the_kv_of_all_but_the_one_before_it_has_landed(backend, model_folder, prompt):
    folder, ids = str(model_folder("qwen3")), prompt(NUM_TOKENS)
    async with (
        started("prefill", backend, folder) as (p, p_client),
        started("decode", backend, folder) as (d, d_client),
    ):
        d.runner.pool.fill_(UNTOUCHED)

        def num_landed() -> int:
            return int((d.runner.pool.flatten(1) != UNTOUCHED).all(dim=1).sum())

        most = (NUM_CHUNKS - 2) * CHUNK_BLOCKS
        seen = hold_before_the_last_chunk(p, num_landed, most)
        async with (
            asyncio.timeout(2 * DEADLINE_S),
            d_client.stream(DECODE, DecodeRequest("r", "t", ids, GREEDY)) as of_d,
        ):
            granted = await anext(of_d)
            async with p_client.stream(PREFILL, PrefillRequest("r", "t", ids, GREEDY, granted.grant)) as of_p:
                _, done = [event async for event in of_p]
            assert [token async for event in of_d for token in event.token_ids]
        assert done.num_bytes == NUM_CHUNKS * CHUNK_BLOCKS * d.runner.pool[0].nbytes
    earlier = (NUM_CHUNKS - 1) * CHUNK_BLOCKS
    assert seen[0] / earlier >= (NUM_CHUNKS - 2) / (NUM_CHUNKS - 1)


class Sending:
    """A transfer of an instance, and the instance's transfers, which open it when they may."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pushed: list[tuple[list[int], int]] = []
        self.events: list[Any] = []
        self.may_open = asyncio.Event()

    async def open_send(self, transfer_id: str, grant: bytes) -> Any:
        await self.may_open.wait()
        return self

    def push(self, block_ids: list[int], first: int, ready: Any = None) -> None:
        self.pushed.append((block_ids, first))
        self.events.append(ready)


@pytest.mark.parametrize("is_late", [False, True], ids=["opened", "opened late"])
@pytest.mark.parametrize(
    ("finish_reason", "expected"),
    [(None, [[7, 8], [9]]), ("stop", [[7, 8]])],
    ids=["goes on", "ends at its first token"],
)
async def test_the_last_blocks_are_pushed_before_the_first_token_is_told(is_late, finish_reason, expected):
    """Three blocks, the last of which is not full."""
    inbox, sending = Inbox(), Sending(num_blocks=3)
    send = PrefillSend(
        sending.open_send, PrefillRequest("r", "t", tuple(range(BLOCK * 2 + 3)), GREEDY, b"grant"), BLOCK, inbox
    )
    if not is_late:
        sending.may_open.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    inbox.put_nowait(StepOutput("r", None, 0, num_computed_tokens=2 * BLOCK, block_table=[7, 8, 9]))
    inbox.put_nowait(StepOutput("r", 5, 0, finish_reason, num_computed_tokens=2 * BLOCK + 3, block_table=[7, 8, 9]))
    async with asyncio.timeout(DEADLINE_S):
        (output,) = await send.follow()
        if is_late:
            sending.may_open.set()
            await send.close()
            # All that was computed before it was open goes at once; nobody needs any of it if the request has ended.
            expected = [[block for blocks in expected for block in blocks]] if finish_reason is None else []
    assert (output.token_id, [blocks for blocks, _ in sending.pushed]) == (5, expected)
    assert [first for _, first in sending.pushed] == [0, 2][: len(expected)]
    await send.close()


def progress(num_tokens: int, ready: str = "", token: int | None = None) -> StepOutput:
    """Of a prompt of three blocks, the last of which is not full."""
    return StepOutput("r", token, 0, num_computed_tokens=num_tokens, block_table=[7, 8, 9], ready=ready or None)


@pytest.mark.parametrize(
    ("opens_before", "expected"),
    [
        (0, [([7], 0, "step 1"), ([8], 1, "step 2"), ([9], 2, "step 3")]),
        (1, [([7], 0, "step 1"), ([8], 1, "step 2"), ([9], 2, "step 3")]),
        (2, [([7, 8], 0, "step 2"), ([9], 2, "step 3")]),
        (3, [([7, 8], 0, "step 2"), ([9], 2, "step 3")]),
        (5, [([7, 8, 9], 0, "step 3")]),
        (6, [([7, 8, 9], 0, None)]),
    ],
)
async def test_blocks_are_pushed_when_their_step_is_launched_and_wait_for_it_on_the_device(opens_before, expected):
    """A step is launched before the tokens of the one before it are read. Each block is pushed once, as soon as the
    transfer is open, with the event of its step or a later one, unless that has been read."""
    inbox, sending, length = Inbox(), Sending(num_blocks=3), BLOCK * 2 + 3
    send = PrefillSend(
        sending.open_send, PrefillRequest("r", "t", tuple(range(length)), GREEDY, b"grant"), BLOCK, inbox
    )
    told = [
        progress(BLOCK, "step 1"), progress(2 * BLOCK, "step 2"), progress(BLOCK), progress(length, "step 3"),
        progress(2 * BLOCK), progress(length, token=5),
    ]  # fmt: skip
    following = asyncio.create_task(send.follow())
    for number, output in enumerate(told):
        if number == opens_before:
            sending.may_open.set()
        for _ in range(5):
            await asyncio.sleep(0)
        inbox.put_nowait(output)
    async with asyncio.timeout(DEADLINE_S):
        assert [output.token_id for output in await following] == [5]
        sending.may_open.set()
        await send.close()
    assert [(*pushed, event) for pushed, event in zip(sending.pushed, sending.events, strict=True)] == expected
