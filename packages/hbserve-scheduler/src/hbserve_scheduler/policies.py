"""Policies that choose which of several instances takes the next request."""

import itertools
from collections.abc import Callable, Sequence

from hbserve_scheduler.instances import InstanceHandle

Choose = Callable[[Sequence[InstanceHandle]], InstanceHandle]


def round_robin() -> Choose:
    """One after the other; those that cannot take a request now are passed over."""
    turns = itertools.count()
    return lambda candidates: candidates[next(turns) % len(candidates)]


def least_loaded() -> Choose:
    """The one with the least work; among equals in turn, so that an idle deployment uses all of its instances."""
    in_turn = round_robin()

    def choose(candidates: Sequence[InstanceHandle]) -> InstanceHandle:
        least = min(candidate.load for candidate in candidates)
        return in_turn([candidate for candidate in candidates if candidate.load == least])

    return choose


POLICIES: dict[str, Callable[[], Choose]] = {"round_robin": round_robin, "least_loaded": least_loaded}
