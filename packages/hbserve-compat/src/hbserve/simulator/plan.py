"""A plan: how many instances of each role a load needs, and whether prefill and decode should be separate at all. It is
found by simulating the layouts that might be enough."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from hbserve.load.report import percentile
from hbserve.simulator.engine_limits import Checked, EngineLimits
from hbserve.simulator.profile import Profile, StepLaw
from hbserve.simulator.report import attained, busy_of, gap_percentile
from hbserve.simulator.simulation import Deployment, roles_of, simulate
from hbserve.simulator.workload import poisson
from hbserve_rpc import InvalidRequest
from hbserve_rpc.messages import Role
from hbserve_rpc.settings import NOT_NEGATIVE, POSITIVE, Bounds

SIMULATED_S, LIVES = 20.0, 4
"""Shortest simulated time in seconds, and in multiples of a request's duration."""
FEWEST_REQUESTS, MOST_REQUESTS = 400, 6000
LONGEST_S, ALONE = 14400.0, 20
"""Longest simulated time, and fewest requests, of rare requests. If FEWEST_REQUESTS would take more than LONGEST_S
seconds, fewer are simulated, but at least ALONE: each of them is served alone, and they are all alike."""
MOST_TOTALS = 6
"""How many different totals of instances are tried, beginning with the smallest that might be enough."""
GOAL_S = Bounds(1e-4)
"""Bounds of a goal for a time, in seconds; the command has the same in milliseconds."""
MOST_BUSY = 0.97
"""A prefill instance that computes for a larger part of the time than this falls further and further behind."""


@dataclass(frozen=True)
class Question(Checked):
    """A load, and the goals for its requests. Times are in seconds."""

    profile: Profile
    input_len: Annotated[int, POSITIVE]
    output_len: Annotated[int, POSITIVE]
    rate: Annotated[float, Bounds(0.001)]
    ttft_s: Annotated[float, GOAL_S]
    tpot_s: Annotated[float, GOAL_S]
    itl_s: Annotated[float | None, GOAL_S] = None
    """Goal for the 99th percentile of times between tokens."""
    attainment: Annotated[float, Bounds(0.01, 1.0)] = 0.9
    """Share of requests that must meet both `ttft_s` and `tpot_s`."""
    spread: Annotated[float, Bounds(0.0, 3.0)] = 0.0
    """Spread of the lengths: the standard deviation of their logarithm."""
    chunk_size: Annotated[int | None, POSITIVE] = None
    """Most prompt tokens of one request in a step. None: the default of each role."""
    most_instances: Annotated[int, POSITIVE] = 64
    seed: int = 0


@dataclass(frozen=True)
class Layout(Checked):
    """How many instances there are of each role, and their settings."""

    prefill: Annotated[int, NOT_NEGATIVE] = 0
    decode: Annotated[int, NOT_NEGATIVE] = 0
    hybrid: Annotated[int, NOT_NEGATIVE] = 0
    limits: EngineLimits = EngineLimits()  # noqa: RUF009  frozen

    @property
    def count(self) -> int:
        return self.prefill + self.decode + self.hybrid

    def roles(self) -> tuple[Role, ...]:
        return roles_of(self.prefill, self.decode, self.hybrid)

    def describe(self) -> str:
        if not self.hybrid:
            return f"{self.prefill} prefill + {self.decode} decode"
        chunk = f", chunks for {self.limits.itl_target_ms:g} ms" if self.limits.itl_target_ms else ""
        return f"{self.hybrid} hybrid{chunk}"


@dataclass(frozen=True)
class Trial:
    """The result of simulating a layout at a rate."""

    layout: Layout
    rate: float
    attainment: float
    ttft_p90_s: float
    tpot_p90_s: float
    itl_p99_s: float
    busy: dict[str, float]
    is_enough: bool


@dataclass(frozen=True)
class Plan:
    """The answer to a question, and all layouts that were tried."""

    question: Question
    trials: list[Trial]
    apart: Trial | None
    """The smallest layout with separate prefill and decode instances that is enough; None if none that was tried is."""
    together: Trial | None
    """The smallest layout of hybrid instances that is enough; None if none that was tried is."""

    @property
    def best(self) -> Trial | None:
        """The layout with fewer instances; if both have as many, the one with which more requests meet their goals."""
        found = [each for each in (self.apart, self.together) if each is not None]
        return min(found, key=lambda each: (each.layout.count, -each.attainment), default=None)


def make_plan(question: Question) -> Plan:
    """Find the smallest layouts that are enough. Raises InvalidRequest if no number of instances can meet a goal, which
    the message names."""
    require_possible(question)
    trials: list[Trial] = []
    apart = _fewest(question, _apart(question), trials)
    together = _fewest(question, _hybrids(question), trials)
    return Plan(question, trials, apart, together)


