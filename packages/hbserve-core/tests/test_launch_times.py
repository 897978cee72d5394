"""When steps are launched, and who is in them: an engine's thread on a simulated device, whose clock nobody waits for.

Commands come at set times of that clock; the thread's loop is run here, in the test's own thread.
"""

import asyncio
import itertools
import queue
import random
from types import SimpleNamespace
from typing import Any

import pytest

from hbserve_core import Engine, InstanceConfig
from hbserve_core.bench.simulated_device import H100_8B, SimulatedDevice
from hbserve_core.engine.step import Reservation
from hbserve_core.engine.step_times import LATE_FROM_S, POLL_S, StepTimes, StepWork
from hbserve_core.instance.engine_thread import EngineThread
from hbserve_rpc import SamplingParams

HOST_S = 0.0005
WARM_UP = 40
"""Steps after which predictions are relied on."""


class Simulation:
    """Stands for the queue of commands, the event loop and the clock of one EngineThread."""

    def __init__(self, time_s: Any = H100_8B, host_time_s: Any = lambda: HOST_S, **settings: Any) -> None:
        model: Any = SimpleNamespace(vocab_size=50, max_model_len=1 << 20, reach=0, eos_token_ids=(0,))
        self.device = SimulatedDevice(model, 20_000, time_s, host_time_s)
        config = InstanceConfig(model_path="", prefix_caching=False, **({"max_num_batched_tokens": 8192} | settings))
        self.engine = Engine(config, self.device, self.device.clock)
        self._commands: list[tuple[float, int, Any]] = []
        self.told: list[tuple[float, Any]] = []
        self.on_told: Any = lambda event: None
        self.calls_at = 0.0
        """When what `EngineThread.call` is given from now on comes."""
        self._thread = EngineThread(lambda: self.engine, on_events=self._tell, on_failure=self._fail)
        thread: Any = self._thread
        thread._commands = self
        thread._loop = SimpleNamespace(call_soon_threadsafe=lambda listener, *args: listener(*args))

    def _fail(self, error: Exception) -> None:
        pytest.fail(repr(error))

    def _tell(self, events: Any) -> None:
        for event in events:
            self.told.append((self.device.now, event))
            self.on_told(event)

    def put(self, command: Any) -> None:
        """As of queue.SimpleQueue."""
        self.at(self.calls_at, command)

    def at(self, time: float, command: Any) -> None:
        self._commands.append((time, len(self._commands), command))
        self._commands.sort(reverse=True)

    def get(self, block: bool, timeout: float | None) -> Any:
        """As of queue.SimpleQueue; the end comes when nothing else can."""
        until = self.device.now + ((timeout or 0.0) if block and timeout is not None else 0.0)
        if not self._commands and block and timeout is None:
            return None
        if self._commands and (self._commands[-1][0] <= until or (block and timeout is None)):
            time, _, command = self._commands.pop()
            self.device.now = max(self.device.now, time)
            return command
        self.device.now = until
        raise queue.Empty

    def run(self) -> None:
        """Until all requests have ended and no command is left."""
        self._thread._serve(self.engine)
        self.engine.check_integrity()

    def add(self, time: float, name: str, length: int, count: int, **kind: Any) -> None:
        self.at(time, lambda engine: engine.add(name, [1] * length, SamplingParams(0, count), **kind))

    def steps_of(self, name: str) -> list[int]:
        return [number for number, (_, _, tokens) in enumerate(self.device.steps) if name in tokens]

    def idle_s(self, first: int = 1, last: int | None = None) -> float:
        """Between steps of the device."""
        steps = self.device.steps[first - 1 : last]
        return sum(after[0] - before[1] for before, after in itertools.pairwise(steps))


def decoding(num_sequences: int = 8, **settings: Any) -> Simulation:
    """Sequences that decode from now on, for long, at a constant time a step."""
    simulation = Simulation(**settings)
    for i in range(num_sequences):
        simulation.add(0.0, f"old {i}", 20, 300)
    return simulation


