"""Whatever a caller gives: an answer or one error of ours, the others unaffected, and nothing stays."""

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve_rpc import InvalidRequest, RpcClient, SamplingParams, StreamMethod, Unavailable
from hbserve_rpc.messages import SCHEDULER_GENERATE, ClientEvent, GenerateRequest
from hbserve_scheduler import SchedulerServer

AS_SENT: Any = StreamMethod(SCHEDULER_GENERATE.name, msgspec.Struct, ClientEvent)
"""As a client of another language, or of another version, may call it."""

SIMPLE = st.none() | st.booleans() | st.integers(-5, 1005) | st.floats() | st.text(max_size=3) | st.binary()
EXTREME = st.sampled_from([2**63, 10**5000, "half \ud83d", object(), int, [[1]], {1}, {"a": 1}, "x" * 300])
HOSTILE = SIMPLE | EXTREME | st.lists(SIMPLE | EXTREME, max_size=5) | st.lists(st.integers(0, 999))
BODIES = st.fixed_dictionaries(
    {"request_id": st.just("r") | HOSTILE, "prompt": st.just([7]) | HOSTILE, "output": st.just([]) | HOSTILE},
    optional={"params": HOSTILE},
)


async def test_whatever_is_submitted_is_answered_or_refused_and_nothing_stays(make_scheduler, pair, collect):
    # Known elsewhere: vLLM #51795, #9634.
    scheduler = await make_scheduler(*pair)
    bodies: list[dict[str, Any]] = []
    settings(derandomize=True, max_examples=150, database=None)(given(BODIES)(lambda body: bodies.append(body)))()
    refusals: list[str] = []
    for body in bodies:
        params = body.get("params", SamplingParams(max_tokens=2))
        request = GenerateRequest(body["request_id"], body["prompt"], params, body["output"])
        try:
            await collect(scheduler.submit(request))
        except InvalidRequest as error:
            refusals.append(str(error))
        with contextlib.suppress(InvalidRequest):
            assert not await scheduler.abort(body["request_id"])
    assert 50 < len(refusals) < len(bodies)
    assert max(map(len, refusals)) < 400
    await collect(scheduler.submit(GenerateRequest("fine", (7,), SamplingParams(max_tokens=2))))


async def test_what_the_caller_changes_after_submitting_changes_nothing(make_scheduler, pair, collect):
    # Known elsewhere: vLLM #2881.
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair)
    prompt, params = [7, 8], SamplingParams(max_tokens=3)
    stream = scheduler.submit(GenerateRequest("r", prompt, params))  # type: ignore[arg-type]  # a list is taken too
    prompt.append(10**9)
    params.max_tokens = -1
    pair[0].release()
    tokens, end = await collect(stream)
    assert (len(tokens), end.num_prompt_tokens) == (3, 2)


async def test_whatever_is_sent_over_rpc_is_answered_or_refused_and_nothing_stays(make_scheduler, pair, collect, until):
    scheduler = await make_scheduler(*pair)
    server = SchedulerServer(scheduler)
    await server._server.start()
    bodies: list[dict[str, Any]] = []
    wire = SIMPLE | st.lists(SIMPLE, max_size=3) | st.sampled_from([2**63, 2**64 - 1, "x" * 300])
    values = st.fixed_dictionaries(
        {"request_id": st.text() | wire, "prompt_token_ids": st.just([7]) | wire},
        optional={"params": wire | st.dictionaries(st.sampled_from(SamplingParams.__struct_fields__), wire)},
    )
    settings(derandomize=True, max_examples=100, database=None)(given(values)(lambda body: bodies.append(body)))()
    async with RpcClient(server.address) as client:
        for body in bodies:
            body.setdefault("params", {"max_tokens": 2})
            stream = client.stream(AS_SENT, msgspec.defstruct("GenerateRequest", body, tag=True)(**body))
            with contextlib.suppress(InvalidRequest):
                await collect(stream)
    await server._server.stop()


async def test_who_waits_for_room_leaves_half_of_the_queue_to_others(make_scheduler, make_instance, ask, collect):
    hybrid = await make_instance("hybrid", "h0")
    hybrid.hold = {"tokens"}
    scheduler = await make_scheduler(hybrid, max_inflight_requests=1, max_queue_size=4)
    streams = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            for number in range(9):
                await scheduler.wait_for_room()
                streams.append(scheduler.submit(ask(f"r{number}")))
    assert len(streams) == 3
    assert len(scheduler.waiting_requests) == 2
    streams.append(scheduler.submit(ask("somebody else's")))
    hybrid.release()
    await scheduler.wait_for_room()
    await asyncio.gather(*map(collect, streams))


async def test_who_waits_for_room_hears_of_the_end(make_scheduler, make_instance, ask):
    scheduler = await make_scheduler(await make_instance("hybrid", "h0"), max_queue_size=1)
    await scheduler.remove_instance("h0")
    stream = scheduler.submit(ask())
    waiting = asyncio.create_task(scheduler.wait_for_room())
    await asyncio.sleep(0)
    await scheduler.stop()
    with pytest.raises(Unavailable, match="stopped"):
        await waiting
    await stream.aclose()
