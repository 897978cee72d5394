"""Policies that choose which of several instances takes the next request.

`prefill_policy` and `decode_policy` each name one. To write your own, see PlacementPolicy: a class with `choose`, which
is named by an entry point in the group `hbserve_scheduler.policies`, or as `module:Class`.
"""

import heapq
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from itertools import islice
from operator import attrgetter
from typing import Protocol, overload

from hbserve_rpc.named_class import find_class
from hbserve_rpc.plain_values import shown
from hbserve_rpc.prompt_shape import PromptShape
from hbserve_scheduler.errors import ConfigError
from hbserve_scheduler.instances import InstanceHandle
from hbserve_scheduler.prefixes import Prefixes

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "hbserve_scheduler.policies"
SPARE_REQUESTS = 4
"""Number of requests that an instance with a link may have more than one without, before the latter is preferred. Less
work is worth more than a link, which is made only once."""
MOST_COMPARED = 32
"""Largest number of instances with the same prefix that are compared. If there are more, nearly all instances hold it,
and no choice is bad."""
SortKey = tuple[int, ...]
"""Sort key of an instance; the lowest comes first. No two are equal, because the last number is the instance's turn."""
SPARE_ENTRIES = 64
"""Number of superfluous entries at which the heap is rebuilt."""


class PlacementPolicy(Protocol):
    """Interface of a policy, which chooses among the instances of one role. Each scheduler has one object for each
    role, and calls it in its event loop.

    If a policy has `wants_digests = True`, prompts come with the digests of their blocks.
    """

    def choose(self, candidates: Sequence[InstanceHandle], prompt: PromptShape) -> InstanceHandle:
        """Return one of `candidates`: the instances that can take a request now, in no order, and at least one.

        This is called for each request, so it must be fast. Looking at all candidates takes longer the more instances
        there are; `candidates[i]` does not.
        """


def round_robin(instance: InstanceHandle) -> SortKey:
    """Return a key for taking instances one after another. Those that cannot take a request now are skipped."""
    return (instance.turn,)


least_loaded: Callable[[InstanceHandle], SortKey] = attrgetter("load", "turn")
"""Key for the instance with the least work, or of several such, the next in turn: an idle deployment uses all."""


class LowestKey:
    """Policy that takes the instance with the lowest key."""

    def __init__(self, key: Callable[[InstanceHandle], SortKey]) -> None:
        self.key = key

    def choose(self, candidates: Sequence[InstanceHandle], prompt: PromptShape) -> InstanceHandle:
        return candidates.first() if type(candidates) is Available else min(candidates, key=self.key)


class PowerOfTwo:
    """Policy that draws two instances at random, and takes the one with less work (Mitzenmacher 2001, "the power of two
    choices").

    Several schedulers know of each other's requests only by reports, which are up to a second old. If each took the
    least loaded instance, all would take the same one until its next report.
    """

    def choose(self, candidates: Sequence[InstanceHandle], prompt: PromptShape) -> InstanceHandle:
        first = int(random.random() * len(candidates))
        step = 1 + int(random.random() * (len(candidates) - 1))
        return min(candidates[first], candidates[(first + step) % len(candidates)], key=least_loaded)


class LeastLoadedUnlessShared:
    """Policy that takes the instance with the least work while no other scheduler gives work to instances of this role,
    because this scheduler's knowledge is then exact. Otherwise it chooses like PowerOfTwo."""

    is_shared = False
    """Whether the last reports show requests of other schedulers. Available keeps it up to date."""

    def __init__(self) -> None:
        self._alone, self._among_others = LowestKey(least_loaded), PowerOfTwo()

    def choose(self, candidates: Sequence[InstanceHandle], prompt: PromptShape) -> InstanceHandle:
        return (self._among_others if self.is_shared else self._alone).choose(candidates, prompt)


