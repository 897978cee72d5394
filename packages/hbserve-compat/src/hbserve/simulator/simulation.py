"""A simulation: the real CpuScheduler, in virtual time, with modelled instances, and the results of all requests.

for each request, when it comes:  CpuScheduler.submit ──▶ its own decisions ──▶ SimulatedClient ──▶ ModelledInstance
"""

import asyncio
import functools
import gc
import itertools
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from hbserve.simulator.client import Host, SimulatedClient
from hbserve.simulator.engine_limits import Checked, EngineLimits
from hbserve.simulator.instance import Fabric, ModelledInstance, Tokens
from hbserve.simulator.profile import Profile, StepLaw
from hbserve.simulator.workload import SimulatedRequest
from hbserve_rpc import HBServeRpcError, SamplingParams
from hbserve_rpc.counts import Histogram
from hbserve_rpc.messages import GenerateRequest, Role
from hbserve_rpc.prompt_shape import PromptShape
from hbserve_rpc.records import RequestRecord
from hbserve_rpc.settings import Bounds
from hbserve_scheduler import CpuScheduler, SchedulerConfig
from hbserve_scheduler.figures import Figures
from hbserve_scheduler.virtual_time import VirtualTimeLoop

READY_TIMEOUT_S = 3600.0
WARM_UP_S = 30.0
"""Virtual time before the load, in which the links of all pairs are made."""
OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Threshold of the garbage collector. Nearly all objects of a simulation are freed without it, and at Python's default
of 700 it took a quarter of the time."""


@dataclass(frozen=True)
class Fault(Checked):
    """A fault of an instance: it is killed, and started again after `down_s`, or never."""

    instance_id: str
    at_s: Annotated[float, Bounds(0.0)]
    down_s: float = float("inf")


def roles_of(prefill: int, decode: int, hybrid: int = 0) -> tuple[Role, ...]:
    """Return a role for each instance."""
    counts: dict[Role, int] = {"prefill": prefill, "decode": decode, "hybrid": hybrid}
    return tuple(role for role, count in counts.items() for _ in range(count))


@dataclass(frozen=True)
class Deployment(Checked):
    """The deployment that is simulated."""

    profile: Profile
    roles: tuple[Role, ...]
    scheduler: SchedulerConfig = SchedulerConfig()  # noqa: RUF009  frozen
    limits: EngineLimits = EngineLimits()  # noqa: RUF009  frozen
    faults: tuple[Fault, ...] = ()
    prefill_profile: Profile | None = None
    """Profile of the prefill instances, if it differs: with more ranks, for example."""

    def profile_of(self, role: Role) -> Profile:
        return (self.prefill_profile if role == "prefill" else None) or self.profile

    def instances(self) -> list[tuple[str, Role]]:
        """Return the names (prefill-0, decode-0, …) and roles of all instances."""
        counts: Counter[str] = Counter()
        named: list[tuple[str, Role]] = []
        for role in self.roles:
            named.append((f"{role}-{counts[role]}", role))
            counts[role] += 1
        return named


@dataclass(repr=False)  # asyncio's runner prints the task that has them, which would print millions of numbers
class Results:
    """The results of the requests, in the order in which they ended. Times are in seconds."""

    duration_s: float = 0.0
    """Time from the beginning of the load until the last request has ended."""
    ttfts_s: "array[float]" = field(default_factory=lambda: array("d"))
    tpots_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Mean time per output token after the first, for each request; 0 if it has a single token."""
    e2els_s: "array[float]" = field(default_factory=lambda: array("d"))
    handoffs_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Time from the first token to the second, for each request that has a second token."""
    input_tokens: int = 0
    output_tokens: int = 0
    failed: int = 0
    tried_again: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    gaps_s: Counter[float] = field(default_factory=Counter)
    """Number of times between two tokens, by length."""
    busy: dict[str, float] = field(default_factory=dict)
    """Share of the time in which each instance computes."""
    prefix_tokens: int = 0
    asked_tokens: int = 0
    """Number of prompt tokens that were looked for in prefix caches; `prefix_tokens` counts those that were found."""
    decisions: list[tuple[float, str, str, str]] = field(default_factory=list)
    """Time, request, prefill instance and decode instance of each attempt's placement. Kept only if asked for."""


class _Unread(Histogram):
    """A histogram that counts nothing."""

    def observe_all(self, values: Iterable[float]) -> None: ...


