"""Times at which the requests of a load are to be sent, in seconds since its beginning."""

import itertools
import math
import random
from typing import Literal

Ramp = Literal["linear", "exponential"]


def arrival_times(
    count: int,
    rate: float,
    *,
    burstiness: float = 1.0,
    ramp: Ramp | None = None,
    ramp_rates: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
) -> list[float]:
    """Draw arrival times as `vllm bench serve` does: the gaps between them have a gamma distribution whose shape is
    `burstiness`.

    A burstiness of 1 is a Poisson process, less is burstier, and an infinite one has equal gaps. Without a ramp, all
    times are stretched so that the last request comes at `count / rate`. An infinite rate sends all at once.
    """
    rng = random.Random(seed)
    rates = [_rate_at(i / max(count - 1, 1), rate, ramp, ramp_rates) for i in range(count)]
    times = list(itertools.accumulate(gap_s(rng, each, burstiness) for each in rates))
    if ramp is None and times and times[-1] > 0:
        stretch = count / rate / times[-1]
        times = [each * stretch for each in times]
    return times


def _rate_at(progress: float, rate: float, ramp: Ramp | None, ramp_rates: tuple[float, float]) -> float:
    begin, end = ramp_rates
    match ramp:
        case "linear":
            return begin + (end - begin) * progress
        case "exponential":
            return begin * float((end / begin) ** progress)
        case None:
            return rate


def gap_s(rng: random.Random, rate: float, burstiness: float) -> float:
    """Draw the time until the next request. An infinite burstiness, or one that overflows a float, gives equal gaps."""
    if math.isinf(rate * burstiness):
        return 1 / rate
    return rng.gammavariate(burstiness, 1 / (rate * burstiness))