class PrefixAware:
    """Policy that takes an instance with the longest part of the prompt in its prefix cache, unless that one has too
    much to do. Then, or if no instance has any part, it takes another one, chosen like PowerOfTwo.

    A prefill instance has too much to do if it has more work than the other one and the cached part together: the
    request would wait longer than the cache saves. The load of other instances is counted in requests; they have too
    much to do if they have over SPARE_REQUESTS more than the other one.
    """

    wants_digests = True

    def __init__(self, prefixes: Prefixes) -> None:
        self._prefixes = prefixes
        self._else = PowerOfTwo()

    def choose(self, candidates: Sequence[InstanceHandle], prompt: PromptShape) -> InstanceHandle:
        other = self._else.choose(candidates, prompt)
        num_blocks, holders = self._prefixes.longest(prompt.digests, candidates)
        if num_blocks == 0 or self._prefixes.num_cached(prompt.digests, other) >= num_blocks:
            return other
        holder = min(islice(holders, MOST_COMPARED), key=least_loaded)
        saved = prompt.num_tokens * num_blocks // len(prompt.digests)
        spare = saved if holder.role == "prefill" else SPARE_REQUESTS
        return holder if holder.load <= other.load + spare else other


POLICIES: dict[str, Callable[[Prefixes], PlacementPolicy]] = {
    "auto": lambda _: LeastLoadedUnlessShared(),
    "round_robin": lambda _: LowestKey(round_robin),
    "least_loaded": lambda _: LowestKey(least_loaded),
    "power_of_two": lambda _: PowerOfTwo(),
    "prefix_aware": PrefixAware,
}


def check_policy(key: str, name: str) -> None:
    """Check that a policy of this name may exist, without importing it: readers of a configuration need not have it.

    Raises:
        ConfigError: there is no such policy.
    """
    if name in POLICIES:  # asking for entry points reads the metadata of every installed distribution: 50 ms
        return
    there = [*POLICIES, *sorted(entry_points(group=ENTRY_POINT_GROUP).names)]
    if name not in there and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ConfigError(f"{key}={shown(name)}: expected one of {', '.join(there)}, or 'module:Class' of your own")


def make_policy(key: str, name: str, prefixes: Prefixes) -> PlacementPolicy:
    """Make the policy that a configuration names under `key`: a built-in one, or one that `find_class` finds.

    Raises:
        ConfigError: there is nothing of this name, or it is not a policy.
    """
    if name in POLICIES:
        return POLICIES[name](prefixes)
    check_policy(key, name)
    try:
        made = find_class(ENTRY_POINT_GROUP, name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"{key}={name!r}: {error}") from error
    if not callable(getattr(made, "choose", None)):
        raise ConfigError(f"{key}={name!r}: expected a class with a method choose(candidates, prompt)")
    policy: PlacementPolicy = made
    return policy


class InstanceHeap:
    """Heap that finds the instance with the lowest key. It looks at an instance only when that has changed, so asking
    takes no longer with more instances."""

    def __init__(self, key: Callable[[InstanceHandle], SortKey]) -> None:
        self._key = key
        self._keys: dict[InstanceHandle, SortKey] = {}
        self._heap: list[tuple[SortKey, InstanceHandle]] = []
        """Entries of (key, instance), outdated ones included, which are skipped. No two keys are equal, so that
        instances, which come last in an entry, are never compared."""

    def update(self, handle: InstanceHandle) -> None:
        """Note that an instance is new, or that its key may have changed."""
        key = self._key(handle)
        if self._keys.get(handle) != key:
            self._keys[handle] = key
            heapq.heappush(self._heap, (key, handle))
            if len(self._heap) > 2 * len(self._keys) + SPARE_ENTRIES:
                self._heap = [(key, handle) for handle, key in self._keys.items()]
                heapq.heapify(self._heap)

    def forget(self, handle: InstanceHandle) -> None:
        self._keys.pop(handle, None)

    def first(self) -> InstanceHandle:
        """Return the instance with the lowest key. There must be an instance."""
        while True:
            key, handle = self._heap[0]
            if self._keys.get(handle) is key:
                return handle
            heapq.heappop(self._heap)


