"""How requests between a prefill and a decode instance end: by a token, or by clients that leave."""

import asyncio
import contextlib
import importlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec
import pytest

from hbserve_core import GpuInstance, InstanceConfig
from hbserve_core.engine.step import StepOutput
from hbserve_core.instance.handover import FirstToken, Handover, Inbox, PrefillSend, event_of, wait_for_kv
from hbserve_kv import KVTransferConfig, Outcome, SendTransfer, TransferResult
from hbserve_rpc import InvalidRequest, KVTransferFailed, LogitsNotFinite, RequestTimeout, SamplingParams
from hbserve_rpc.connected_client import Peer
from hbserve_rpc.messages import (
    CACHED_PREFIXES,
    DECODE,
    GENERATE,
    PREFILL,
    CachedPrefixesRequest,
    DecodeRequest,
    GenerateRequest,
    Granted,
    PrefillRequest,
    TokenEvent,
    TransferDone,
)
from hbserve_rpc.prompt_shape import shape_of
from hbserve_testing.instances import InstanceClient, tokens_of
from hbserve_testing.narrowing import of_type
from hbserve_testing.waits import reading, until

BLOCK, CHUNK = 16, 32
DEADLINE_S = 60
KV_TIMEOUT_S = 4
LONG = SamplingParams(0, 400, ignore_eos=True)
SHORT = SamplingParams(0, 3, ignore_eos=True)


class Instance(InstanceClient):
    """One in this process."""

    params = LONG

    async def has_heard(self) -> bool:
        """Whether the instance knows that a client has left, and has told its engine."""
        if not self.server._ends:
            return False
        await asyncio.sleep(0)  # what was scheduled by then has run
        return True

    async def computes_nothing(self) -> bool:
        stats = await self.stats()
        return bool(stats.waiting_requests == stats.running_requests == 0)


Start = Callable[..., Awaitable[Instance]]


