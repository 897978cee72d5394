"""Profiles of instances, which are small JSON files of measured times, and the time of a step by such a profile.

A step's time is taken to be the sum of three parts. The matrix products read all weights or are bound by operations,
whichever takes longer. Attention over prompts takes a time for each pair of a new token and one before it. Decodes read
their keys and values.

    time = products(new tokens) + pair_s * pairs + key_s * keys of decodes

`products` is a line through the measured points, from decode steps of few rows to prompts of thousands of tokens.
"""

import os
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from hbserve.options import why_unreadable
from hbserve_rpc import InvalidRequest
from hbserve_rpc.plain_values import shown

OWN = resources.files("hbserve.simulator") / "profiles"
"""The profiles that come with this package."""
MOST_REMEMBERED = 4096
LONG_PROMPT = 4
"""The cost of attention is taken from prompts of at least 1 / LONG_PROMPT of the longest length that was measured."""
Count = Annotated[int, Meta(ge=1, le=10**12)]
Span = Annotated[float, Meta(ge=0, le=1e6)]
Step = Annotated[float, Meta(gt=0, le=1e6)]
"""Time of a step, in seconds, which is above 0. A Span, also in seconds, may be 0."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The profile of one instance. Times are in seconds."""

    name: str
    source: str
    """Origin of the figures: where and how they were measured, or what was assumed."""
    device: str
    """The GPU's name, or "cpu". On a CPU, steps are not padded."""
    tensor_parallel_size: Count = 1
    kv_bytes_per_token: Count
    kv_tokens: Count
    """Number of tokens for which the instance's pool has room."""
    prefill: list[tuple[Count, Step]]
    """Prompts that are computed alone: number of tokens, and time until the first token."""
    decode: list[tuple[Count, Count, Step]]
    """Decode steps: number of sequences, tokens of each, and time of the step."""
    transfer: list[tuple[Annotated[int, Meta(ge=0, le=10**15)], Span]]
    """Transfers between two instances: bytes, and how long they take to move."""
    handoff_s: Span
    """Time of a hand-off, from the computed prompt until the other side has all of it, in addition to moving the last
    bytes: their end is noticed, and reported by a message. In profiles from before 2026-11-28, it is all that a
    transfer takes in addition to moving, which is some 1 ms more, for which a hand-off does not wait."""
    message_s: Span
    """Time of a message in one direction between scheduler and instance."""
    prefill_behind: list[tuple[Count, Step]] = []
    """Prompts that follow another one: number of tokens, and time from one prompt's first token to the next one's. The
    host launches such a prompt while the other is computed, which takes longest for a long prompt without a CUDA graph.
    Empty: the same as `prefill`."""
    launched_ahead_s: Span = 0.0
    """How long before the end of a step the engine launches the next one. A request that arrives later is in the step
    after that. 0: steps are not launched ahead, or this was not measured."""
    launched_ahead_mixed_s: Span = 0.0
    """The same while some steps have prompts beside decodes, with a CUDA graph: the time of these steps varies more."""
    launched_ahead_eager_s: Span = 0.0
    """The same while some steps have no CUDA graph, which take the host longer to launch, and follow steps that are at
    least as long: on an instance that only computes prompts."""