class Available(Sequence[InstanceHandle]):
    """The instances of one role that can take a request now.

    It looks at an instance when that has changed, and not at all instances for each request: choosing must not take
    longer with more instances.
    """

    def __init__(self, policy: PlacementPolicy, has_room: Callable[[InstanceHandle], bool]) -> None:
        self.policy = policy
        self._is_ours = isinstance(policy, LowestKey | PowerOfTwo | LeastLoadedUnlessShared | PrefixAware)
        self._has_room = has_room
        self._members: list[InstanceHandle] = []
        self.members: dict[InstanceHandle, int] = {}
        """The same instances, with their places in `_members`. Whether one is there, or any, is looked up several times
        for each request, and here without a call."""
        self._by_load = InstanceHeap(least_loaded)
        self._by_policy = self._by_load
        self._shared: set[InstanceHandle] = set()
        """Instances to which other schedulers have given work, whether they have room or not."""
        if isinstance(policy, LowestKey) and policy.key is not least_loaded:
            self._by_policy = InstanceHeap(policy.key)

    def update(self, handle: InstanceHandle) -> None:
        """Note that an instance is new, has gone, or has another load."""
        if handle.load_of_others or self._shared:
            self._note_others(handle, handle.load_of_others)
        if handle.health.state != "ready" or handle.is_full or not self._has_room(handle):
            self._leave(handle)
            return
        if handle not in self.members:
            self.members[handle] = len(self._members)
            self._members.append(handle)
        self._by_load.update(handle)
        if self._by_policy is not self._by_load:
            self._by_policy.update(handle)

    def forget(self, handle: InstanceHandle) -> None:
        """Drop an instance that was removed, or that has another role now."""
        self._note_others(handle, 0)
        self._leave(handle)

    def _leave(self, handle: InstanceHandle) -> None:
        if (place := self.members.pop(handle, None)) is None:
            return
        last = self._members.pop()
        if last is not handle:
            self._members[place] = last
            self.members[last] = place
        self._by_load.forget(handle)
        self._by_policy.forget(handle)

    def _note_others(self, handle: InstanceHandle, load: int) -> None:
        if bool(load) != (handle in self._shared):
            (self._shared.add if load else self._shared.remove)(handle)
            if isinstance(self.policy, LeastLoadedUnlessShared):
                self.policy.is_shared = bool(self._shared)

    def first(self) -> InstanceHandle:
        """Return the instance with the policy's lowest key, or the least loaded if the policy has no key. There must be
        an instance."""
        return self._by_policy.first()

    def least_load(self) -> int:
        """Return the smallest load of any instance. There must be an instance."""
        return self._by_load.first().load

    def choose(self, prompt: PromptShape, among: Sequence[InstanceHandle] | None = None) -> InstanceHandle:
        """Return the policy's choice from all available instances, or from those in `among`. There must be one."""
        candidates = self if among is None else among
        if self._is_ours:
            return self.policy.choose(candidates, prompt)
        try:
            chosen = self.policy.choose(candidates, prompt)
            if chosen in candidates:
                return chosen
            problem = f"it chose {chosen!r}, which is none of the candidates"
        except Exception as error:  # a bug in a user's policy: requests must not stand still because of it
            problem = repr(error)
        logger.error("%s cannot choose, so the least loaded instance is taken: %s", type(self.policy).__name__, problem)
        return self._by_load.first() if among is None else min(among, key=least_loaded)

    @overload
    def __getitem__(self, place: int) -> InstanceHandle: ...

    @overload
    def __getitem__(self, place: slice) -> list[InstanceHandle]: ...

    def __getitem__(self, place: int | slice) -> InstanceHandle | list[InstanceHandle]:
        return self._members[place]

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, handle: object) -> bool:
        return handle in self.members

    def __iter__(self) -> Iterator[InstanceHandle]:
        return iter(self._members)


def connected_first(
    candidates: list[InstanceHandle], link: Callable[[InstanceHandle], bool | None], num_tokens: int
) -> list[InstanceHandle]:
    """Return those of `candidates` that are best connected. `link` gives the state of each: True for connected, None
    for not connected yet, False for cannot be connected.

    If some that are not connected yet have so much less work than any connected one that connecting pays, return those
    instead. num_tokens: the work of one request.
    """
    by_link: dict[bool | None, list[InstanceHandle]] = {}
    for candidate in candidates:
        by_link.setdefault(link(candidate), []).append(candidate)
    there, not_yet = by_link.get(True, []), by_link.get(None, [])
    if there and not_yet:
        worth_it = min(each.load for each in there) - SPARE_REQUESTS * num_tokens
        return [each for each in not_yet if each.load < worth_it] or there
    return there or not_yet or candidates