@pytest.fixture
async def start(model_folder: Callable[[str], Any]) -> AsyncIterator[Start]:
    """Starts instances. At the end those that live must have nothing in them, and no task may be left here."""
    async with contextlib.AsyncExitStack() as stack:
        started: list[Instance] = []

        async def start(role: str, *, kv: Any = None, **settings: Any) -> Instance:
            kv = {"buffer_size": 1 << 20, "timeout_s": KV_TIMEOUT_S} | (kv or {})
            given: dict[str, Any] = {
                "instance_id": f"{role}-{len(started)}", "role": role, "model_path": str(model_folder("qwen3")),
                "device": "cpu", "num_blocks": 100, "chunk_size": CHUNK, "num_threads": 1, "kv_rank": len(started),
                "kv_transfer": KVTransferConfig(**kv),
            }  # fmt: skip
            server = GpuInstance(InstanceConfig(**(given | settings)))
            await server.start()
            stack.push_async_callback(server.stop)
            instance = Instance(server.address, server=server)
            await stack.enter_async_context(instance.client)
            await server.wait_ready()
            started.append(instance)
            return instance

        yield start
        for instance in started:
            await until(instance.is_empty)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def apart(p: Instance, d: Instance, name: str, ids: list[int], params: SamplingParams) -> tuple[list[int], Any]:
    """What a scheduler does. Tokens, and what P says of the transfer; None if the request ended on P."""
    async with d.decode(name, ids, params) as decoding:
        granted = of_type(Granted, await anext(decoding))
        async with p.prefill(name, ids, granted.grant, params) as prefilling:
            first, *rest = [event async for event in prefilling]
        assert isinstance(first, TokenEvent)
        if first.finish_reason:
            return first.token_ids, None
        return [*first.token_ids, *await tokens_of(decoding)], rest[0]


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The gate of a custom backend through which all parts of this test pass; closed at first."""
    monkeypatch.syspath_prepend(request.path.parent)
    custom = importlib.import_module("hbserve_core_test_backend")
    gate = custom.Gate()
    monkeypatch.setitem(custom.GATES, request.node.name, gate)
    gate.settings = {"backend": "hbserve_core_test_backend:GatedTransfer", "options": {"gate": request.node.name}}
    return gate


class Halt:
    """Lets an instance of this process compute so many steps, and then none until `resume`."""

    def __init__(self, instance: Instance, after: int) -> None:
        self.reached, self._may_go_on = threading.Event(), threading.Event()
        self._left, self._launch = after, instance.server.runner.launch
        instance.server.runner.launch = self._step

    def _step(self, batch: Any) -> Any:
        if self._left == 0:
            self.reached.set()
            assert self._may_go_on.wait(DEADLINE_S)
        self._left -= 1
        return self._launch(batch)

    async def is_reached(self) -> bool:
        return self.reached.is_set()

    def resume(self) -> None:
        self._may_go_on.set()


@pytest.fixture
def halt() -> Iterator[Callable[..., Halt]]:
    halts: list[Halt] = []

    def make(instance: Instance, after: int) -> Halt:
        halts.append(Halt(instance, after))
        return halts[-1]

    yield make
    for each in halts:
        each.resume()


# ---- by a token --------------------------------------------------------------------------------------------------


async def test_a_stop_token_or_the_limit_may_end_a_request_on_the_prefill_side(start, prompt, greedy_tokens):
    p, d = await start("prefill"), await start("decode")
    (first,) = greedy_tokens("qwen3", prompt(40), 1)
    for name, params, reason in [
        ("limit", SamplingParams(0, 1, ignore_eos=True), "length"),
        ("stop", SamplingParams(0, 9, ignore_eos=True, stop_token_ids=[first]), "stop"),
    ]:
        async with d.decode(name, prompt(40), params) as decoding:
            granted = await anext(decoding)
            event, done = [event async for event in p.prefill(name, prompt(40), granted.grant, params)]
            assert (event.index, event.token_ids, event.finish_reason) == (0, [first], reason)
            assert isinstance(done, TransferDone)
            assert [each async for each in decoding] == [event], "told on the KV channel, too"
    assert (await d.stats()).generated_tokens == 0
    assert [(await each.stats()).failed_transfers for each in (p, d)] == [0, 0]


async def test_a_request_that_ended_at_its_first_token_leaves_no_block_to_find(start, prompt, greedy_tokens):
    """Its last blocks were never sent: as a cached prefix they would be somebody else's."""
    p, d = await start("prefill"), await start("decode")
    (first,) = greedy_tokens("qwen3", prompt(40), 1)
    stops = SamplingParams(0, 9, ignore_eos=True, stop_token_ids=[first])
    for name in ("ended", "again"):
        async with d.decode(name, prompt(40), stops) as decoding:
            granted = await anext(decoding)
            assert granted.num_cached_tokens == 0
            event, _ = [event async for event in p.prefill(name, prompt(40), granted.grant, stops)]
            assert (event.token_ids, event.finish_reason) == ([first], "stop")
    tokens, _ = await apart(p, d, "goes-on", prompt(40), SamplingParams(0, 9, ignore_eos=True))
    assert tokens == greedy_tokens("qwen3", prompt(40), 9)


@pytest.mark.parametrize("length", [1, BLOCK, CHUNK + 1])
async def test_a_seeded_request_draws_the_tokens_that_it_draws_on_a_hybrid(start, prompt, length):
    p, d, h = await start("prefill"), await start("decode"), await start("hybrid")
    drawn = []
    for seed in range(4):
        params = SamplingParams(1.0, 12, ignore_eos=True, seed=seed, top_k=50, top_p=0.95)
        expected = await h.hybrid(f"{seed}", prompt(length), params)
        for again in range(2):
            tokens, _ = await apart(p, d, f"{seed}-{again}", prompt(length), params)
            assert tokens == expected
        drawn.append(tuple(expected))
    assert len(set(drawn)) > 1, "or the seed does nothing"


