"""Policies that choose which of several instances takes the next request."""

import heapq
from collections.abc import Callable, Iterator

from hbserve_scheduler.instances import InstanceHandle

SPARE_REQUESTS = 4
"""As many requests more may be with an instance to which there is a link than with one to which there is none. Less
work is worth more than a link, which is made once."""

SPARE_ENTRIES = 64
"""A heap of so many entries more than it needs is not worth making again."""

Policy = Callable[[InstanceHandle], tuple[int, ...]]
"""The rank of an instance, of which the lowest takes the next request. No two have the same: each ends in its turn."""


def round_robin(instance: InstanceHandle) -> tuple[int, ...]:
    """One after the other; those that cannot take a request now are passed over."""
    return (instance.turn,)


def least_loaded(instance: InstanceHandle) -> tuple[int, ...]:
    """The one with the least work; among equals in turn, so that an idle deployment uses all of its instances."""
    return instance.load, instance.turn


POLICIES: dict[str, Policy] = {"round_robin": round_robin, "least_loaded": least_loaded}


class Available:
    """Looks at one instance when it has changed, not at all of them when a request comes: choosing must not take longer
    the more there are."""

    def __init__(self, policy: Policy, has_room: Callable[[InstanceHandle], bool]) -> None:
        self.policy = policy
        self._has_room = has_room
        self._ranks: dict[InstanceHandle, tuple[int, ...]] = {}
        """Of those that are available, their rank by the policy."""
        self._heap: list[tuple[tuple[int, ...], InstanceHandle]] = []
        """Every rank that one has had; those that it has no more are passed over. An instance comes last among equals,
        and ranks are never equal, so that nobody compares instances."""

    def look(self, handle: InstanceHandle) -> None:
        """To be called when it is there, or gone, or its load is another."""
        if handle.status != "ready" or handle.is_full or not self._has_room(handle):
            self._ranks.pop(handle, None)
            return
        rank = self.policy(handle)
        if self._ranks.get(handle) != rank:
            self._ranks[handle] = rank
            heapq.heappush(self._heap, (rank, handle))
            if len(self._heap) > 2 * len(self._ranks) + SPARE_ENTRIES:
                self._heap = [(rank, handle) for handle, rank in self._ranks.items()]
                heapq.heapify(self._heap)

    def forget(self, handle: InstanceHandle) -> None:
        """It was removed."""
        self._ranks.pop(handle, None)

    def first(self) -> InstanceHandle:
        """By the policy. There must be one."""
        while self._ranks.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def least_load(self) -> int:
        """Of any of them. There must be one."""
        return self.first().load if self.policy is least_loaded else min(each.load for each in self)

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, handle: object) -> bool:
        return handle in self._ranks

    def __iter__(self) -> Iterator[InstanceHandle]:
        return iter(self._ranks)


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