class StepLaw:
    """Computes times of steps and transfers from a profile."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.pair_s = _pair_s(profile.prefill)
        self.key_s = _key_s(profile.decode)
        decodes = _decode_products(profile, self.key_s)
        widest = max(decodes)
        prompts = {tokens: max(0.0, time_s - self.pair_s * tokens**2 / 2) for tokens, time_s in profile.prefill}
        longer = {tokens: time_s for tokens, time_s in prompts.items() if tokens > widest}
        self._of_decodes = Line([*(decodes | longer).items()])
        self._of_prompts = Line([*prompts.items()])
        behind = [(tokens, max(0.0, time_s - self.pair_s * tokens**2 / 2)) for tokens, time_s in profile.prefill_behind]
        self._of_prompts_behind = Line(behind) if behind else self._of_prompts
        self.transfer_s = Line(profile.transfer).at
        """Returns the time that a transfer of so many bytes takes."""
        self.launched_ahead_s = profile.launched_ahead_s
        self.launched_ahead_mixed_s = max(profile.launched_ahead_s, profile.launched_ahead_mixed_s)
        self.launched_ahead_eager_s = max(self.launched_ahead_mixed_s, profile.launched_ahead_eager_s)
        self.overlaps = self.launched_ahead_eager_s > 0
        """Whether steps are launched while the ones before them are computed."""
        self.has_graphs = profile.device != "cpu"
        """Whether steps are padded to the shapes of CUDA graphs."""

    def step_s(self, new_tokens: int, pairs: float, keys: int, *, is_behind: bool = False) -> float:
        """Return the time of a step with `new_tokens` tokens of prompts and decodes together, `pairs` of the prompts,
        and `keys` of the decodes. `is_behind`: the step before it had prompts too."""
        of_prompts = self._of_prompts_behind if is_behind else self._of_prompts
        products = of_prompts.at(new_tokens) if pairs else self._of_decodes.at(new_tokens)
        return products + self.pair_s * pairs + self.key_s * keys

    def decode_steps_s(self, count: int, batch: int, keys: int) -> float:
        """Return the time of `count` decode steps of the same sequences, which together have `keys` tokens before the
        first step."""
        return count * self.step_s(batch, 0, keys) + self.key_s * batch * count * (count - 1) / 2

    def fewest_steps(self, time_s: float, batch: int, keys: int, most: int) -> int:
        """Return the smallest number of these decode steps that take at least `time_s`. The caller knows that `most`
        steps do."""
        first_s, more_s = self.step_s(batch, 0, keys), self.key_s * batch
        count = min(most, int(time_s / first_s) + 1)  # an upper bound: the number if steps did not get longer
        while count > 1 and (count - 1) * first_s + more_s * (count - 1) * (count - 2) / 2 >= time_s:
            count -= 1
        return count


class Line:
    """A line through points that never falls. Beyond the last point, it continues as between the last two."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        ordered = sorted(points)
        self._xs = [x for x, _ in ordered]
        self._ys: list[float] = []
        for _, y in ordered:
            self._ys.append(max(y, *self._ys[-1:]) if self._ys else y)
        self.at = lru_cache(MOST_REMEMBERED)(self._at)
        """Returns the value at a place. It is cached, because the same few places are asked for again and again."""

    def _at(self, x: int) -> float:
        xs, ys = self._xs, self._ys
        if x <= xs[0] or len(xs) == 1:
            return ys[0]
        i = min(bisect_left(xs, x), len(xs) - 1)
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def _pair_s(prefill: Sequence[tuple[int, float]]) -> float:
    """Estimate `pair_s` from long prompts: by how much the time for each token grows with the length."""
    longest = max(tokens for tokens, _ in prefill)
    rows = [(tokens / 2, time_s / tokens) for tokens, time_s in prefill if tokens >= longest / LONG_PROMPT]
    return max(0.0, statistics.linear_regression(*zip(*rows, strict=True)).slope) if len(rows) > 1 else 0.0


def _key_s(decode: Sequence[tuple[int, int, float]]) -> float:
    """Estimate `key_s` from decode steps with equal numbers of sequences: by how much those with more tokens take
    longer. Long steps count most."""
    shortest = {batch: (context, step_s) for batch, context, step_s in sorted(decode, reverse=True)}
    more = [(batch * (context - shortest[batch][0]), step_s - shortest[batch][1]) for batch, context, step_s in decode]
    squares = sum(keys * keys for keys, _ in more)
    return max(0.0, sum(keys * time_s for keys, time_s in more) / squares) if squares else 0.0


def _decode_products(profile: Profile, key_s: float) -> dict[int, float]:
    """Return the time of matrix products by the number of sequences, from steps with the shortest contexts."""
    return {
        batch: max(0.0, step_s - key_s * batch * context)
        for batch, context, step_s in sorted(profile.decode, reverse=True)
    }


def own_profiles() -> list[str]:
    """Return the names of the profiles that come with this package."""
    return sorted(each.name.removesuffix(".json") for each in OWN.iterdir() if each.name.endswith(".json"))


def load_profile(name: str, option: str = "--profile") -> Profile:
    """Load a profile of this package by its name, or one from a file, as `option` says.

    Raises:
        InvalidRequest: there is no such profile, or it cannot be read; the message says why.
    """
    given, names = f"{option}={shown(name)}", own_profiles()
    path = Path(os.path.expanduser(name))
    if name not in names and (why := why_unreadable(path)):
        raise InvalidRequest(f"{given}: {why}; expected a file, or one of {', '.join(names)}")
    try:
        content = (OWN / f"{name}.json" if name in names else path).read_bytes()
        profile = msgspec.json.decode(content, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{given}: {error}") from None
    for field in ("prefill", "decode", "transfer"):
        if not getattr(profile, field):
            raise InvalidRequest(f"{given}: {field} has no rows")
    for field in ("prefill", "prefill_behind", "transfer", "decode"):
        places = [row[:-1] for row in getattr(profile, field)]
        if twice := next((each for each in places if places.count(each) > 1), None):
            raise InvalidRequest(f"{given}: {field} has several rows of {', '.join(map(str, twice))}")
    return profile