@pytest.mark.parametrize("num_known", [1, 5])
async def test_a_seeded_request_that_is_tried_again_draws_what_it_would_have_drawn(start, prompt, num_known):
    p, d, h = await start("prefill"), await start("decode"), await start("hybrid")
    ids = prompt(CHUNK + 1)
    params = SamplingParams(1.0, 12, ignore_eos=True, seed=7, top_k=50, top_p=0.95)
    whole = await h.hybrid("undisturbed", ids, params)
    known, rest = whole[:num_known], whole[num_known:]
    again = GenerateRequest("again", ids, params, known)
    events = h.client.stream(GENERATE, again, timeout_s=DEADLINE_S)
    assert [token async for event in events for token in event.token_ids] == rest
    request = DecodeRequest("apart", "t-apart", ids, params, known)
    async with d.client.stream(DECODE, request, timeout_s=DEADLINE_S) as decoding:
        grant = (await anext(decoding)).grant
        prefill = PrefillRequest("apart", "t-apart", ids, params, grant, known)
        async with p.client.stream(PREFILL, prefill, timeout_s=DEADLINE_S) as prefilling:
            first = await anext(prefilling)
            assert (first.index, first.token_ids) == (num_known, rest[:1])
            assert [token async for event in decoding for token in event.token_ids] == rest[1:]
            async for _ in prefilling:
                pass


async def test_the_transfer_says_how_much_of_the_prompt_was_cached_on_the_prefill_side(start, prompt):
    p, d = await start("prefill"), await start("decode", prefix_caching=False)
    params = SamplingParams(0, 3, ignore_eos=True)
    for name, length, cached in [("cold", 70, 0), ("again", 70, 64), ("longer", 90, 64), ("all", 64, 48)]:
        _, done = await apart(p, d, name, (prompt(64) + prompt(26, salt=5))[:length], params)
        assert isinstance(done, TransferDone)
        assert done.num_cached_tokens == cached
        assert done.num_bytes > 0


async def test_a_backend_of_ones_own_carries_the_tokens_of_a_hybrid(start, gate, prompt, greedy_tokens):
    gate.is_open.set()
    p, d = await start("prefill", kv=gate.settings), await start("decode", kv=gate.settings)
    params = SamplingParams(0, 6, ignore_eos=True)
    many = [prompt(length, salt=length) for length in (1, 15, 16, 17, 31, 32, 33, 133)]
    results = await asyncio.gather(*(apart(p, d, str(i), ids, params) for i, ids in enumerate(many)))
    assert [tokens for tokens, _ in results] == [greedy_tokens("qwen3", ids, 6) for ids in many]
    assert len(gate.ids) == len(set(gate.ids)) == sum(done.num_parts for _, done in results)


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_others_find_what_was_received_only_where_it_is_known_who_sent_it(start, prompt, monkeypatch, is_trusted):
    monkeypatch.setattr(Peer, "is_trusted", property(lambda self: is_trusted))
    p, d = await start("prefill"), await start("decode")
    await apart(p, d, "r", prompt(40), SHORT)
    await until(d.is_empty)
    assert (await d.stats()).cached_blocks == (2 if is_trusted else 0)


# ---- by logits that are no numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_output", [0, 1, 3])
async def test_a_request_without_numbers_fails_on_either_side_and_the_others_get_their_tokens(
    start, broken_model, greedy_tokens, num_output
):
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(num_output)
    p, d = [await start(role, model_path=str(model.folder)) for role in ("prefill", "decode")]
    params = SamplingParams(0, 8, ignore_eos=True)
    delivered: list[int] = []

    async def broken() -> None:
        async with d.decode("broken", model.prompt, params) as decoding:
            granted = await anext(decoding)
            async with p.prefill("broken", model.prompt, granted.grant, params) as prefilling:
                async for event in prefilling:
                    delivered.extend([] if isinstance(event, TransferDone) else event.token_ids)
            async for event in decoding:
                delivered.extend(event.token_ids)

    sound = [apart(p, d, name, ids, params) for name, ids in model.sound.items()]
    error, *others = await asyncio.gather(broken(), *sound, return_exceptions=True)
    assert isinstance(error, LogitsNotFinite)
    assert f"not finite at output token {num_output}: " in str(error)
    assert delivered == model.output
    assert [tokens for tokens, _ in others] == [greedy_tokens(model.whole, ids, 8) for ids in model.sound.values()]
    assert {p.server.status, d.server.status} == {"ready"}


