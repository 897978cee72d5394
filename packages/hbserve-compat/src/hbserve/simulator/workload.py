"""The requests of a simulation: the shapes of their prompts, and the times at which they come. They are made one by
one, so that a million take no memory."""

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hbserve.load.arrivals import gap_s
from hbserve.load.prompts import MOONCAKE_BLOCK, read_timed_trace
from hbserve.simulator.instance import NO_SHAPE, Shape

CONVERSATION_TURNS, CONVERSATION_PAUSE_S = 4.0, 60.0
"""Average number of turns of a conversation, and average seconds between two turns."""
CONVERSATION_FIRST, CONVERSATION_QUESTION, CONVERSATION_ANSWER = 7000, 2000, 340
"""Average numbers of tokens: of a conversation's first prompt, of each further question, and of an answer. Together
they make prompts of some 12,000 tokens, as in Mooncake's conversation trace."""
SPREAD = 0.8
"""Spread of the lengths: the standard deviation of their logarithm."""


class SimulatedRequest(NamedTuple):
    """One request of the workload."""

    at_s: float
    input_len: int
    output_len: int
    shape: Shape = NO_SHAPE
    session: int = 0
    """Session by which a load balancer in front of several cells would choose a cell."""


def poisson(
    count: int,
    rate: float,
    input_len: int,
    output_len: int,
    *,
    burstiness: float = 1.0,
    spread: float = 0.0,
    seed: int = 0,
) -> Iterator[SimulatedRequest]:
    """Make requests with unrelated prompts at random times, or all at once if the rate is infinite. `burstiness` is as
    in `arrival_times`; `spread` is the standard deviation of the lengths' logarithm."""
    rng = random.Random(seed)
    at_s = 0.0
    for i in range(count):
        at_s += gap_s(rng, rate, burstiness)
        yield SimulatedRequest(at_s, _around(rng, input_len, spread), _around(rng, output_len, spread), session=i)


def _around(rng: random.Random, mean: float, spread: float) -> int:
    """Draw a number from a log-normal distribution with this mean."""
    return max(1, round(rng.lognormvariate(math.log(mean) - spread * spread / 2, spread))) if spread else round(mean)


def conversations(count: int, rate: float, *, seed: int = 0) -> Iterator[SimulatedRequest]:
    """Make the turns of conversations. Their prompts grow: each begins with everything that was said before.

    `rate` is that of all turns together. Once it is reached, the number of concurrent conversations stays constant.
    """
    rng = random.Random(seed)
    ids = itertools.count(1)
    going: list[_Conversation] = []
    at_s = 0.0
    places = max(1, round(rate * CONVERSATION_PAUSE_S))
    for _ in range(count):
        at_s += rng.expovariate(rate)
        place = rng.randrange(places)
        if place >= len(going):
            place = len(going)
            going.append(_Conversation(next(ids)))
        elif rng.random() < 1 / CONVERSATION_TURNS:
            going[place] = _Conversation(next(ids))
        yield going[place].turn(at_s, rng, ids)


class _Conversation:
    def __init__(self, session: int) -> None:
        self._session = session
        self._tokens = 0
        self._hash_ids: tuple[int, ...] = ()

    def turn(self, at_s: float, rng: random.Random, ids: "itertools.count[int]") -> SimulatedRequest:
        asked = CONVERSATION_QUESTION if self._tokens else CONVERSATION_FIRST
        prompt = self._tokens + _around(rng, asked, SPREAD)
        answer = _around(rng, CONVERSATION_ANSWER, SPREAD)
        num_new = prompt // MOONCAKE_BLOCK - len(self._hash_ids)
        self._hash_ids += tuple(itertools.islice(ids, num_new))
        self._tokens = prompt + answer
        return SimulatedRequest(at_s, prompt, answer, Shape(self._hash_ids, MOONCAKE_BLOCK), self._session)


def trace(
    path: Path, *, block_size: int, unit_s: float, speed: float = 1.0, repeat: int = 1
) -> Iterator[SimulatedRequest]:
    """Make the requests of a timed trace, `speed` times as fast, several times over with other prompts each time.

    Raises:
        InvalidRequest: the trace cannot be read; the message says why.
    """
    begin_s = last_s = 0.0
    for number in range(repeat):
        for each in read_timed_trace(path, unit_s=unit_s / speed):
            last_s = begin_s + each.at_s
            full = each.input_len // block_size
            hash_ids = tuple(number << 40 | hash_id for hash_id in each.hash_ids[:full])
            session = hash_ids[0] if hash_ids else 0
            yield SimulatedRequest(
                last_s, each.input_len, max(1, each.output_len), Shape(hash_ids, block_size), session
            )
        begin_s = last_s