def require_possible(question: Question) -> None:
    """Check that some layout may be enough. Raises InvalidRequest if one request alone takes longer than a goal, or if
    the prompts alone keep more instances busy than are allowed."""
    law, context = StepLaw(question.profile), question.input_len + question.output_len
    if context > question.profile.kv_tokens:
        raise InvalidRequest(f"--input-len: {context} tokens; the profile's pool has {question.profile.kv_tokens}")
    alone_s = law.step_s(question.input_len, question.input_len**2 / 2, 0)
    if alone_s > question.ttft_s:
        raise InvalidRequest(
            f"--ttft-ms={1e3 * question.ttft_s:g}: a prompt of {question.input_len} tokens alone takes "
            f"{1e3 * alone_s:.0f} ms on {question.profile.device}"
        )
    step_s = law.decode_steps_s(1, 1, question.input_len)
    for option, goal_s in ("--tpot-ms", question.tpot_s), ("--itl-ms", question.itl_s):
        if question.output_len > 1 and goal_s is not None and step_s > goal_s:
            raise InvalidRequest(
                f"{option}={1e3 * goal_s:g}: a decode step of one sequence takes {1e3 * step_s:.1f} ms "
                f"on {question.profile.device}"
            )
    fewest = min(_fewest_prefills(question) + 1, _fewest_hybrids(question))
    if fewest > question.most_instances:
        raise InvalidRequest(
            f"--most-instances={question.most_instances}: the prompts of {question.rate:g} requests a second alone "
            f"keep {fewest} instances busy"
        )


def _fewest(question: Question, totals: Iterator[list[Layout]], trials: list[Trial]) -> Trial | None:
    """Return, among the layouts with the smallest total of instances that is enough, the one with which most requests
    meet their goals. None: no total is enough."""
    for layouts in totals:
        found = [try_layout(question, layout, question.rate) for layout in layouts]
        trials += found
        enough = [each for each in found if each.is_enough]
        if enough:
            return max(enough, key=lambda each: each.attainment)
    return None


def _apart(question: Question) -> Iterator[list[Layout]]:
    limits = EngineLimits(chunk_size=question.chunk_size)
    prefill, decode = _fewest_prefills(question), _fewest_decodes(question)
    for total in range(prefill + decode, min(prefill + decode + MOST_TOTALS, question.most_instances + 1)):
        yield [Layout(each, total - each, limits=limits) for each in range(prefill, total - decode + 1)]


def _hybrids(question: Question) -> Iterator[list[Layout]]:
    least = _fewest_hybrids(question)
    step_ms = 1e3 * (question.itl_s or question.tpot_s)
    settings = [EngineLimits(chunk_size=question.chunk_size), EngineLimits(chunk_size="auto", itl_target_ms=step_ms)]
    for total in range(least, min(least + MOST_TOTALS, question.most_instances + 1)):
        yield [Layout(hybrid=total, limits=limits) for limits in settings]


def _prompt_s(question: Question) -> float:
    """Return the seconds that a prompt takes on an instance that computes prompts one after the other."""
    return StepLaw(question.profile).step_s(question.input_len, question.input_len**2 / 2, 0)


def _fewest_prefills(question: Question) -> int:
    return max(1, math.ceil(question.rate * _prompt_s(question)))


def _fewest_decodes(question: Question) -> int:
    """Return the fewest decode instances whose steps, each with its share of all sequences, meet the goal, and whose
    pools have room for the KV."""
    law, context = StepLaw(question.profile), question.input_len + question.output_len / 2
    for count in range(1, question.most_instances):
        step_s = law.decode_steps_s(1, 1, round(context))
        for _ in range(50):  # the longer steps take, the more sequences there are at a time
            batch = max(1, round(question.rate / count * question.output_len * step_s))
            if batch > EngineLimits.max_num_seqs or batch * context > question.profile.kv_tokens:
                step_s = math.inf
                break
            step_s = law.decode_steps_s(1, batch, round(batch * context))
            if step_s > question.tpot_s:
                break
        if step_s <= question.tpot_s:
            return count
    return question.most_instances


def _fewest_hybrids(question: Question) -> int:
    """Return the fewest hybrid instances, by operations alone: decodes beside prompts cost attention, and one row in
    the products of each step."""
    law, context = StepLaw(question.profile), question.input_len + question.output_len / 2
    decode_s = question.output_len * law.key_s * context
    return max(1, math.ceil(question.rate * (_prompt_s(question) + decode_s)))


def try_layout(question: Question, layout: Layout, rate: float) -> Trial:
    """Simulate a layout at a rate."""
    life_s = question.ttft_s + question.output_len * question.tpot_s
    count = round(rate * max(SIMULATED_S, LIVES * life_s))
    count = min(MOST_REQUESTS, max(count, min(FEWEST_REQUESTS, max(ALONE, round(rate * LONGEST_S)))))
    lengths = question.input_len, question.output_len
    requests = poisson(count, rate, *lengths, spread=question.spread, seed=question.seed)
    results = simulate(Deployment(question.profile, layout.roles(), limits=layout.limits), requests)
    share = attained(results, {"ttft": question.ttft_s, "tpot": question.tpot_s})
    itl_s = gap_percentile(results, 99)
    keeps_itl = question.itl_s is None or itl_s <= question.itl_s
    (found,) = results
    ttft_s, tpot_s = percentile(found.ttfts_s, 90), percentile(found.tpots_s, 90)
    busy: dict[str, float] = {role: busy_of(results, role) for role in sorted(set(layout.roles()), reverse=True)}
    # A decode instance steps whenever it has a sequence; a prefill instance that never rests falls behind.
    is_stable = busy.get("prefill", 0.0) <= MOST_BUSY
    is_enough = share >= question.attainment and keeps_itl and is_stable
    return Trial(layout, rate, share, ttft_s, tpot_s, itl_s, busy, is_enough)


def over_rates(plan: Plan, trial: Trial, shares: tuple[float, ...]) -> list[Trial]:
    """Simulate the layout of a trial at these multiples of the question's rate."""
    return [try_layout(plan.question, trial.layout, share * plan.question.rate) for share in shares]