async def test_chunks_that_were_sent_before_there_were_no_numbers_are_nobodys(start, broken_model, greedy_tokens):
    """Some blocks have arrived when the last chunk is computed."""
    model = broken_model(0)
    p, d = [await start(role, model_path=str(model.folder)) for role in ("prefill", "decode")]
    begin = (model.sound["33"] * 5)[:150]
    async with d.decode("broken", [*begin, *model.prompt]) as decoding:
        granted = await anext(decoding)
        with pytest.raises(LogitsNotFinite, match="not finite at output token 0"):
            async for _ in p.prefill("broken", [*begin, *model.prompt], granted.grant):
                pass
        with pytest.raises(KVTransferFailed, match="KV transfer failed: the request has ended"):
            await anext(decoding)
    tokens, _ = await apart(p, d, "sound", begin, SamplingParams(0, 1, ignore_eos=True))
    assert len(tokens) == 1


def committed(payload: bytes, *, is_partial: bool = False) -> Any:
    class Committed:
        def when_ended(self, call: Callable[[TransferResult], None]) -> None:
            call(TransferResult(Outcome.COMPLETED, payload, 1, 1, 0.0, "", is_partial))

    return Committed()


def packed(num_tokens: int, *first: Any) -> bytes:
    return msgspec.msgpack.encode(Handover(num_tokens, [FirstToken(*first)]))


REFUSED = {
    "token -2 is outside the vocabulary": packed(40, -2),
    "token -7 is outside the vocabulary": packed(40, -7),
    "token 320 is outside the vocabulary": packed(40, 320),
    "token 1000000 is outside the vocabulary": packed(40, 10**6),
    "token 999 is outside the vocabulary": packed(40, 5, None, [{999: -0.5}]),
    "it holds 41 tokens, the request has 40": packed(41, 5),
    "it has log-probabilities of 1 tokens": packed(40, 5, None, [{5: -0.5}]),
    "it has 2 first tokens, the request n=1": msgspec.msgpack.encode(Handover(40, [FirstToken(5), FirstToken(6)])),
    "what was committed is not a handover": b"\xc1",
}


@pytest.mark.parametrize("why", REFUSED)
async def test_a_handover_that_the_request_cannot_go_on_with_is_refused_by_the_decode_side(why):
    request = DecodeRequest("r", "t", (5,) * 40, LONG)
    with pytest.raises(KVTransferFailed, match=f"^KV transfer failed: {why}"):
        await wait_for_kv(committed(REFUSED[why]), Inbox(), request, vocab_size=320)


async def test_decode_goes_on_without_blocks_only_where_there_is_nothing_to_decode():
    request = DecodeRequest("r", "t", (5,) * 40, LONG)
    with pytest.raises(KVTransferFailed, match="without all blocks that were granted"):
        await wait_for_kv(committed(packed(40, 5), is_partial=True), Inbox(), request, vocab_size=320)
    done = committed(packed(40, 5, "stop"), is_partial=True)
    handover, is_trusted = await wait_for_kv(done, Inbox(), request, vocab_size=320)
    assert not handover.has_more
    assert is_trusted


async def test_a_prefill_instance_that_commits_without_its_blocks_ends_that_request_alone(start, prompt, monkeypatch):
    p, d = await start("prefill"), await start("decode")
    with monkeypatch.context() as patched:
        patched.setattr(PrefillSend, "_push", lambda self: None)
        with pytest.raises(KVTransferFailed, match="without all blocks that were granted"):
            await apart(p, d, "hollow", prompt(40), LONG)
    tokens, _ = await apart(p, d, "whole", prompt(40), SamplingParams(0, 4, ignore_eos=True))
    assert len(tokens) == 4
    assert {p.server.status, d.server.status} == {"ready"}


