"""The scheduler in a loop whose time jumps: the very same code, and no real time passes."""

import asyncio
import time
from typing import Any, ClassVar

import pytest
from hbserve_modelled_reports import Reports

from hbserve_rpc import PeerDied, PeerLost, RemoteError, RequestTimeout, SamplingParams, Unavailable
from hbserve_rpc.messages import Empty, GenerateRequest, Granted, InstanceInfo, Role, TokenEvent
from hbserve_rpc.reports import REPORTS
from hbserve_scheduler import CpuScheduler, NotReady, RequestFailed, SchedulerConfig
from hbserve_scheduler.instance_client import InstanceStream
from hbserve_scheduler.virtual_time import VirtualTimeLoop

STEP_S = 10.0
"""Of a modelled instance: as long as some tests may take altogether."""


class ModelledHybrid:
    """In place of an RpcClient: a hybrid instance, which answers every 10 s of the loop's time."""

    problem = ""
    is_dead = False
    role: Role = "hybrid"

    def __init__(self, address: str, **_: object) -> None:
        self.instance_id = address.partition(":")[0]
        self.on_lost: Any = None
        self.on_doubt: Any = None

    async def start(self) -> None: ...

    async def close(self, why: str = "", *, error: type[Exception] = PeerDied) -> None: ...

    def notify(self, method: Any, request: Any) -> None: ...

    def stream(self, method: Any, request: Any) -> "Answer | ReportsOf":
        return ReportsOf(self) if method is REPORTS else Answer(request.params.max_tokens)


class DeadHybrid(ModelledHybrid):
    is_dead = True


class ReportsOf(Reports):
    """A dead one is silent."""

    def __init__(self, instance: ModelledHybrid) -> None:
        name, role = instance.instance_id, instance.role
        super().__init__(InstanceInfo(name, role, name, "ready", max_prompt_len=1000, vocab_size=1000))
        self.instance = instance

    async def __anext__(self) -> Any:
        if self.instance.is_dead:
            await asyncio.sleep(STEP_S)
            raise PeerLost("it was silent")
        return await super().__anext__()


class Answer(InstanceStream[TokenEvent]):
    def __init__(self, num_tokens: int) -> None:
        self.left = list(range(num_tokens))[::-1]

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def __anext__(self) -> TokenEvent:
        if not self.left:
            raise StopAsyncIteration
        await asyncio.sleep(STEP_S)
        index = self.left.pop()
        return TokenEvent(index, [100 + index], None if self.left else "length")


def in_virtual_time(job: Any) -> Any:
    began_s = time.process_time()
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        result = runner.run(job)
    assert time.process_time() - began_s < STEP_S, "the time of the loop has passed in this process"
    return result


async def started(client_factory: Any, **settings: Any) -> CpuScheduler:
    scheduler = CpuScheduler(SchedulerConfig(**settings), client_factory=client_factory)
    await scheduler.add_instance("h0", "hybrid", "h0:1")
    await scheduler.start()
    return scheduler


def test_the_times_of_a_request_are_of_the_loop():
    async def job() -> Any:
        scheduler = await started(ModelledHybrid)
        await scheduler.wait_ready(60)
        await asyncio.sleep(500)
        events = scheduler.submit(GenerateRequest("r", (1, 2), SamplingParams(0, 3)))
        end = [event async for event in events][-1]
        await scheduler.stop()
        return end

    end = in_virtual_time(job())
    times = end.queue_time_s, end.ttft_s, end.tpot_s, end.handoff_s, end.e2e_s
    assert times == pytest.approx((0, 10, 10, 10, 30), abs=1e-9)


@pytest.mark.parametrize("allowed_s", [15.0, 100_000.0])
def test_a_request_fails_when_its_time_is_over_by_the_loop(allowed_s):
    async def job() -> float:
        scheduler = await started(ModelledHybrid, request_timeout_s=allowed_s)
        await scheduler.wait_ready(60)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with pytest.raises(RequestTimeout, match="not finished within"):
            async for _ in scheduler.submit(GenerateRequest("r", (1,), SamplingParams(0, 20_000))):
                pass
        await scheduler.stop()
        return loop.time() - began_s

    assert in_virtual_time(job()) == pytest.approx(allowed_s)


