"""Prefill and decode instances, in one process and as processes: hybrid's tokens, and all blocks back afterwards."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from hbserve_core import GpuInstance, InstanceConfig
from hbserve_core.engine.step import StepOutput
from hbserve_core.instance.handover import Inbox, PrefillSend
from hbserve_kv import KVTransferConfig
from hbserve_rpc import InvalidRequest, KVTransferFailed, Overloaded, SamplingParams
from hbserve_rpc.members import INSTANCE_FLIP, FlipRequest
from hbserve_rpc.messages import (
    CONNECT,
    DECODE,
    DESCRIBE,
    STATS,
    ConnectRequest,
    DecodeRequest,
    Empty,
    Granted,
    GrantRequest,
    PrefillRequest,
    TokenEvent,
    TransferDone,
)
from hbserve_testing.instances import InstanceClient, start_process, tokens_of
from hbserve_testing.narrowing import of_type
from hbserve_testing.waits import until

pytestmark = pytest.mark.warm

BLOCK, CHUNK = 16, 32
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 5]
FULL_BYTES = 2 * 2 * BLOCK * 2 * 16 * 4  # layers, keys and values, tokens, heads, head_dim, float32
MAX_TOKENS = 6
DEADLINE_S = 60
GREEDY = SamplingParams(0, MAX_TOKENS, ignore_eos=True)


Start = Callable[..., Awaitable[InstanceClient]]


@pytest.fixture
async def start(model_folder: Callable[[str], Any]) -> AsyncIterator[Start]:
    """Starts instances; at the end each that lives has nothing in it, and ends as asked."""
    started: list[InstanceClient] = []

    async def start(role: str, *, process: bool = False, backend: str = "nccl", **settings: Any) -> InstanceClient:
        if backend == "mooncake":
            pytest.importorskip("mooncake.engine", reason="no Mooncake, or not its libraries", exc_type=ImportError)
        given: dict[str, Any] = {
            "instance_id": f"{role}-{len(started)}", "role": role, "model_path": str(model_folder("qwen3")),
            "device": "cpu", "num_blocks": 200, "chunk_size": CHUNK, "max_num_batched_tokens": 256, "num_threads": 1,
            "kv_rank": len(started), "kv_transfer": KVTransferConfig(backend=backend, buffer_size=1 << 20, timeout_s=8),
        }  # fmt: skip
        config = InstanceConfig(**(given | settings))
        started.append(await (_start_process if process else _start_here)(config))
        await started[-1].client.start()
        await until(started[-1].is_ready)
        return started[-1]

    yield start
    for instance in started:
        if instance.process is None or instance.process.returncode is None:
            await until(instance.is_empty)
        await instance.client.close()
    for instance in started:
        await _stop(instance)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _start_here(config: InstanceConfig) -> InstanceClient:
    server = GpuInstance(config)
    await server.start()
    return InstanceClient(server.address, server=server)


async def _start_process(config: InstanceConfig) -> InstanceClient:
    process, address = await start_process(config)
    return InstanceClient(address, process=process)


async def _stop(instance: InstanceClient) -> None:
    if instance.server is not None:
        await instance.server.stop()
        if instance.server.engine is not None:
            instance.server.engine.check_integrity()
    elif instance.process.returncode is None:
        instance.process.stdin.close()
        assert await asyncio.wait_for(instance.process.wait(), DEADLINE_S) == 0


async def apart(p: InstanceClient, d: InstanceClient, name: str, ids: list[int]) -> tuple[list[int], int, TransferDone]:
    """What a scheduler does: reserve on D, prefill on P, decode on D. Tokens, D's cached tokens, the transfer."""
    async with d.decode(name, ids) as decoding:
        granted = of_type(Granted, await anext(decoding))
        async with p.prefill(name, ids, granted.grant) as prefilling:
            first, done = [event async for event in prefilling]
        tokens = await tokens_of(decoding)
    assert isinstance(first, TokenEvent)
    assert isinstance(done, TransferDone)
    return [*first.token_ids, *tokens], granted.num_cached_tokens, done