# ---- by a client that leaves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", ["decode", "prefill", "both"])
async def test_who_leaves_in_mid_transfer_gets_no_block_back_before_nobody_reads_or_writes_it(
    start, gate, halt, prompt, leaves
):
    # Known elsewhere: vLLM #52234.
    p, d = await start("prefill", kv=gate.settings), await start("decode", kv=gate.settings)
    halted = halt(p, after=1)
    async with contextlib.AsyncExitStack() as decode, contextlib.AsyncExitStack() as prefill:
        decoding = await decode.enter_async_context(d.decode("r", prompt(140)))
        granted = await anext(decoding)
        prefilling = await prefill.enter_async_context(reading(p.prefill("r", prompt(140), granted.grant)))
        async with asyncio.timeout(DEADLINE_S):
            await gate.sending.wait()
            await gate.receiving.wait()
        await until(halted.is_reached)
        if leaves != "decode":
            await prefill.aclose()
            await until(p.has_heard)
        if leaves != "prefill":
            await decode.aclose()
            await until(d.has_heard)
        halted.resume()
        await until(p.computes_nothing)
        for instance in (p, d):
            stats = await instance.stats()
            assert (stats.active_requests, stats.free_blocks) == (1, 100 - 9), "a part is under way between these"
        if leaves != "decode":
            assert (await p.stats()).prefill_tokens <= 2 * CHUNK, "what nobody wants is not computed"
        gate.is_open.set()
        if leaves == "decode":
            with pytest.raises(KVTransferFailed, match="KV transfer t-r failed: cancelled by the receiver"):
                await prefilling
        if leaves == "prefill":
            with pytest.raises(KVTransferFailed, match="KV transfer failed: the request has ended"):
                await anext(decoding)


async def test_a_prefill_client_that_leaves_after_the_first_token_does_not_keep_the_kv_from_the_decode_side(
    start, gate, prompt, greedy_tokens, monkeypatch
):
    p, d = await start("prefill", kv=gate.settings), await start("decode", kv=gate.settings)
    committing, commit = asyncio.Event(), SendTransfer.commit

    async def tell(self: SendTransfer, payload: bytes) -> TransferResult:
        committing.set()
        return await commit(self, payload)

    monkeypatch.setattr(SendTransfer, "commit", tell)
    async with d.decode("r", prompt(40), SHORT) as decoding, asyncio.timeout(DEADLINE_S):
        granted = await anext(decoding)
        async with p.prefill("r", prompt(40), granted.grant, SHORT) as prefilling:
            first = await anext(prefilling)
            await committing.wait()
        await until(p.has_heard)
        gate.is_open.set()
        assert [*first.token_ids, *await tokens_of(decoding)] == greedy_tokens("qwen3", prompt(40), 3)


async def test_a_prefill_client_that_leaves_while_the_transfer_is_opened_ends_it_for_the_decode_side(
    start, prompt, monkeypatch
):
    p, d = await start("prefill"), await start("decode")
    finishing, may_open = asyncio.Event(), asyncio.Event()
    finish, open_send = PrefillSend.finish, p.server.transfers.open_send

    async def tell(self: PrefillSend, outputs: Any) -> Any:
        finishing.set()
        return await finish(self, outputs)

    async def open_late(*given: Any) -> Any:
        await may_open.wait()
        return await open_send(*given)

    monkeypatch.setattr(PrefillSend, "finish", tell)
    monkeypatch.setattr(p.server.transfers, "open_send", open_late)
    async with d.decode("r", prompt(40)) as decoding, asyncio.timeout(DEADLINE_S / 2):
        granted = await anext(decoding)
        async with p.prefill("r", prompt(40), granted.grant) as prefilling:
            await anext(prefilling)
            await finishing.wait()
        await until(p.has_heard)
        may_open.set()
        with pytest.raises(KVTransferFailed, match="KV transfer failed: the request has ended"):
            await anext(decoding)


async def test_a_client_that_leaves_before_the_prefill_begins_leaves_nothing_and_the_grant_is_worth_nothing(
    start, prompt
):
    # Known elsewhere: vLLM #41269, #58222, #50789, #53095.
    p, d = await start("prefill"), await start("decode")
    async with d.decode("r", prompt(70)) as decoding:
        granted = await anext(decoding)
    await until(d.is_empty)
    with pytest.raises(KVTransferFailed, match=r"KV transfer t-r failed: .*given up, or never granted"):
        async for _ in p.prefill("r", prompt(70), granted.grant):
            pass
    await until(p.is_empty)
    tokens, _ = await apart(p, d, "r", prompt(70), SamplingParams(0, 4, ignore_eos=True))
    assert len(tokens) == 4, "the same id may come again"