def middle_of(simulation: Simulation, number: int, share: float) -> float:
    """A time in a step of a run that goes like this one."""
    simulation.run()
    begin, end, _ = simulation.device.steps[number]
    return begin + share * (end - begin)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_who_comes_while_a_step_is_computed_is_in_the_next_one(share):
    time = middle_of(decoding(), WARM_UP, share)
    simulation = decoding()
    simulation.add(time, "new", 1, 2)
    simulation.run()
    assert simulation.steps_of("new") == [WARM_UP + 1, WARM_UP + 2]
    assert simulation.idle_s() < 1e-9


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_a_request_whose_kv_arrives_while_a_step_is_computed_is_in_the_next_one(share):
    time = middle_of(decoding(), WARM_UP, share)
    simulation = decoding()
    simulation.at(0.0, lambda engine: engine.reserve("new", [1] * 2048, SamplingParams(0, 3)))
    simulation.at(time, lambda engine: engine.activate("new", 5))
    simulation.run()
    # To the second token: what is left of this step, and the next one.
    assert simulation.steps_of("new") == [WARM_UP + 1, WARM_UP + 2]
    second = next(
        told for told, event in simulation.told if event.request_id == "new" and not isinstance(event, Reservation)
    )
    assert second == pytest.approx(simulation.device.steps[WARM_UP + 1][1])


def test_who_comes_too_late_for_the_next_step_keeps_no_device_waiting():
    time = middle_of(decoding(), WARM_UP, 0.97)
    simulation = decoding()
    simulation.add(time, "new", 1, 2)
    simulation.run()
    assert simulation.steps_of("new") == [WARM_UP + 2, WARM_UP + 3]
    assert simulation.idle_s() < 1e-9


@pytest.mark.parametrize("pair", ["steps under 3 ms", "two ranks"])
def test_short_steps_and_several_ranks_are_followed_at_once(pair):
    settings: dict[str, Any] = {"time_s": lambda work: 0.9 * LATE_FROM_S} if pair == "steps under 3 ms" else {}
    if pair == "two ranks":
        settings["tensor_parallel_size"] = 2
    time = middle_of(decoding(**settings), WARM_UP, 0.5)
    simulation = decoding(**settings)
    simulation.add(time, "new", 1, 2)
    simulation.run()
    assert simulation.steps_of("new") == [WARM_UP + 2, WARM_UP + 3]


def test_a_reservation_is_granted_while_a_step_is_computed():
    time = middle_of(decoding(), WARM_UP, 0.3)
    simulation = decoding()
    simulation.at(time, lambda engine: engine.reserve("new", [1] * 2048, SamplingParams(0, 3)))
    simulation.run()
    ((told, reservation),) = [(t, event) for t, event in simulation.told if isinstance(event, Reservation)]
    assert (reservation.request_id, told) == ("new", pytest.approx(time))


def test_the_device_idles_less_than_a_hundredth_although_hosts_and_devices_vary():
    dice = random.Random(1)

    def time_s(work: StepWork) -> float:
        return H100_8B(work) * dice.uniform(0.98, 1.02)

    simulation = Simulation(time_s, lambda: dice.choice([0.0003, 0.0005, 0.0011]), chunk_size=512)
    arrival = 0.0
    for i in range(150):
        arrival += dice.expovariate(8)
        simulation.add(arrival, str(i), dice.randrange(200, 3000), dice.randrange(2, 130))
    # So that the device always has something to do.
    simulation.add(0.0, "long", 10, int(arrival / 0.006))
    simulation.run()
    total_s = simulation.device.steps[-1][1]
    assert len(simulation.device.steps) > 1000
    assert simulation.idle_s() < 0.01 * total_s
    stats = simulation.engine.stats()
    assert stats.num_late_steps < 0.03 * stats.num_steps
    assert simulation.idle_s() <= stats.idle_time_s + 1e-9, "it is counted"


def test_requests_join_the_next_step_with_few_exceptions_where_hosts_and_devices_vary():
    dice = random.Random(2)
    simulation = decoding(
        time_s=lambda work: H100_8B(work) * dice.uniform(0.98, 1.02),
        host_time_s=lambda: dice.choice([0.0003, 0.0005, 0.0011]),
    )
    arrivals = {f"new {i}": 0.5 + 0.0103 * i for i in range(100)}
    for name, time in arrivals.items():
        simulation.add(time, name, 1, 2)
    simulation.run()
    steps_waited = []
    for name, time in arrivals.items():
        during = next(i for i, (begin, end, _) in enumerate(simulation.device.steps) if begin <= time < end)
        steps_waited.append(simulation.steps_of(name)[0] - during)
    assert {*steps_waited} == {1, 2}
    assert steps_waited.count(1) >= 65, "of a step of 6 ms, 1.6 ms are the slack for hosts that take up to 1.1"


