"""A plan: how many instances of each role a load needs, by simulations of what might do, and whether prefill and decode
are to be apart at all."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hbserve.load.report import percentile
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.profile import Profile, StepLaw
from hbserve.simulator.report import attained, busy_of, gap_percentile
from hbserve.simulator.simulation import Deployment, roles_of, simulate
from hbserve.simulator.workload import poisson
from hbserve_rpc import InvalidRequest
from hbserve_rpc.messages import Role

SIMULATED_S, LIVES = 20.0, 4
"""A simulation is of at least so many seconds, and of so many times as long as a request takes."""
FEWEST_REQUESTS, MOST_REQUESTS = 400, 6000
LONGEST_S, ALONE = 14400.0, 20
"""Fewer requests are enough where they come in so much time: each of them is alone, and they are all alike."""
MOST_TOTALS = 6
"""So many numbers of instances are tried, from the fewest that might do on."""
MOST_BUSY = 0.97
"""An instance that computes for more of the time has ever more to do."""


@dataclass(frozen=True)
class Question:
    """A load, and what its requests are to keep. Times are in seconds."""

    profile: Profile
    input_len: int
    output_len: int
    rate: float
    ttft_s: float
    tpot_s: float
    itl_s: float | None = None
    """Of the 99th percentile of times between tokens."""
    attainment: float = 0.9
    """The part of all requests that is to keep both."""
    spread: float = 0.0
    """Of lengths."""
    chunk_size: int | None = None
    """None: as instances of each role have it."""
    most_instances: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Layout:
    """Instances of each role, and how they are set."""

    prefill: int = 0
    decode: int = 0
    hybrid: int = 0
    limits: EngineLimits = EngineLimits()  # noqa: RUF009  frozen

    @property
    def count(self) -> int:
        return self.prefill + self.decode + self.hybrid

    def roles(self) -> tuple[Role, ...]:
        return roles_of(self.prefill, self.decode, self.hybrid)

    def describe(self) -> str:
        if self.hybrid:
            chunk = f"chunks for {self.limits.itl_target_ms:g} ms" if self.limits.itl_target_ms else ""
            return f"{self.hybrid} hybrid" + (f", {chunk}" if chunk else "")
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True)
class Trial:
    """What a simulation says of a layout at a rate."""

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
    """The answer, and all that was tried for it."""

    question: Question
    trials: list[Trial]
    apart: Trial | None
    """The fewest instances with prefill and decode apart; None if no number that was tried is enough."""
    together: Trial | None
    """The fewest hybrid instances."""

    @property
    def best(self) -> Trial | None:
        """Fewest instances; of as many, what more requests keep."""
        found = [each for each in (self.apart, self.together) if each is not None]
        return min(found, key=lambda each: (each.layout.count, -each.attainment), default=None)


def make_plan(question: Question) -> Plan:
    """Raises InvalidRequest: the goals cannot be kept by any number of instances; says which."""
    require_possible(question)
    trials: list[Trial] = []
    apart = _fewest(question, _apart(question), trials)
    together = _fewest(question, _hybrids(question), trials)
    return Plan(question, trials, apart, together)


def require_possible(question: Question) -> None:
    """Raises InvalidRequest: one request alone takes longer than its goals, or there are more of them than so many
    instances compute."""
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
    if not math.isfinite(question.rate):
        raise InvalidRequest(f"--rate={question.rate:g}: expected a number of requests a second")
    fewest = min(_fewest_prefills(question) + 1, _fewest_hybrids(question))
    if fewest > question.most_instances:
        raise InvalidRequest(
            f"--most-instances={question.most_instances}: the prompts of {question.rate:g} requests a second alone "
            f"keep {fewest} instances busy"
        )


def _fewest(question: Question, totals: Iterator[list[Layout]], trials: list[Trial]) -> Trial | None:
    """Of the first number of instances that is enough, the layout which most requests keep their goals with."""
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
    """That a prompt takes of an instance which computes one after the other."""
    return StepLaw(question.profile).step_s(question.input_len, question.input_len**2 / 2, 0)


def _fewest_prefills(question: Question) -> int:
    return max(1, math.ceil(question.rate * _prompt_s(question)))


def _fewest_decodes(question: Question) -> int:
    """So many that a step of their share of all sequences takes no longer than its goal, and their KV has room."""
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
    """By operations alone: what decodes take beside prompts is attention, and a row in the products of each step."""
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
    """The same layout at parts of the rate, and beyond it."""
    question = replace(plan.question)
    return [try_layout(question, trial.layout, share * question.rate) for share in shares]
