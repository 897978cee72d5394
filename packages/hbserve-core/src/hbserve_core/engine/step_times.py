"""Predictions of how long steps take, learned from steps as they end. They decide how many prompt tokens the next step
computes and when it is launched.

    step k       ├───────────── computes ─────────────┤ predicted end
    step k + 1     who arrives is in it ──▶ ├─ slack ─┤ scheduled, packed and launched
                                            launch time

The slack is the 99th percentile of the host's time and the prediction error together, and a margin. After a step that
is short, or for which there is no prediction, the next one is launched at once instead, that is, as early as possible
while that step is computed.

Prompts are computed in chunks of `chunk_size` tokens. With `auto`, each step gets as many prompt tokens as take STEP_S,
and at least FEWEST_TOKENS, below which reading the weights takes longer than the matrix products. A longer step would
compute hardly more per second, and would delay requests that arrive meanwhile. The more work waits, the longer a step
may nevertheless be. With `itl_target_ms`, a step that also has decodes takes no longer than that. Where steps are
replayed from CUDA graphs, a step that fits none of them must take at least LAUNCH_S, or is cut down to one that fits.

Nothing here depends on a device, and torch is not imported: `hbserve simulate` chooses chunks by the same code, which
then asks a profile how long a step would take.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Ids
from itertools import islice
from typing import Literal, NamedTuple, Protocol

from hbserve_rpc.messages import Role
from hbserve_rpc.settings import chunk_size_of

STEP_S = 0.010
FEWEST_TOKENS = 1024
FEWEST_BESIDE_DECODES = 64
"""Fewest prompt tokens of a step where there is a target for the time between tokens. Prompts must progress even where
decodes alone take longer than the target."""
SHORT_TOKENS = 2048
"""Number of tokens left up to which a prompt is short and goes before others. The others lose little time by that,
because short prompts are a small part of the work, whereas short prompts would wait long for them."""
STEPS_OF_BACKLOG = 8
"""Number of steps in which the waiting work is to be computed. The more work waits, the longer a step may be, because
the fixed cost of steps is what makes the last request wait longest."""
LAUNCH_S = 0.040
"""Time that a host may need to launch a step without a CUDA graph, one kernel after another, while transfers and the
event loop compete for the interpreter. 36 ms were seen for steps of 3,072 tokens, which the device computes in 8."""
MOST_OVERTAKERS = 64
"""Number of waiting prompts that are considered."""
SHARE_OF_LONG = 8
"""Divisor of a step's prompt tokens that gives the part kept for a long prompt."""
LATE_FROM_S = 0.003
"""Shortest predicted time of a step after which the next one is launched late. After shorter steps the next one is
launched at once: a late request waits little, and each wake-up of the host would be noticeable."""
MARGIN_S = 0.0003
POLL_S = 0.0005
"""Time that the host sleeps at once while a step is computed. A step that ends early is noticed this much later."""
TAIL_POLL_S = 0.0001
"""Time that the host sleeps at once around the predicted end of a step, if nothing else is launched behind it."""
_SHORTEST_WAIT_S = 10e-6
_WAITED_S = 20e-6
"""Upper bound of the time that reading a step takes if the step has already ended."""
_FEWEST = 16
"""Number of steps that must have been seen before a prediction is used."""
STEPS_REMEMBERED = 200
"""Number of launches from which the slack is computed."""
_RECENT = 0.03
"""Weight of the last step in the recent average."""