async def test_a_client_that_leaves_while_its_prompt_is_computed_leaves_nothing(start, halt, prompt):
    p, d = await start("prefill"), await start("decode")
    halted = halt(p, after=1)
    async with d.decode("r", prompt(140)) as decoding:
        granted = await anext(decoding)
        async with reading(p.prefill("r", prompt(140), granted.grant)):
            await until(halted.is_reached)
    await until(p.has_heard)
    halted.resume()
    await until(p.is_empty)
    await until(d.is_empty)
    assert (await p.stats()).prefill_tokens <= 2 * CHUNK, "what nobody wants is not computed"


async def test_an_id_is_in_use_until_the_engine_has_forgotten_its_request(start, halt, prompt):
    h = await start("hybrid")
    halted = halt(h, after=1)
    request = GenerateRequest("r", prompt(140), LONG)
    async with reading(h.client.stream(GENERATE, request, timeout_s=DEADLINE_S)):
        await until(halted.is_reached)
    await until(h.has_heard)
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        await h.hybrid("r", prompt(3), SHORT)
    halted.resume()


def test_an_event_of_several_steps_has_the_prompts_logprobs_of_the_first():
    event = event_of([StepOutput("r", 5, 0, prompt_logprobs=[{3: -1.0}]), StepOutput("r", 6, 1)])
    assert (event.token_ids, event.prompt_logprobs) == ([5, 6], [{3: -1.0}])


async def test_an_instance_ends_a_request_at_its_deadline_by_itself_in_whatever_it_waits_for(start, prompt):
    """Nobody closes a stream: the scheduler is frozen, or cut off."""
    h, p, d = [await start(role) for role in ("hybrid", "prefill", "decode")]
    ids = prompt(40)
    computing = h.client.stream(GENERATE, GenerateRequest("c", ids, LONG, left_s=0.01), timeout_s=DEADLINE_S)
    no_kv_comes = d.client.stream(DECODE, DecodeRequest("k", "t-k", ids, LONG, left_s=0.3), timeout_s=DEADLINE_S)
    no_grant_comes = p.client.stream(
        PREFILL, PrefillRequest("g", "t-g", ids, LONG, grant_follows=True, left_s=0.3), timeout_s=DEADLINE_S
    )
    for stream in (computing, no_kv_comes, no_grant_comes):
        async with stream:
            with pytest.raises(RequestTimeout, match="it was not done before its deadline"):
                await asyncio.wait_for(read_to_the_end(stream), DEADLINE_S)
    for instance in (h, p, d):
        await until(instance.is_empty)
    in_time = h.client.stream(GENERATE, GenerateRequest("i", ids, SHORT, left_s=DEADLINE_S), timeout_s=DEADLINE_S)
    assert sum([len(event.token_ids) async for event in in_time]) == 3


async def read_to_the_end(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_a_decode_instance_computes_prompts_too_and_says_what_it_has_cached(start, prompt, greedy_tokens):
    p, d = await start("prefill"), await start("decode")
    ids, expected = prompt(40), greedy_tokens("qwen3", prompt(40), 3)
    nothing = await d.client.call(CACHED_PREFIXES, CachedPrefixesRequest(), timeout_s=DEADLINE_S)
    assert nothing.digests == b""
    assert await d.hybrid("alone", ids, SHORT) == expected
    held = await d.client.call(CACHED_PREFIXES, CachedPrefixesRequest(nothing.version), timeout_s=DEADLINE_S)
    assert held.digests == b"".join(shape_of(ids, BLOCK).digests)
    same = await d.client.call(CACHED_PREFIXES, CachedPrefixesRequest(held.version), timeout_s=DEADLINE_S)
    assert (same.version, same.digests) == (held.version, None)
    tokens, done = await apart(p, d, "apart", ids, SHORT)
    assert (tokens, done.num_parts) == (expected, 1), "what it has computed is not sent again"