def test_a_step_that_is_shorter_than_predicted_is_followed_when_its_end_is_seen():
    durations = [0.010] * WARM_UP + [0.004] + [0.010] * 400
    simulation: Simulation = decoding(time_s=lambda work: durations[len(simulation.device.steps)])
    simulation.run()
    idle_s = simulation.idle_s(WARM_UP, WARM_UP + 3)
    assert 0 < idle_s <= POLL_S + HOST_S + 1e-9
    stats = simulation.engine.stats()
    assert stats.num_late_steps == 1
    assert idle_s <= stats.idle_time_s <= 2 * POLL_S + HOST_S


@pytest.mark.parametrize("step_s", [0.0025, 0.05])
def test_a_lone_prefill_instance_launches_a_prompt_that_comes_while_it_waits_for_tokens(step_s):
    simulation = Simulation(lambda work: step_s)
    for i in range(60):
        # Each comes in the last third of the step before, when that has been launched for long.
        simulation.add((0.7 + i) * step_s, str(i), 300, 8, prefill_only=True)
    simulation.on_told = lambda event: simulation.engine.release(event.request_id) if event.token_ids else None
    simulation.run()
    assert [*range(60)] == [simulation.steps_of(str(i))[0] for i in range(60)]
    assert simulation.idle_s() < 1e-9


def test_the_tokens_of_a_lone_prompt_are_told_when_they_are_there():
    simulation = Simulation(lambda work: 0.0473)
    for i in range(30):
        simulation.add(0.1 * i, str(i), 300, 8, prefill_only=True)
    simulation.on_told = lambda event: simulation.engine.release(event.request_id) if event.token_ids else None
    simulation.run()
    ends = [end for _, end, _ in simulation.device.steps]
    late = [told - end for (told, _), end in zip(simulation.told, ends, strict=True)]
    assert max(late) <= 0.00011


async def test_what_comes_to_an_idle_device_is_launched_before_anybody_hears_of_it():
    simulation = Simulation()
    thread: Any = simulation._thread
    device: Any = simulation.device
    launch, answered = device.launch, []

    def launching(batch: Any) -> Any:
        answered.append(sorted(each.done() for each in thread._pending))
        return launch(batch)

    device.launch = launching
    calls = []
    params = SamplingParams(0, 3)
    for simulation.calls_at, name in ((0.0, "first"), (0.001, "while its prompt is computed")):
        calls.append(asyncio.create_task(thread.call(lambda engine, name=name: engine.add(name, [1] * 2048, params))))
        await asyncio.sleep(0)
    simulation.run()
    # The second comes behind the launch of a second step. It is answered while that is computed.
    assert answered[:3] == [[False, False], [False, True], [True, True]]
    await asyncio.gather(*calls)


def test_the_end_of_a_step_is_predicted_from_its_bytes_and_operations():
    times, dice = StepTimes(), random.Random(3)

    def work() -> StepWork:
        decodes = dice.randrange(1, 60)
        context = dice.randrange(100, 4000)
        chunk = dice.choice([0, 0, 256, 512, 700, 1024])
        first = dice.randrange(0, 3000)
        chunks = [(None, context, 1)] * decodes + ([(None, first, chunk)] if chunk else [])
        return StepWork.of(chunks)

    assert times.predict_s(work()) is None
    for _ in range(1500):
        seen = work()
        times.learn(seen, H100_8B(seen) * dice.uniform(0.99, 1.01))
    errors = []
    for _ in range(300):
        asked = work()
        if (predicted_s := times.predict_s(asked)) is not None:
            errors.append(abs(predicted_s / H100_8B(asked) - 1))
    errors.sort()
    assert len(errors) > 250
    assert errors[len(errors) // 2] < 0.02
    assert errors[int(0.99 * len(errors))] < 0.08


def test_predictions_follow_a_device_that_becomes_slower_and_stay_sound_where_nothing_varies():
    times, same = StepTimes(), StepWork(8, 4000, 8000)
    for _ in range(100_000):
        times.learn(same, 0.006)
    assert times.predict_s(same) == pytest.approx(0.006, rel=1e-3)
    assert times.predict_s(StepWork(14, 9000, 18000)) == pytest.approx(0.006, rel=0.1)
    for _ in range(1500):
        times.learn(same, 0.008)
    assert times.predict_s(same) == pytest.approx(0.008, rel=0.05)