class StepWork(NamedTuple):
    """Work of a step, on which its time depends; the bytes of the weights, which every step reads, are not part of
    it."""

    num_tokens: int
    """Number of new tokens, for the operations of matrix products."""
    num_keys: int
    """Number of keys of all sequences, for the bytes of KV that are read."""
    num_pairs: int
    """Number of pairs of a query and a key, counted twice, for the operations of attention."""

    @classmethod
    def of(cls, chunks: Collection[tuple[object, int, int]]) -> "StepWork":
        """Add up the work of chunks, each given as (anything, first new token, number of new tokens)."""
        tokens = sum([count for _, _, count in chunks])
        keys = tokens + sum([first for _, first, _ in chunks])
        if tokens == len(chunks):  # decodes, of which every step has many
            return cls(tokens, keys, 2 * keys - tokens)
        return cls(tokens, keys, sum([count * (2 * first + count) for _, first, count in chunks]))

    def with_chunk(self, first: int, count: int) -> "StepWork":
        """Return this work with `count` more tokens, of a prompt of which `first` tokens are computed."""
        return StepWork(
            self.num_tokens + count,
            self.num_keys + first + count,
            self.num_pairs + count * (2 * first + count),
        )


class _Fit:
    """Least-squares fit to the times of steps with similar numbers of tokens, updated step by step, with the recent
    error of its predictions.

    The time of matrix products is the longer of reading the weights and computing, which is not a sum of terms; within
    a power of two of tokens it nearly is.
    """

    def __init__(self, octave: int) -> None:
        # The constant term is trusted first: a quantity that has never varied is assumed to have little effect.
        self._per_token = 0.1 / (1 << octave)
        self._weights = [0.0] * 4
        self._spread = [[100.0 * (row == column) for column in range(4)] for row in range(4)]
        self._error = 0.0
        self.count = 0

    def _terms(self, work: StepWork) -> list[float]:
        return [1.0, self._per_token * work.num_tokens, 1e-6 * work.num_keys, 1e-9 * work.num_pairs]

    def predict_s(self, work: StepWork) -> float:
        return max(0.0, self._error + _product(self._weights, self._terms(work)))

    def learn(self, work: StepWork, time_s: float) -> None:
        terms = self._terms(work)
        error = time_s - _product(self._weights, terms)
        toward = [_product(row, terms) for row in self._spread]
        size = 1 + _product(toward, terms)
        self._weights = [weight + part * error / size for weight, part in zip(self._weights, toward, strict=True)]
        self._spread = [
            [entry - part * other / size for entry, other in zip(row, toward, strict=True)]
            for row, part in zip(self._spread, toward, strict=True)
        ]
        self._error += _RECENT * (time_s - _product(self._weights, terms) - self._error)
        self.count += 1


