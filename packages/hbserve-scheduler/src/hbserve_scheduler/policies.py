"""Policies that choose which of several instances takes the next request."""

import itertools
from collections.abc import Callable, Sequence

from hbserve_scheduler.instances import InstanceHandle

SPARE_REQUESTS = 4
"""As many requests more may be with an instance to which there is a link than with one to which there is none. Less
work is worth more than a link, which is made once."""

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


def connected_first(
    candidates: list[InstanceHandle], link: Callable[[InstanceHandle], bool | None], num_tokens: int
) -> list[InstanceHandle]:
    """Those of `candidates` that are best connected, by `link`: True, None for not yet, or False for not to be.

    Those that are not connected yet are there too if they have so much less work that it pays to connect; `num_tokens`
    is the work of one request.
    """
    by_link: dict[bool | None, list[InstanceHandle]] = {}
    for candidate in candidates:
        by_link.setdefault(link(candidate), []).append(candidate)
    there, not_yet = by_link.get(True, []), by_link.get(None, [])
    if there and not_yet:
        spare = SPARE_REQUESTS * num_tokens
        is_busy = min(each.load for each in there) > min(each.load for each in not_yet) + spare
        return there + not_yet if is_busy else there
    return there or not_yet or candidates