def test_waits_for_instances_end_by_the_loop():
    async def job() -> None:
        scheduler = await started(DeadHybrid, instance_wait_s=3600)
        loop = asyncio.get_running_loop()
        with pytest.raises(NotReady, match="not ready within 7200 s"):
            await scheduler.wait_ready(7200)
        assert 7200 <= loop.time() < 7201
        with pytest.raises(Unavailable, match="no instances for 3600 s"):
            await anext(scheduler.submit(GenerateRequest("r", (1,), SamplingParams(0, 2))))
        assert 10_800 <= loop.time() < 10_802
        await scheduler.stop()

    in_virtual_time(job())


class ModelledLeg(ModelledHybrid):
    """A prefill or decode instance. The first token comes, and then one of them fails and the other is silent."""

    failing = ""
    closed_s: ClassVar[dict[str, float]] = {}

    def __init__(self, address: str, **more: object) -> None:
        super().__init__(address, **more)
        self.role = "prefill" if self.instance_id == "p0" else "decode"

    async def call(self, method: Any, request: Any, *, timeout_s: float) -> Empty:
        return Empty()

    def stream(self, method: Any, request: Any) -> Any:
        return ReportsOf(self) if method is REPORTS else LegEvents(self)


class LegEvents(ReportsOf):
    """Of a request; says when it was closed."""

    async def __aexit__(self, *_: object) -> None:
        ModelledLeg.closed_s[self.instance.instance_id] = asyncio.get_running_loop().time()

    async def __anext__(self) -> Any:
        if not self.has_said:
            self.has_said = True
            return TokenEvent(0, [100]) if self.instance.role == "prefill" else Granted(b"grant")
        await asyncio.sleep(STEP_S if self.instance.instance_id == ModelledLeg.failing else 1e6)
        raise RemoteError("out of luck")


@pytest.mark.parametrize("failing", ["p0", "d0"])
def test_when_one_leg_fails_the_other_is_cancelled_within_a_tenth_of_a_second(failing):
    async def job() -> float:
        ModelledLeg.failing = failing
        scheduler = CpuScheduler(SchedulerConfig(max_attempts=1), client_factory=ModelledLeg)  # type: ignore[arg-type]
        await scheduler.add_instance("p0", "prefill", "p0:1")
        await scheduler.add_instance("d0", "decode", "d0:1")
        await scheduler.start()
        await scheduler.wait_ready(60)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(RequestFailed, match=f"{failing}: out of luck"):
            async for _ in scheduler.submit(GenerateRequest("r", (1,), SamplingParams(0, 5))):
                pass
        await scheduler.stop()
        other = "d0" if failing == "p0" else "p0"
        return ModelledLeg.closed_s[other] - began_s - STEP_S

    assert 0 <= in_virtual_time(job()) < 0.1


def test_a_wait_that_nothing_can_end_is_an_error_and_no_standstill():
    with pytest.raises(RuntimeError, match="nothing is left that could happen"):
        in_virtual_time(asyncio.Event().wait())


def test_callbacks_come_by_time_and_then_in_the_order_in_which_they_were_asked_for():
    async def job() -> list[tuple[str, float]]:
        loop, ran = asyncio.get_running_loop(), []

        def note(name: str) -> None:
            ran.append((name, loop.time()))

        loop.call_later(2, note, "late")
        loop.call_at(1, note, "first")
        loop.call_at(1, note, "second")
        loop.call_at(1, note, "never").cancel()
        loop.call_at(-5, note, "past")
        loop.call_soon(note, "soon")
        await asyncio.sleep(3)
        return ran

    assert in_virtual_time(job()) == [("past", 0), ("soon", 0), ("first", 1), ("second", 1), ("late", 2)]


def test_a_callback_that_fails_is_told_and_stops_no_other():
    async def job() -> tuple[list[Any], bool]:
        loop, told, others = asyncio.get_running_loop(), [], asyncio.Event()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        loop.call_later(1, [].pop)
        loop.call_later(1, others.set)
        await asyncio.sleep(2)
        return told, others.is_set()

    told, went_on = in_virtual_time(job())
    assert [type(each) for each in told] == [IndexError]
    assert went_on