def _product(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


class StepTimes:
    """Times that steps take, by their work."""

    def __init__(self) -> None:
        self._fits: dict[int, _Fit] = {}

    def predict_s(self, work: StepWork) -> float | None:
        """Predict the time of a step. Returns None if too few steps of similar size have been seen."""
        fit = self._fits.get(work.num_tokens.bit_length())
        return fit.predict_s(work) if fit is not None and fit.count >= _FEWEST else None

    def learn(self, work: StepWork, time_s: float) -> None:
        octave = work.num_tokens.bit_length()
        if (fit := self._fits.get(octave)) is None:
            fit = self._fits[octave] = _Fit(octave)
        fit.learn(work, time_s)


class ChunkSettings(Protocol):
    """Fields of `hbserve_rpc.settings.EngineSettings` on which chunks depend."""

    @property
    def chunked_prefill_enabled(self) -> bool: ...
    @property
    def chunk_size(self) -> int | Literal["auto"] | None: ...
    @property
    def itl_target_ms(self) -> float | None: ...
    @property
    def max_chunk_prefill_tokens(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def most_graph_tokens(self) -> int: ...


class Prompt(Protocol):
    """Sequence with tokens to be computed."""

    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_uncomputed_tokens(self) -> int: ...
    @property
    def prefill_only(self) -> bool: ...


class ChunkSizes:
    """Choice of the number of prompt tokens that the next step computes, in total and of each sequence."""

    def __init__(
        self,
        settings: ChunkSettings,
        role: Role,
        predict_s: Callable[[StepWork], float | None],
        *,
        has_graphs: bool = False,
    ) -> None:
        """predict_s: returns how long a step would take, or None if that is not known. has_graphs: whether the device
        replays steps of up to `most_graph_tokens` from CUDA graphs."""
        self._settings = settings
        self._graph_tokens = settings.most_graph_tokens if has_graphs else 0
        self._predict_s = predict_s
        chosen = chunk_size_of(settings.chunk_size, role, settings.itl_target_ms)
        self._fixed = None if chosen == "auto" else chosen
        self.is_adaptive = settings.chunked_prefill_enabled and self._fixed is None
        """Whether sizes adapt and short prompts go first."""
        self._of_step = 0
        """Number of prompt tokens of the step whose chunks `of` chooses."""

    def of_step(self, decodes: StepWork, begun: Ids[Prompt], waiting: Iterable[Prompt]) -> int:
        """Return the number of prompt tokens of a step that also has these decodes, if sizes are adaptive. begun,
        waiting: prompts that are to be computed."""
        self._of_step = self._launched_in_time(decodes, self._wanted_of_step(decodes, begun, waiting))
        return self._of_step

    def _wanted_of_step(self, decodes: StepWork, begun: Ids[Prompt], waiting: Iterable[Prompt]) -> int:
        most, target_ms = self._settings.max_chunk_prefill_tokens, self._settings.itl_target_ms
        if decodes.num_tokens and target_ms is not None:
            first = begun[0].num_computed_tokens if begun else 0
            return self._within(target_ms / 1e3, decodes, first, FEWEST_BESIDE_DECODES, most)
        # Attention is no reason for more steps: they would have more of it, not less.
        wanted = self._within(STEP_S, decodes, 0, FEWEST_TOKENS, most)
        if decodes.num_tokens:
            return wanted
        backlog = sum(each.num_uncomputed_tokens for each in (*begun, *islice(waiting, MOST_OVERTAKERS)))
        return max(wanted, min(most, backlog // STEPS_OF_BACKLOG))

    def of(self, sequence: Prompt, wanted: int, prefill_budget: int, budget: int) -> int:
        """Return how many tokens to compute of one sequence that has `wanted` left. prefill_budget, budget: numbers of
        tokens that the step has left for prompts, and for any tokens."""
        settings = self._settings
        if not settings.chunked_prefill_enabled:  # a whole prompt or nothing
            if wanted <= settings.max_num_batched_tokens:
                return wanted if wanted <= budget else 0
            return budget  # longer than a prompt may be: a preempted sequence computes its output again too
        most = min(prefill_budget, budget)
        if self._fixed is not None:
            return min(wanted, self._fixed, most)
        if sequence.prefill_only and self._of_step == most < wanted <= 2 * most:
            # It has this step to itself, and one more to come. The KV of that one can only move after the first token,
            # so it is at most half a step.
            longer = self._launched_in_time(StepWork(0, 0, 0), max(most, wanted - most // 2))
            return min(longer, budget, settings.max_chunk_prefill_tokens)
        return min(wanted, most)

    def _launched_in_time(self, decodes: StepWork, wanted: int) -> int:
        """Return `wanted`, or the number of prompt tokens for which a CUDA graph has room, if the host would take
        longer to launch the step than the device to compute it."""
        in_graph = self._graph_tokens - decodes.num_tokens
        if not 0 < in_graph < wanted:
            return wanted
        in_graph_s = self._time_s(decodes, 0, in_graph, FEWEST_TOKENS)
        return wanted if LAUNCH_S <= in_graph_s * wanted / in_graph < float("inf") else in_graph

    def is_short(self, num_tokens: int) -> bool:
        """Return whether a prompt with this many tokens left goes before prompts that came earlier."""
        return self.is_adaptive and num_tokens <= SHORT_TOKENS

    def left_for_long(self, budget: int) -> int:
        """Return how many of a step's prompt tokens short prompts leave for a long one."""
        return budget // SHARE_OF_LONG

    def _within(self, target_s: float, decodes: StepWork, first: int, fewest: int, most: int) -> int:
        """Return the largest number of tokens, between `fewest` and `most`, that is predicted to take no longer than
        the target, or `fewest` if there is none."""
        low = size = min(fewest, most)
        while size < most:
            known, size = size, min(2 * size, most)
            if self._time_s(decodes, first, size, known) <= target_s:
                low = size
        high = min(2 * low, most)
        while high - low > max(32, low // 16):
            middle = (low + high) // 2
            if self._time_s(decodes, first, middle, low) <= target_s:
                low = middle
            else:
                high = middle
        return low

    def _time_s(self, decodes: StepWork, first: int, count: int, known: int) -> float:
        """Predict the time of a step with `count` prompt tokens; if no step of that size was seen, in proportion to one
        with `known`."""
        if (time_s := self._predict_s(decodes.with_chunk(first, count))) is not None:
            return time_s
        if (time_s := self._predict_s(decodes.with_chunk(first, known))) is not None:
            return time_s * count / known
        return float("inf")


class _Computing(NamedTuple):
    """Step in flight."""

    work: StepWork
    begin: float
    predicted_s: float | None


class LaunchTimes:
    """Decision when to launch the next step. Times are those of the engine's clock, in seconds."""

    def __init__(self, clock: Callable[[], float], is_idle: Callable[[], bool], *, always_at_once: bool) -> None:
        """is_idle: returns whether the device has computed everything that was launched."""
        self.step_times = StepTimes()
        self.num_late = 0
        """Number of steps that were meant to be launched just in time, but were launched after the previous one had
        ended."""
        self.idle_time_s = 0.0
        """Longest time for which the device may have been idle because of late steps."""
        self._clock, self._is_idle, self._always_at_once = clock, is_idle, always_at_once
        self._step: _Computing | None = None
        self._last_end = 0.0
        self._busy_at = 0.0
        """Last time at which the step was seen still running, when its end was waited for in vain."""
        self._needs: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        """Times, for recent launches, from what would have been the right moment to the predicted end of the previous
        step."""
        self.slack_s = 0.0
        """Time before the predicted end of a step at which the next one is launched, if it is not launched at once."""
        self._num_waited = 0

    def wait_s(self, *, can_launch: bool) -> float:
        """Return how long to wait for more requests until the next step is launched, or until asking again; 0 if it is
        time.

        can_launch: whether there may be something to launch already. If not, it is time when the step in flight has
        ended.
        """
        step = self._step
        assert step is not None
        at_once = self._always_at_once or step.predicted_s is None or step.predicted_s < LATE_FROM_S
        if can_launch and (at_once or len(self._needs) < _FEWEST):
            return 0.0
        now = self._clock()
        left = step.begin + (step.predicted_s or 0.0) - now
        left = left - self.slack_s if can_launch else max(left, TAIL_POLL_S)
        if left < _SHORTEST_WAIT_S or self._is_idle():
            return 0.0
        self._busy_at = now
        return min(left, POLL_S)

    def ended(self, waited_from: float, now: float, host_time_s: float | None) -> None:
        """Note that the step in flight has been waited for and has ended. host_time_s: how long it took to launch the
        next one, if one was launched before that."""
        step, self._step, self._last_end = self._step, None, now
        if step is None:
            return
        if now - waited_from > _WAITED_S:
            self._num_waited += 1
            # A few of the short steps are enough, and the host has no time for more.
            if step.predicted_s is None or step.predicted_s >= LATE_FROM_S or self._num_waited % 32 == 0:
                self.step_times.learn(step.work, now - step.begin)
            end = now
        elif self._busy_at > step.begin:
            end = self._busy_at
            if host_time_s is not None:
                self.num_late += 1
                self.idle_time_s += waited_from - end
        else:
            return
        if step.predicted_s is not None and step.predicted_s >= LATE_FROM_S and host_time_s is not None:
            self._needs.append(host_time_s + step.begin + step.predicted_s - end)
            self.slack_s = sorted(self._needs)[int(0.99 * len(self._needs))] + MARGIN_S

    def began(self, work: StepWork, launched_at: float) -> None:
        """Note that a step is in flight, after the one that has ended."""
        self._step = _Computing(work, max(launched_at, self._last_end), self.step_times.predict_s(work))
