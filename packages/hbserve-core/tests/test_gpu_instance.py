"""An instance says what is wrong with it, and nobody waits for one that cannot answer."""

import asyncio
import contextlib
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from hbserve_core import EngineStopped, GpuInstance, InstanceConfig, InstanceFailed
from hbserve_core.instance.engine_thread import EngineThread
from hbserve_kv import KVTransferConfig, KVTransferManager, Outcome, TransferFailed, TransferResult
from hbserve_kv.transports.ipc import IpcTransport
from hbserve_rpc import AddressInUse, LogitsNotFinite, Overloaded, RemoteError, RpcClient, SamplingParams
from hbserve_rpc.messages import (
    DECODE,
    DESCRIBE,
    GENERATE,
    PREFILL,
    STATS,
    DecodeRequest,
    Empty,
    GenerateRequest,
    InstanceInfo,
    PrefillRequest,
    TokenEvent,
)
from hbserve_rpc.reports import REPORTS, InstanceReport, ReportsRequest
from hbserve_testing.narrowing import of_type, present

DEADLINE_S = 60


def config(folder: Any, **settings: Any) -> InstanceConfig:
    defaults: dict[str, Any] = {"device": "cpu", "num_blocks": 50, "num_threads": 1}
    return InstanceConfig(model_path=str(folder), **(defaults | settings))


@contextlib.asynccontextmanager
async def serving(config: InstanceConfig) -> AsyncIterator[tuple[GpuInstance, RpcClient]]:
    instance = GpuInstance(config)
    await instance.start()
    try:
        async with RpcClient(instance.address) as client:
            yield instance, client
    finally:
        await instance.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert "engine" not in [thread.name for thread in threading.enumerate()]


async def generate(client: RpcClient, name: str, ids: list[int], **params: Any) -> list[int]:
    request = GenerateRequest(name, tuple(ids), SamplingParams(**({"temperature": 0, "max_tokens": 4} | params)))
    return [t async for event in client.stream(GENERATE, request, timeout_s=DEADLINE_S) for t in event.token_ids]


async def test_an_instance_is_starting_then_ready_and_refuses_requests_until_then(model_folder, prompt, monkeypatch):
    # Known elsewhere: SGLang #32652, #10856, #26482, #8063.
    may_load = threading.Event()
    make_engine = GpuInstance._make_engine
    monkeypatch.setattr(GpuInstance, "_make_engine", lambda self: may_load.wait(DEADLINE_S) and make_engine(self))
    async with serving(config(model_folder("qwen3"), health_port=0)) as (instance, client):

        async def probe(path: str) -> str:
            reader, writer = await asyncio.open_connection(*present(instance.health).address.split(":"))
            writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
            found = (await reader.read()).decode()
            writer.close()
            return found

        assert (await probe("/health")).startswith("HTTP/1.1 200 ")
        assert (await probe("/ready")).endswith("hybrid-0 is starting\n")
        info = await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
        assert (info.status, info.epoch, info.num_blocks) == ("starting", instance.epoch, 0)
        with pytest.raises(Overloaded, match="hybrid-0 is not ready, it is starting"):
            await generate(client, "r", prompt(3))
        may_load.set()
        await instance.wait_ready()
        info = await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
        assert (info.status, info.num_blocks, info.max_prompt_len, info.vocab_size) == ("ready", 50, 511, 320)
        assert len(await generate(client, "r", prompt(3), ignore_eos=True)) == 4
        assert (await probe("/ready")).startswith("HTTP/1.1 200 ")
        of = 'instance_id="hybrid-0",role="hybrid"'
        assert f"hbserve:instance_generation_tokens_total{{{of}}} 4\n" in await probe("/metrics")


async def test_what_is_to_be_done_before_anybody_asks_is_done_before_the_instance_is_ready(model_folder):
    seen = []
    instance = GpuInstance(config(model_folder("qwen3")), before_ready=lambda: seen.append(instance.status))
    await instance.start()
    await instance.wait_ready()
    assert (seen, instance.status) == (["starting"], "ready")
    await instance.stop()


async def test_an_instance_whose_backend_moves_no_block_is_not_ready_and_says_why(model_folder, monkeypatch):
    async def push(self: object, link: object, part: object) -> None:
        raise OSError("the cable is out")

    monkeypatch.setattr(IpcTransport, "push", push)
    settings = config(model_folder("qwen3"), role="prefill", kv_transfer=KVTransferConfig(backend="ipc"))
    async with serving(settings) as (instance, client):
        with pytest.raises(InstanceFailed, match="the cable is out"):
            await instance.wait_ready()
        info = await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
        assert info.status == "failed"
        assert info.error == (
            "BackendUnavailable: kv_transfer.backend='ipc': a transfer to itself by ipc failed: part 0: "
            "OSError: the cable is out"
        )