class _Collecting(Figures):
    """Collects the results of a simulation. Replaces the scheduler's figures of requests, which are not read here."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.between_tokens = _Unread.over([])
        self._results = results
        self.left = 0
        self.ended_s = 0.0
        """Time by the loop's clock at which the last request ended. Other cells may end later."""
        self.all_ended = asyncio.Event()
        self.decisions: list[tuple[float, str, str, str]] | None = None

    def add(self, record: RequestRecord) -> None:
        results = self._results
        if self.decisions is not None:
            at_s = asyncio.get_running_loop().time() - record.e2e_s
            for each in record.attempts:
                self.decisions.append(
                    (at_s + each.began_s, record.request_id, each.prefill_instance, each.decode_instance)
                )
        if record.finish_reason is None or record.first_token_s is None:
            results.failed += 1
            results.errors[record.error.partition(":")[0]] += 1
        else:
            results.ttfts_s.append(record.first_token_s)
            results.tpots_s.append(record.tpot_s or 0.0)
            results.e2els_s.append(record.e2e_s)
            if record.handoff_s is not None:
                results.handoffs_s.append(record.handoff_s)
            results.input_tokens += record.num_prompt_tokens
            results.output_tokens += record.num_output_tokens
            results.tried_again += len(record.attempts) > 1
        self.ended_one()

    def ended_one(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.ended_s = asyncio.get_running_loop().time()
            self.all_ended.set()


class Simulation:
    """One cell, in one event loop inside which it is made and used."""

    def __init__(
        self, deployment: Deployment, instances: Sequence[tuple[str, Role]], *, keeps_decisions: bool = False
    ) -> None:
        """instances: those of the deployment that belong to this cell."""
        self.results = Results()
        self._instances = instances
        self._deployment = deployment
        self._fabric = Fabric()
        self._ids = itertools.count()
        laws = {role: StepLaw(deployment.profile_of(role)) for role in {role for _, role in instances}}
        self._hosts = {
            name: Host(functools.partial(ModelledInstance, name, role, laws[role], deployment.limits, self._fabric))
            for name, role in instances
        }
        self.scheduler = CpuScheduler(
            deployment.scheduler, client_factory=functools.partial(SimulatedClient, self._hosts)
        )
        self._figures = self.scheduler.figures = _Collecting(self.results)
        if keeps_decisions:
            self._figures.decisions = self.results.decisions

    async def start(self) -> None:
        for name, role in self._instances:
            await self.scheduler.add_instance(name, role, f"{name}:1")
        await self.scheduler.start()
        await self.scheduler.wait_ready(READY_TIMEOUT_S)
        await asyncio.sleep(WARM_UP_S)

    def submit(self, request: SimulatedRequest) -> None:
        request_id = f"r{next(self._ids)}"
        prompt, params = Tokens(request.input_len, request.shape), _params(request.output_len)
        self._figures.left += 1
        self._figures.all_ended.clear()
        try:
            shape = PromptShape(request.input_len)
            self.scheduler.submit(GenerateRequest(request_id, prompt, params, shape=shape))
        except HBServeRpcError as error:
            self.results.failed += 1
            self.results.errors[type(error).__name__] += 1
            self._figures.ended_one()

    def plan_faults(self, begin_s: float) -> None:
        loop = asyncio.get_running_loop()
        for fault in self._deployment.faults:
            host = self._hosts.get(fault.instance_id)
            if host is None:  # it is in another cell
                continue
            loop.call_at(begin_s + fault.at_s, host.kill)
            if fault.down_s != float("inf"):
                loop.call_at(begin_s + fault.at_s + fault.down_s, host.restart)

    async def finish(self, begin_s: float) -> Results:
        """Wait until all requests have ended, and add up what the instances did."""
        if self._figures.left:
            await self._figures.all_ended.wait()
        results = self.results
        results.duration_s = max(0.0, self._figures.ended_s - begin_s)
        for name, host in self._hosts.items():
            busy_s = sum(life.engine.figures.busy_s for life in host.lives)
            results.busy[name] = busy_s / results.duration_s if results.duration_s else 0.0
            for life in host.lives:
                results.gaps_s.update(life.engine.figures.gaps_s)
        results.prefix_tokens, results.asked_tokens = self._fabric.prefix_tokens, self._fabric.asked_tokens
        await self.scheduler.stop()
        return results


@functools.lru_cache(maxsize=1 << 14)
def _params(output_len: int) -> SamplingParams:
    return SamplingParams(0.0, output_len, ignore_eos=True)


def simulate(
    deployment: Deployment, requests: Iterable[SimulatedRequest], *, cells: int = 1, keeps_decisions: bool = False
) -> Sequence[Results]:
    """Simulate a deployment. Returns the results of each cell.

    Each cell is a deployment of its own, chosen by a request's session; the instances of `deployment` are those of all
    cells together. Policies draw the same random numbers in every run, so that a result that is close to a limit does
    not change from one run to the next.
    """
    chance = random.getstate()
    random.seed(0)
    gc.freeze()  # so that the collector does not look at existing objects again and again
    thresholds = gc.get_threshold()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *thresholds[1:])
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(_simulate(deployment, requests, cells, keeps_decisions))
    finally:
        random.setstate(chance)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def _simulate(
    deployment: Deployment, requests: Iterable[SimulatedRequest], cells: int, keeps_decisions: bool
) -> Sequence[Results]:
    named = deployment.instances()
    simulations = [Simulation(deployment, named[i::cells], keeps_decisions=keeps_decisions) for i in range(cells)]
    await asyncio.gather(*(each.start() for each in simulations))
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    for each in simulations:
        each.plan_faults(begin_s)
    await _submit_all(requests, simulations)
    return [await each.finish(begin_s) for each in simulations]


async def _submit_all(requests: Iterable[SimulatedRequest], simulations: Sequence[Simulation]) -> None:
    """Submit each request at its time, by a timer that sets the next timer. A sleeping task would have to be woken for
    each of a million requests."""
    loop = asyncio.get_running_loop()
    begin_s, coming, are_all_there = loop.time(), iter(requests), loop.create_future()

    def submit(request: SimulatedRequest | None) -> None:
        try:
            while request is not None and begin_s + request.at_s <= loop.time():
                simulations[cell_of(request.session, len(simulations))].submit(request)
                request = next(coming, None)
        except Exception as error:  # from the iterator that makes the requests
            are_all_there.set_exception(error)
            return
        if request is None:
            are_all_there.set_result(None)
        else:
            loop.call_at(begin_s + request.at_s, submit, request)

    submit(next(coming, None))
    await are_all_there


def cell_of(session: int, cells: int) -> int:
    """Return the cell of a session, chosen by a hash as load balancers do: a session always has the same cell."""
    return (session * 0x9E3779B97F4A7C15 & (1 << 64) - 1) * cells >> 64