@pytest.mark.parametrize("process", [False, True], ids=["in one process", "as processes"])
@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
async def test_tokens_apart_are_those_of_hybrid_and_transformers(start, backend, process, prompt, greedy_tokens):
    # Known elsewhere: LMCache #2459; vLLM #25399.
    settings = {"backend": backend, "process": process}
    p, d, h = await start("prefill", **settings), await start("decode", **settings), await start("hybrid")
    for length in LENGTHS:
        ids = prompt(length, salt=length)
        expected = greedy_tokens("qwen3", ids, MAX_TOKENS)
        assert await h.hybrid(f"{length}", ids) == expected
        tokens, num_cached, done = await apart(p, d, f"{length}-cold", ids)
        assert (tokens, num_cached) == (expected, 0)
        assert done.num_bytes == -(-length // BLOCK) * FULL_BYTES

        tokens, num_cached, done = await apart(p, d, f"{length}-cached", ids)
        assert (tokens, num_cached) == (expected, length // BLOCK * BLOCK), "every full block, the last one too"
        assert done.num_bytes == (length % BLOCK > 0) * FULL_BYTES

        longer = ids + prompt(CHUNK + 3, salt=100 + length)
        tokens, num_cached, _ = await apart(p, d, f"{length}-partly", longer)
        assert (tokens, num_cached) == (greedy_tokens("qwen3", longer, MAX_TOKENS), length // BLOCK * BLOCK)

    many = [prompt(LENGTHS[i % 8], salt=200 + i) for i in range(32)]
    results = await asyncio.gather(*(apart(p, d, f"many-{i}", ids) for i, ids in enumerate(many)))
    assert [tokens for tokens, _, _ in results] == [greedy_tokens("qwen3", ids, MAX_TOKENS) for ids in many]


@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
async def test_instances_that_have_changed_roles_serve_in_them(start, backend, prompt, greedy_tokens):
    first, second = await start("prefill", backend=backend), await start("decode", backend=backend)
    await apart(first, second, "before", prompt(CHUNK))
    for p, d, ids in ((second, first, prompt(CHUNK + 3)), (first, second, prompt(CHUNK, salt=1))):
        lives = set()
        flips: list[tuple[InstanceClient, Literal["prefill", "decode"]]] = [(p, "prefill"), (d, "decode")]
        for each, role in flips:
            before = await each.client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
            await until(each.is_empty)
            info = await each.client.call(INSTANCE_FLIP, FlipRequest("i", role), timeout_s=DEADLINE_S)
            assert (info.role, info.status) == (role, "ready")
            assert bool(info.kv_endpoint) == info.serves_generate == (role == "decode")
            assert info.started_as == (before.role if before.started_as is None else None)
            assert (await each.client.call(STATS, Empty(), timeout_s=DEADLINE_S)).role == role
            lives |= {before.epoch, info.epoch}
        assert len(lives) == 4
        assert (await apart(p, d, "after", ids))[0] == greedy_tokens("qwen3", ids, MAX_TOKENS)
        await until(p.is_empty)


async def test_an_instance_with_a_request_does_not_change_its_role_and_a_hybrid_one_has_no_other(start, prompt):
    d, h = await start("decode"), await start("hybrid")
    async with d.decode("r", prompt(20)) as decoding:
        await anext(decoding)
        with pytest.raises(Overloaded, match="decode-0 has 1 requests; it can become a prefill instance when it has"):
            await d.client.call(INSTANCE_FLIP, FlipRequest("decode-0", "prefill"), timeout_s=DEADLINE_S)
        info = await d.client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
        again = await d.client.call(INSTANCE_FLIP, FlipRequest("decode-0", "decode"), timeout_s=DEADLINE_S)
        assert again == info, "what it is already changes nothing"
    with pytest.raises(InvalidRequest, match=r"does not serve 'instance\.flip'"):
        await h.client.call(INSTANCE_FLIP, FlipRequest("hybrid-1", "prefill"), timeout_s=DEADLINE_S)


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_blocks_that_no_layer_will_see_are_not_sent(start, backend, prompt, model_folder, greedy_tokens):
    """All layers have a window of 21 tokens: two blocks in front of the last full one, and what is behind it."""
    settings = {"backend": backend, "model_path": str(model_folder("mistral-window"))}
    p, d = await start("prefill", **settings), await start("decode", **settings)
    ids = prompt(4 * CHUNK + 5)
    for name, num_cached, num_blocks in (("cold", 0, 3), ("cached", 4 * CHUNK, 1)):
        tokens, found, done = await apart(p, d, name, ids)
        assert (tokens, found) == (greedy_tokens("mistral-window", ids, MAX_TOKENS), num_cached)
        assert done.num_bytes == num_blocks * FULL_BYTES // 2, "one KV head, not two"


@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
async def test_learned_positions_go_on_where_the_prompt_ended(start, backend, prompt, model_folder, greedy_tokens):
    settings = {"backend": backend, "model_path": str(model_folder("opt"))}
    p, d = await start("prefill", **settings), await start("decode", **settings)
    for name, length in (("short", BLOCK), ("chunks", 2 * CHUNK + 5)):
        tokens, _, _ = await apart(p, d, name, prompt(length))
        assert tokens == greedy_tokens("opt", prompt(length), MAX_TOKENS)


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_8_bit_kv_moves_as_it_is_and_only_to_a_pool_of_the_same(start, backend, prompt):
    settings = {"backend": backend, "kv_cache_dtype": "fp8"}
    p, d, h = await start("prefill", **settings), await start("decode", **settings), await start("hybrid", **settings)
    ids = prompt(4 * CHUNK + 5)
    expected = await h.hybrid("r", ids)
    for name, num_blocks in (("cold", 4 * CHUNK // BLOCK + 1), ("cached", 1)):
        tokens, _, done = await apart(p, d, name, ids)
        assert (tokens, done.num_bytes) == (expected, num_blocks * FULL_BYTES // 4)
    wide = await start("decode", backend=backend)
    async with wide.decode("w", ids) as decoding:
        granted = await anext(decoding)
        with pytest.raises(KVTransferFailed, match=r"(block_bytes_per_head|dtype) is .* on rank"):
            async for _ in p.prefill("w", ids, granted.grant):
                pass


async def test_a_grant_of_blocks_that_no_layer_sees_fails_the_prefill():
    async def open_send(transfer_id: str, grant: bytes) -> Any:
        return SimpleNamespace(num_blocks=3)

    inbox = Inbox()
    request = PrefillRequest("r", "t", (3,) * (2 * BLOCK + 5), GREEDY, b"grant")
    sending = PrefillSend(open_send, request, BLOCK, inbox)
    await asyncio.sleep(0.01)
    inbox.put_nowait(StepOutput("r", None, 0, num_computed_tokens=2 * BLOCK, block_table=[-1, 5, 6]))
    with pytest.raises(KVTransferFailed, match="no layer of the model sees any more"):
        await sending.follow()


@pytest.mark.parametrize(("backend", "p_ranks", "d_ranks"), [("nccl", 1, 2), ("ipc", 4, 2)])
async def test_instances_of_other_numbers_of_ranks_share_heads(start, backend, p_ranks, d_ranks, prompt, greedy_tokens):
    """The model has two KV heads: of four ranks two hold the same one, and one of them sends it."""
    # Known elsewhere: vLLM #37333, #43523, #45330, SGLang #12157, #15674.
    p = await start("prefill", backend=backend, tensor_parallel_size=p_ranks)
    d = await start("decode", backend=backend, tensor_parallel_size=d_ranks)
    for name, length in (("one", 1), ("cold", 4 * CHUNK + 5), ("cached", 4 * CHUNK + 5)):
        ids = prompt(length, salt=length)
        tokens, num_cached, done = await apart(p, d, name, ids)
        assert (tokens, num_cached) == (greedy_tokens("qwen3", ids, MAX_TOKENS), 4 * CHUNK * (name == "cached"))
        assert done.num_bytes == (1 if name != "cold" else 4 * CHUNK // BLOCK + 1) * FULL_BYTES


@pytest.mark.parametrize(("backend", "p_ranks", "d_ranks"), [("nccl", 1, 1), ("ipc", 2, 1)])
async def test_instances_that_were_connected_ahead_open_no_link_for_their_first_request(
    start, backend, p_ranks, d_ranks, prompt, greedy_tokens
):
    p = await start("prefill", process=True, backend=backend, tensor_parallel_size=p_ranks)
    d = await start("decode", backend=backend, tensor_parallel_size=d_ranks)
    endpoint = (await d.client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)).kv_endpoint
    assert not (await p.client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)).kv_endpoint
    for _ in range(2):
        await p.client.call(CONNECT, ConnectRequest(endpoint), timeout_s=DEADLINE_S)
        links = set(d.server.transfers._manager._receiver.links)
        assert len(links) == p_ranks
    tokens, _, _ = await apart(p, d, "first", prompt(40))
    assert tokens == greedy_tokens("qwen3", prompt(40), MAX_TOKENS)
    assert set(d.server.transfers._manager._receiver.links) == links


async def test_an_instance_that_cannot_connect_to_another_says_why_and_stays_ready(start, prompt, model_folder):
    p = await start("prefill", model_path=str(model_folder("qwen3-wide-heads")))
    d = await start("decode")
    endpoint = (await d.client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)).kv_endpoint
    with pytest.raises(KVTransferFailed, match=r"(block_bytes_per_head|head_dim|model) is .* on rank 0 and .* on"):
        await p.client.call(CONNECT, ConnectRequest(endpoint), timeout_s=DEADLINE_S)
    assert await p.is_ready()


async def test_chunks_that_fill_no_block_change_no_token(start, prompt, greedy_tokens):
    """A chunk without a new block was an assertion: vLLM #28860, #43294."""
    p, d = await start("prefill", chunk_size=5), await start("decode")
    for length in (1, 4, 5, 6, 2 * BLOCK + 3):
        ids = prompt(length, salt=length)
        tokens, _, _ = await apart(p, d, f"{length}", ids)
        assert tokens == greedy_tokens("qwen3", ids, MAX_TOKENS)


async def test_decode_requests_wait_for_room_and_preempted_ones_are_computed_again(start, prompt, greedy_tokens):
    # Known elsewhere: vLLM #49675.
    p, d = await start("prefill"), await start("decode", num_blocks=12)
    many = [prompt(20 + i, salt=i) for i in range(12)]
    params = SamplingParams(0, 40, ignore_eos=True)

    async def one(name: str, ids: list[int]) -> list[int]:
        async with d.decode(name, ids, params) as decoding:
            granted = await anext(decoding)
            async with p.prefill(name, ids, granted.grant, params) as prefilling:
                tokens = [
                    token async for event in prefilling if isinstance(event, TokenEvent) for token in event.token_ids
                ]
            return tokens + [token async for event in decoding for token in event.token_ids]

    results = await asyncio.gather(*(one(str(i), ids) for i, ids in enumerate(many)))
    assert results == [greedy_tokens("qwen3", ids, 40) for ids in many]
    assert (await d.stats()).preemptions > 0


@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
async def test_a_request_may_be_given_up_in_every_phase(start, backend, prompt):
    """The fixture's end is the assertion: no block, transfer or request is left."""
    # Known elsewhere: vLLM #41269, #58222, #50789, #53095; vLLM #41180.
    p, d = await start("prefill", backend=backend), await start("decode", backend=backend, num_blocks=30)
    long = SamplingParams(0, 400, ignore_eos=True)
    ids = [prompt(300, salt=salt) for salt in range(6)]
    async with d.decode("waits", ids[0]) as holder:
        granted = await anext(holder)
        async with d.decode("for-room", ids[1], long) as waiting, asyncio.timeout(DEADLINE_S):
            first = asyncio.ensure_future(anext(waiting))
            await until(lambda: _has(d, waiting_requests=1))
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        async with p.prefill("waits", ids[0], granted.grant) as prefilling:
            first = asyncio.ensure_future(anext(prefilling))
            await until(lambda: _has(p, active_requests=1))
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
    async with d.decode("after-first", ids[2], long) as decoding:
        granted = await anext(decoding)
        async with p.prefill("after-first", ids[2], granted.grant, long) as prefilling:
            await anext(prefilling)
    await until(p.is_empty)
    async with d.decode("decoding", ids[3], long) as decoding:
        granted = await anext(decoding)
        async with p.prefill("decoding", ids[3], granted.grant, long) as prefilling:
            assert len([event async for event in prefilling]) == 2
        await anext(decoding)


async def _has(instance: InstanceClient, **at_least: int) -> bool:
    stats = await instance.stats()
    return all(getattr(stats, name) >= count for name, count in at_least.items())


async def test_a_request_that_ends_with_its_first_token_ends_on_both_sides(start, prompt):
    p, d = await start("prefill"), await start("decode")
    one = SamplingParams(0, 1)
    events = [event async for event in p.prefill("alone", prompt(20), b"", one)]
    assert [event.finish_reason for event in events] == ["length"]
    async with d.decode("both", prompt(20), one) as decoding:
        granted = await anext(decoding)
        event, done = [event async for event in p.prefill("both", prompt(20), granted.grant, one)]
        assert event.finish_reason == "length"
        assert (done.num_cached_tokens, done.num_bytes) == (16, 0), "nobody needs any of it"
        assert [each async for each in decoding] == [event]


@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
async def test_a_prefill_instance_killed_in_mid_transfer_leaves_no_block_behind(start, backend, prompt, greedy_tokens):
    p, other = await start("prefill", process=True, backend=backend), await start("prefill", backend=backend)
    d = await start("decode", backend=backend)
    async with d.decode("lost", prompt(400)) as decoding, contextlib.AsyncExitStack() as stack:
        granted = await anext(decoding)
        prefilling = await stack.enter_async_context(p.prefill("lost", prompt(400), granted.grant))
        first = asyncio.ensure_future(anext(prefilling))
        await until(lambda: _has(p, active_transfers=1))
        p.process.kill()
        await p.process.wait()
        await asyncio.wait([first], timeout=0.1)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    await until(d.is_empty)
    tokens, _, _ = await apart(other, d, "next", prompt(40))
    assert tokens == greedy_tokens("qwen3", prompt(40), MAX_TOKENS)


async def test_a_wrong_role_a_bad_prompt_and_an_id_in_use_are_refused(start, prompt):
    h, d = await start("hybrid"), await start("decode")
    with pytest.raises(InvalidRequest, match=r"does not serve 'instance.prefill'; it serves .*instance.generate"):
        await anext(h.prefill("r", prompt(3), b""))
    with pytest.raises(InvalidRequest, match="token 999 is outside the vocabulary"):
        await anext(d.decode("r", [999]))
    async with d.decode("s", prompt(3)) as decoding:
        await anext(decoding)
        with pytest.raises(InvalidRequest, match="'s' is in use"):
            await anext(d.decode("s", prompt(3)))


async def test_kv_of_another_model_is_refused_by_name(start, prompt, model_folder):
    # Known elsewhere: vLLM #42895, #23587.
    p = await start("prefill", model_path=str(model_folder("qwen3-wide-heads")))
    d = await start("decode")
    async with d.decode("r", prompt(20)) as decoding:
        granted = await anext(decoding)
        with pytest.raises(KVTransferFailed, match=r"(block_bytes_per_head|head_dim|model) is .* on rank 0 and .* on"):
            async for _ in p.prefill("r", prompt(20), granted.grant):
                pass


@pytest.mark.parametrize("reasons", [[None], ["stop"], ["stop", None], ["stop", "stop"]])
async def test_the_last_blocks_are_on_their_way_before_anybody_hears_of_the_first_token(reasons):
    """Or never, where nobody needs them any more, of all choices."""
    pushed: list[tuple[list[int], int]] = []

    async def open_send(transfer_id: str, grant: bytes) -> Any:
        return SimpleNamespace(num_blocks=3, push=lambda block_ids, first, _: pushed.append((list(block_ids), first)))

    inbox = Inbox()
    params = SamplingParams(0, MAX_TOKENS, n=len(reasons))
    request = PrefillRequest("r", "t", (3,) * (2 * BLOCK + 5), params, b"grant")
    sending = PrefillSend(open_send, request, BLOCK, inbox)
    following = asyncio.create_task(sending.follow())
    inbox.put_nowait(StepOutput("r", None, 0, num_computed_tokens=BLOCK, block_table=[4, 5, 6]))
    await asyncio.sleep(0.01)
    assert pushed == [([4], 0)]
    for choice, reason in enumerate(reasons):
        inbox.put_nowait(StepOutput("r", 7 + choice, 0, reason, 2 * BLOCK + 5, block_table=[4, 5, 6], choice=choice))
    assert [first.token_id for first in await following] == [7, 8][: len(reasons)]
    assert pushed[1:] == ([([5, 6], 1)] if None in reasons else [])


async def test_blocks_that_were_given_back_are_not_pushed_when_their_grant_comes_at_last():
    """They may be somebody else's by then."""
    pushed: list[tuple[list[int], int]] = []

    async def open_send(transfer_id: str, grant: bytes) -> Any:
        return SimpleNamespace(num_blocks=1, push=lambda block_ids, first, _: pushed.append((list(block_ids), first)))

    inbox = Inbox()
    request = PrefillRequest("r", "t", (3,) * BLOCK, GREEDY, grant_follows=True)
    sending = PrefillSend(open_send, request, BLOCK, inbox)
    inbox.put_nowait(StepOutput("r", 7, 0, None, BLOCK, block_table=[4]))
    await sending.follow()
    assert not await sending.wait_for_grant(0.01)
    inbox.put_nowait(GrantRequest("r", b"grant"))
    assert await sending.wait_for_grant(None)
    await asyncio.sleep(0.01)
    assert pushed == []
    inbox.put_nowait(StepOutput("r", 8, 0, None, BLOCK, block_table=[5]))
    assert [first.token_id for first in await sending.follow()] == [8]
    assert pushed == [([5], 0)]


# ---- prompts that are computed before there is a grant for them --------------------------------------------------


@pytest.fixture
def set_patience(monkeypatch):
    return lambda seconds: monkeypatch.setattr("hbserve_core.instance.gpu_instance.GRANT_PATIENCE_S", seconds)


@pytest.mark.parametrize("length", [BLOCK, 2 * CHUNK + 5])
@pytest.mark.parametrize("when", ["at once", "when it is computed", "when its blocks were given back"])
async def test_a_prompt_that_is_computed_before_its_grant_has_the_same_tokens(
    start, set_patience, prompt, greedy_tokens, when, length
):
    set_patience(0.05 if when == "when its blocks were given back" else DEADLINE_S)
    p, d, ids = await start("prefill"), await start("decode"), prompt(length)
    async with p.prefill_before_grant("r", ids) as prefilling, d.decode("r", ids) as decoding:
        first = asyncio.ensure_future(anext(prefilling))
        if when != "at once":
            await until(lambda: _has(p, prefill_tokens=length))
        if when == "when its blocks were given back":
            await until(lambda: _has(p, free_blocks=200))
        granted = await anext(decoding)
        assert not first.done(), "the wait for a grant is one for the first token, and not for the second"
        p.grant("r", granted.grant)
        p.grant("r", b"the second one is of no effect")
        event = await first
        if when != "at once":
            assert (await d.stats()).kv_bytes_received, "and neither is the transfer, where it could not go on beside"
        (done,) = [each async for each in prefilling]
        tokens = [token async for each in decoding for token in each.token_ids]
    assert [*event.token_ids, *tokens] == greedy_tokens("qwen3", ids, MAX_TOKENS)
    assert done.num_bytes == -(-length // BLOCK) * FULL_BYTES
    computed_again = (await p.stats()).prefill_tokens - length
    last_block = (length - 1) % BLOCK + 1
    assert computed_again == (last_block if when == "when its blocks were given back" else 0)


async def test_a_grant_of_nothing_tells_the_first_token_and_keeps_the_prompt_for_the_next_attempt(
    start, prompt, greedy_tokens
):
    """At most the last block is computed again."""
    p, d, ids = await start("prefill"), await start("decode"), prompt(2 * CHUNK + 5)
    expected = greedy_tokens("qwen3", ids, MAX_TOKENS)
    async with p.prefill_before_grant("refused", ids) as prefilling:
        first = asyncio.ensure_future(anext(prefilling))
        await until(lambda: _has(p, active_requests=1))
        p.grant("refused", b"")
        assert (await first).token_ids == expected[:1]
        assert [event async for event in prefilling] == []
    assert (await p.stats()).kv_bytes_sent == 0
    request = DecodeRequest("next", "t-next", ids, GREEDY, expected[:1])
    async with d.client.stream(DECODE, request, timeout_s=DEADLINE_S) as decoding:
        granted = await anext(decoding)
        second, _ = [event async for event in p.prefill("next", ids, granted.grant, output=expected[:1])]
        tokens = [token async for event in decoding for token in event.token_ids]
    assert [*second.token_ids, *tokens] == expected[1:]
    assert (await p.stats()).prefill_tokens == len(ids) + 5, "four blocks were there"


async def test_a_token_that_is_the_last_one_waits_for_no_grant(start, prompt):
    p, ids = await start("prefill"), prompt(20)
    async with p.prefill_before_grant("r", ids, SamplingParams(0, 1)) as prefilling:
        assert (await anext(prefilling)).finish_reason == "length"


async def test_a_prompt_of_which_one_choice_goes_on_waits_for_its_grant_without_blocks(start, set_patience, prompt):
    set_patience(0.05)
    p, ids = await start("prefill"), prompt(20)
    params = SamplingParams(3.0, 9, ignore_eos=True, seed=11, n=2)
    drawn = await tokens_of(p.prefill("before", ids, b"", params))
    assert len(set(drawn)) == 2
    params.stop_token_ids = drawn[:1]
    async with p.prefill_before_grant("r", ids, params) as prefilling:
        first = asyncio.ensure_future(anext(prefilling))

        async def was_told_or_gave_its_blocks_back() -> bool:
            stats = await p.stats()
            return first.done() or (stats.prefill_tokens, stats.free_blocks) == (20 + 4, 200)

        await until(was_told_or_gave_its_blocks_back)
        assert not first.done()
        p.grant("r", b"")
        events = [await first, *[event async for event in prefilling]]
        assert [event.finish_reason for event in events] == ["stop", None]


async def test_prompts_without_a_grant_do_not_keep_those_with_one_from_being_computed(
    start, set_patience, prompt, greedy_tokens
):
    """Their decode instance might have no room until these have ended: neither would ever go on."""
    set_patience(0.2)
    p, d = await start("prefill", num_blocks=12), await start("decode")
    early, granted = prompt(8 * BLOCK, salt=1), prompt(8 * BLOCK, salt=2)
    async with p.prefill_before_grant("early", early) as prefilling:
        first = asyncio.ensure_future(anext(prefilling))
        await until(lambda: _has(p, prefill_tokens=len(early)))
        tokens, _, _ = await apart(p, d, "granted", granted)
        assert tokens == greedy_tokens("qwen3", granted, MAX_TOKENS)
        async with d.decode("early", early) as decoding:
            p.grant("early", (await anext(decoding)).grant)
            tokens = (await first).token_ids + [token async for event in decoding for token in event.token_ids]
        assert tokens == greedy_tokens("qwen3", early, MAX_TOKENS)


@pytest.mark.parametrize("patience_s", [0.0, 0.05, DEADLINE_S])
async def test_a_prompt_may_be_given_up_whenever_its_grant_is_waited_for_or_comes(
    start, set_patience, prompt, patience_s
):
    """The fixture's end is the assertion: no block, transfer or request is left."""
    set_patience(patience_s)
    p, d, ids = await start("prefill"), await start("decode"), prompt(3 * CHUNK)

    async def give_up(name: str, delay_s: float, is_granted: bool) -> None:
        async with p.prefill_before_grant(name, ids) as prefilling, d.decode(name, ids) as decoding:
            first = asyncio.ensure_future(anext(prefilling))
            granted = await anext(decoding)
            await asyncio.sleep(delay_s)
            if is_granted:
                p.grant(name, granted.grant)
            await asyncio.sleep(delay_s / 4)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    delays_s = [0.0, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12]
    for is_granted in (False, True):
        await asyncio.gather(*(give_up(f"{delay_s}{is_granted}", delay_s, is_granted) for delay_s in delays_s))
    p.grant("nobody", b"there is no such request")
    await until(p.is_empty)
    assert p.server._server.failed_notifications == 0


async def test_a_grant_of_a_decode_instance_that_has_died_fails_the_prefill_and_leaves_no_block(
    start, set_patience, prompt, greedy_tokens
):
    set_patience(DEADLINE_S)
    p, dying, ids = await start("prefill"), await start("decode", process=True), prompt(3 * CHUNK)
    async with p.prefill_before_grant("r", ids) as prefilling, dying.decode("r", ids) as decoding:
        first = asyncio.ensure_future(anext(prefilling))
        await until(lambda: _has(p, prefill_tokens=len(ids)))
        granted = await anext(decoding)
        dying.process.kill()
        await dying.process.wait()
        p.grant("r", granted.grant)
        # Its port may be another test's by then, whose receiver refuses.
        with pytest.raises(KVTransferFailed, match=r"KV transfer t-r failed: .*(no connection to|refuses)"):
            await first
    await until(p.is_empty)


async def test_a_prefill_instance_that_dies_before_its_grant_leaves_no_block_of_the_decode_instance_reserved(
    start, prompt
):
    dying, d, ids = await start("prefill", process=True), await start("decode"), prompt(3 * CHUNK)
    async with dying.prefill_before_grant("r", ids) as prefilling, d.decode("r", ids) as decoding:
        first = asyncio.ensure_future(anext(prefilling))
        granted = await anext(decoding)
        dying.process.kill()
        await dying.process.wait()
        dying.grant("r", granted.grant)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    await until(d.is_empty)