async def test_a_hybrid_instance_moves_nothing_to_itself(model_folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("it has no backend")

    monkeypatch.setattr(KVTransferManager, "__init__", refuse)
    async with serving(config(model_folder("qwen3"))) as (instance, _):
        await instance.wait_ready()
        assert instance.transfers is None


async def test_an_instance_may_be_stopped_before_and_while_it_loads(model_folder):
    before = GpuInstance(config(model_folder("qwen3")))
    await before.stop()
    async with serving(config(model_folder("qwen3"))) as (instance, _):
        assert instance.status == "starting"
    assert instance.status == "draining"


class LostSender:
    """A receive whose sender was lost and may still write, as an hbserve_kv manager has it until it is closed."""

    grant = b""

    def __init__(self, closed: asyncio.Event) -> None:
        self._closed = closed

    def when_ended(self, call: Callable[[TransferResult], None]) -> None:
        pass

    async def cancel(self, reason: str) -> Outcome:
        return Outcome.UNKNOWN

    async def drained(self) -> None:
        await self._closed.wait()
        raise TransferFailed("the receiver was closed")


async def test_an_instance_whose_blocks_wait_for_a_lost_sender_ends_without_an_error_that_nobody_heard(
    model_folder, prompt, monkeypatch, caplog
):
    async with serving(config(model_folder("qwen3"), role="decode")) as (instance, client):
        await instance.wait_ready()
        closed, close = asyncio.Event(), present(instance.transfers).close

        async def post_receive(transfer_id: str, block_ids: list[int], sender: str) -> LostSender:
            return LostSender(closed)

        async def close_later() -> None:
            closed.set()
            await close()

        monkeypatch.setattr(instance.transfers, "post_receive", post_receive)
        monkeypatch.setattr(instance.transfers, "close", close_later)
        async with client.stream(DECODE, DecodeRequest("r", "t", prompt(20), SamplingParams(0, 4))) as events:
            await anext(events)
        async with asyncio.timeout(DEADLINE_S):
            while not (await client.call(STATS, Empty(), timeout_s=DEADLINE_S)).quarantined_blocks:
                await asyncio.sleep(0.01)
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


class LostPeer(LostSender):
    """A send of the last block, or a receive, that had to be given up while its peer was frozen."""

    num_blocks = 1

    def push(self, block_ids: Any, first: int, ready: Any) -> None:
        pass

    async def commit(self, payload: bytes) -> TransferResult:
        return TransferResult(Outcome.UNKNOWN, error="the peer is frozen")

    async def wait(self) -> TransferResult:
        return TransferResult(Outcome.UNKNOWN, error="the peer is frozen")

    async def drained(self) -> None:
        await self._closed.wait()


async def counts(client: RpcClient) -> tuple[int, int, int]:
    stats = await client.call(STATS, Empty(), timeout_s=DEADLINE_S)
    return stats.active_requests, stats.quarantined_blocks, stats.free_blocks


@pytest.fixture
def leave_frozen_peer(prompt, monkeypatch):
    """Begins a request whose peer is frozen until the event that is returned, and leaves."""

    async def leave(instance: GpuInstance, client: RpcClient) -> asyncio.Event:
        role, has_ended = instance.config.role, asyncio.Event()

        async def begin(*_: Any) -> LostPeer:
            return LostPeer(has_ended)

        monkeypatch.setattr(instance.transfers, "open_send" if role == "prefill" else "post_receive", begin)
        what: Any = (DECODE, DecodeRequest("r", "t", prompt(20), SamplingParams(0, 4)))
        if role == "prefill":
            what = (PREFILL, PrefillRequest("r", "t", prompt(20), SamplingParams(0, 4), b"grant"))
        async with client.stream(*what, timeout_s=DEADLINE_S) as events:
            await anext(events)
        async with asyncio.timeout(DEADLINE_S):
            while (await counts(client))[:2] == (1, 0):
                await asyncio.sleep(0.01)
        return has_ended

    return leave


@pytest.mark.parametrize(("role", "num_quarantined"), [("prefill", 1), ("decode", 2)])
async def test_blocks_that_a_frozen_peer_may_touch_come_back_once_it_has_ended_and_the_others_at_once(
    model_folder, prompt, leave_frozen_peer, role, num_quarantined
):
    async with serving(config(model_folder("qwen3"), role=role)) as (instance, client):
        await instance.wait_ready()
        has_ended = await leave_frozen_peer(instance, client)
        assert await counts(client) == (1, num_quarantined, 50 - num_quarantined)
        await generate(client, "other", prompt(40))
        assert (await counts(client))[1] == num_quarantined
        has_ended.set()
        await _until_empty(client)
        assert (await counts(client))[1] == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_instance_does_not_wait_for_a_frozen_peer_when_it_is_stopped(
    model_folder, leave_frozen_peer, monkeypatch, role
):
    monkeypatch.setattr("hbserve_core.instance.gpu_instance.END_TIMEOUT_S", 0.01)
    async with serving(config(model_folder("qwen3"), role=role)) as (instance, client):
        await instance.wait_ready()
        await leave_frozen_peer(instance, client)
        async with asyncio.timeout(DEADLINE_S / 2):
            await instance.stop()


async def test_a_model_that_is_not_there_is_told_by_describe_and_to_every_request(tmp_path, prompt):
    async with serving(config(tmp_path / "nothing")) as (instance, client):
        with pytest.raises(InstanceFailed, match=r"ModelFilesMissing: .*nothing"):
            await instance.wait_ready()
        info = await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
        assert info.status == "failed"
        assert info.error == await instance.wait_failed()
        with pytest.raises(RemoteError, match="hybrid-0 failed: ModelFilesMissing"):
            await generate(client, "r", prompt(3))


async def test_an_address_in_use_is_told_at_once(model_folder):
    # Known elsewhere: vLLM #25059, #20965.
    async with serving(config(model_folder("qwen3"))) as (instance, _):
        port = int(instance.address.rpartition(":")[2])
        second = GpuInstance(config(model_folder("qwen3"), port=port))
        with pytest.raises(AddressInUse, match=f"127.0.0.1:{port} is in use"):
            await second.start()
        await second.stop()


@pytest.mark.parametrize("role", ["hybrid", "decode"])
async def test_a_step_that_fails_ends_every_request_with_its_error(role, model_folder, prompt):
    """A decode request that waits for its KV is not computed, and must hear of it too."""
    async with serving(config(model_folder("qwen3"), role=role)) as (instance, client):
        await instance.wait_ready()
        events: AsyncIterator[Any]
        if role == "hybrid":
            request = GenerateRequest("r", prompt(3), SamplingParams(0, 400, ignore_eos=True))
            events = client.stream(GENERATE, request, timeout_s=DEADLINE_S)
        else:
            events = client.stream(DECODE, DecodeRequest("r", "t", prompt(3), SamplingParams(0)), timeout_s=DEADLINE_S)
        await anext(events)

        def fail(batch: Any) -> Any:
            raise ArithmeticError("the card fell out")

        present(instance.runner).launch = fail  # type: ignore[method-assign]
        with contextlib.suppress(EngineStopped):
            await instance._thread.call(lambda engine: engine.add("other", prompt(3), SamplingParams(0)))
        with pytest.raises(RemoteError, match="hybrid-0 failed: ArithmeticError: the card fell out"):
            async for _ in events:
                pass
        assert instance.status == "failed"
        info = await client.call(DESCRIBE, Empty(), timeout_s=DEADLINE_S)
        assert "the card fell out" in info.error


async def test_a_call_to_an_engine_that_has_failed_or_was_stopped_fails_at_once(model_folder):
    def broken() -> Any:
        raise ValueError("no such model")

    failures: list[Exception] = []
    thread = EngineThread(broken, on_events=print, on_failure=failures.append)
    with pytest.raises(ValueError, match="no such model"):
        await thread.start()
    with pytest.raises(EngineStopped, match="no such model"):
        await thread.call(lambda engine: engine.stats())
    await thread.stop()
    with pytest.raises(EngineStopped):
        await thread.call(lambda engine: engine.stats())
    await thread.stop()


class PanicException(BaseException):
    """What a library in Rust raises when it panics; it is no `Exception` there either."""


async def test_a_panic_of_a_library_ends_the_call_and_in_a_step_the_engine(model_folder, prompt):
    def panic(*_: Any) -> Any:
        raise PanicException("index out of bounds")

    made = EngineThread(panic, on_events=print, on_failure=print)
    with pytest.raises(RuntimeError, match="PanicException: index out of bounds"):
        await made.start()
    await made.stop()
    async with serving(config(model_folder("qwen3"))) as (instance, client):
        await instance.wait_ready()
        with pytest.raises(RuntimeError, match="PanicException: index out of bounds"):
            await instance._thread.call(panic)
        await generate(client, "before", prompt(5))
        present(instance.runner).launch = panic  # type: ignore[assignment, method-assign]
        with pytest.raises(RemoteError, match="PanicException: index out of bounds"):
            await generate(client, "after", prompt(5))
        assert instance.status == "failed"


async def test_an_idle_engine_uses_no_processor_time(model_folder, prompt):
    # Known elsewhere: vLLM #41180.
    async with serving(config(model_folder("qwen3"))) as (instance, client):
        await instance.wait_ready()
        await generate(client, "r", prompt(40))
        steps = 0
        engine = present(instance.engine)
        step = engine.step

        def count() -> Any:
            nonlocal steps
            steps += 1
            return step()

        engine.step = count  # type: ignore[method-assign]
        await instance._thread.call(lambda engine: None)
        await instance._thread.call(lambda engine: None)
        assert steps <= 4, "the engine steps when it is told something, and otherwise sleeps"


async def test_a_client_that_leaves_gives_its_blocks_back_and_the_same_id_may_come_again(
    model_folder, prompt, greedy_tokens
):
    async with serving(config(model_folder("qwen3"))) as (instance, client):
        await instance.wait_ready()
        for salt in range(5):
            request = GenerateRequest("r", prompt(20, salt=salt), SamplingParams(0, 400, ignore_eos=True))
            async with client.stream(GENERATE, request, timeout_s=DEADLINE_S) as events:
                assert (await anext(events)).token_ids[:1] == greedy_tokens("qwen3", prompt(20, salt=salt), 1)
            await _until_empty(client)
        stats = await client.call(STATS, Empty(), timeout_s=DEADLINE_S)
        assert stats.total_requests == 5
        assert stats.cached_blocks >= 5, "the full block of each prompt, and what was answered until its client left"
        assert present(stats.iteration_tokens).total >= 5 * 20
        assert stats.loop_lag is not None


async def test_requests_side_by_side_get_their_own_tokens(model_folder, prompt, greedy_tokens):
    async with serving(config(model_folder("qwen3"))) as (instance, client):
        await instance.wait_ready()
        results = await asyncio.gather(
            *(generate(client, str(i), prompt(5 + i, salt=i), max_tokens=12, ignore_eos=True) for i in range(8))
        )
        assert results == [greedy_tokens("qwen3", prompt(5 + i, salt=i), 12) for i in range(8)]
        await _until_empty(client)


@pytest.mark.parametrize("num_output", [0, 3])
async def test_a_request_without_numbers_has_its_tokens_and_then_an_error_and_the_others_go_on(
    broken_model, greedy_tokens, num_output
):
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(num_output)
    async with serving(config(model.folder)) as (instance, client):
        await instance.wait_ready()
        delivered = []

        async def broken() -> None:
            request = GenerateRequest("broken", model.prompt, SamplingParams(0, 8, ignore_eos=True))
            async for event in client.stream(GENERATE, request, timeout_s=DEADLINE_S):
                delivered.extend(event.token_ids)

        sound = (generate(client, name, ids, max_tokens=8, ignore_eos=True) for name, ids in model.sound.items())
        error, *others = await asyncio.gather(broken(), *sound, return_exceptions=True)
        assert isinstance(error, LogitsNotFinite)
        assert f"not finite at output token {num_output}: " in str(error)
        assert delivered == model.output
        assert others == [greedy_tokens(model.whole, ids, 8) for ids in model.sound.values()]
        await _until_empty(client)
        assert instance.status == "ready"


async def _until_empty(client: RpcClient) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            stats = await client.call(STATS, Empty(), timeout_s=DEADLINE_S)
            if stats.active_requests == 0 and stats.free_blocks == stats.num_blocks:
                return
            await asyncio.sleep(0.01)


async def test_an_instance_says_unasked_what_has_changed_and_to_each_client_what_others_gave_it(
    model_folder, prompt, monkeypatch
):
    may_load = threading.Event()
    make_engine = GpuInstance._make_engine
    monkeypatch.setattr(GpuInstance, "_make_engine", lambda self: may_load.wait(DEADLINE_S) and make_engine(self))
    async with (
        serving(config(model_folder("qwen3"))) as (instance, client),
        RpcClient(instance.address) as other,
        client.stream(REPORTS, ReportsRequest(3600), timeout_s=DEADLINE_S) as told_at_once,
        client.stream(REPORTS, ReportsRequest(0.01), timeout_s=DEADLINE_S) as own,
        other.stream(REPORTS, ReportsRequest(0.01), timeout_s=DEADLINE_S) as foreign,
    ):
        assert of_type(InstanceInfo, await anext(told_at_once)).status == "starting"
        assert of_type(InstanceReport, await anext(told_at_once)).stats.status == "starting"
        may_load.set()
        info, report = await anext(told_at_once), await anext(told_at_once)
        assert isinstance(info, InstanceInfo)
        assert isinstance(report, InstanceReport)
        assert (info.status, info.num_blocks, report.stats.free_blocks) == ("ready", 50, 50)

        async def reported(reports: Any, requests: int, others: tuple[int, int]) -> None:
            async for each in reports:
                if isinstance(each, InstanceInfo) or each.stats.active_requests != requests:
                    continue
                if (each.other_requests, each.other_tokens) == others:
                    return

        request = GenerateRequest("r", prompt(20), SamplingParams(0, 400, ignore_eos=True, n=2))
        async with client.stream(GENERATE, request, timeout_s=DEADLINE_S) as events:
            await anext(events)
            await reported(own, 1, (0, 0))
            await reported(foreign, 1, (2, 20))
        await reported(own, 0, (0, 0))
        await reported(foreign, 0, (0, 0))


async def test_an_instance_that_fails_says_so_at_once(model_folder):
    async with serving(config(model_folder("qwen3"))) as (instance, client):
        await instance.wait_ready()
        async with client.stream(REPORTS, ReportsRequest(3600), timeout_s=DEADLINE_S / 2) as reports:
            await anext(reports)
            await anext(reports)
            instance._thread.fail(ArithmeticError("the card fell out"))
            assert of_type(InstanceInfo, await anext(reports)).status == "failed"


async def test_an_instance_of_which_nothing_changes_says_nothing(model_folder, monkeypatch):
    async with serving(config(model_folder("qwen3"))) as (instance, client):
        await instance.wait_ready()
        looks = itertools.count(1)
        last, stats = 0, instance.reports.stats

        async def counted(request: Empty) -> Any:
            nonlocal last
            last = next(looks)
            return await stats(request)

        monkeypatch.setattr(instance.reports, "stats", counted)
        async with client.stream(REPORTS, ReportsRequest(0.01), timeout_s=DEADLINE_S) as reports:
            said = [await anext(reports), await anext(reports)]
            assert of_type(InstanceReport, said[1]).stats == await stats(Empty())
            more = asyncio.create_task(anext(reports))
            async with asyncio.timeout(DEADLINE_S):
                while last < 10:
                    await asyncio.sleep(0.001)
            assert not more.done()
            more.cancel()
            await asyncio.gather(more, return_exceptions=True)


async def test_a_prefill_instance_takes_no_more_prompts_than_its_pool_holds_and_any_when_it_has_none(
    model_folder, prompt
):
    async with serving(config(model_folder("qwen3"), role="prefill", num_blocks=8)) as (instance, client):
        await instance.wait_ready()

        def prefill(name: str, length: int) -> Any:
            request = PrefillRequest(name, name, prompt(length), SamplingParams(0, 2), grant_follows=True)
            return client.stream(PREFILL, request, timeout_s=DEADLINE_S)

        async def refused(name: str, length: int) -> None:
            with pytest.raises(Overloaded, match=r"hybrid-0 has prompts of 100 tokens, and takes 128 at a time"):
                await anext(prefill(name, length))

        async with prefill("large", 100) as large:
            waiting = asyncio.create_task(anext(large))
            async with asyncio.timeout(DEADLINE_S):
                while instance.num_active < 1:
                    await asyncio.sleep(0.001)
            await refused("too much", 29)
            assert instance.num_active == 1
        waiting.cancel()
        async with asyncio.timeout(DEADLINE_S):
            while instance.num_active:
                await asyncio.sleep(0.001)
        request = PrefillRequest("now", "now", prompt(29), SamplingParams(0, 1))
        async with client.stream(PREFILL, request, timeout_s=DEADLINE_S) as events:
            assert len(of_type(TokenEvent, await anext(events)).token_ids) == 1
