"""The sending of a load: each request goes out when it is due, whether or not earlier ones were answered. Also watches
whether this process is fast enough."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from hbserve.load.asking import Outcome

LAG_INTERVAL_S = 0.02
MOST_CPU_SHARE = 0.9
MOST_LAG_S, MOST_LAG_SHARE = 0.002, 0.1
"""Beyond these limits, the figures measure this process: it computes nearly all the time, or one timer in a hundred
fires this late, which is also a large part of the times that are measured."""


@dataclass
class Watch:
    """Measures how busy this process is while it sends a load. Its delays are a part of every figure."""

    lags_s: list[float] = field(default_factory=list)
    """How late each timer fired."""
    send_lags_s: list[float] = field(default_factory=list)
    """How late each request was sent, not counting the wait for `max_concurrency`."""
    cpu_share: float = 0.0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticking.cancel()
            took_s = time.perf_counter() - began_s
            self.cpu_share = (time.process_time() - began_cpu_s) / took_s if took_s else 0.0

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.lags_s.append(max(0.0, loop.time() - due_s))

    def lag_p99_s(self) -> float:
        lags = sorted([*self.lags_s, *self.send_lags_s])
        return lags[int(0.99 * (len(lags) - 1))] if lags else 0.0

    def complaint(self, shortest_s: float) -> str:
        """Say why the figures measure this process rather than the server; empty if they do not.

        `shortest_s` is the typical value of the shortest kind of time that is measured.
        """
        if self.cpu_share > MOST_CPU_SHARE:
            return f"this client computes {self.cpu_share:.0%} of the time"
        if self.lag_p99_s() > max(MOST_LAG_S, MOST_LAG_SHARE * shortest_s):
            late_ms, of_ms = 1e3 * self.lag_p99_s(), 1e3 * shortest_s
            return f"this client is {late_ms:.1f} ms late in one case of a hundred, where {of_ms:.1f} ms are measured"
        return ""


@dataclass(frozen=True)
class Load:
    """The results of a load's requests."""

    outcomes: list[Outcome]
    duration_s: float
    watch: Watch
    was_cut: bool = False
    """Whether a cancellation ended the load early; `outcomes` then has only the requests that had ended."""


async def send_load(
    outcomes: Sequence[Outcome],
    send: Callable[[int], Coroutine[Any, Any, None]],
    times_s: Sequence[float],
    *,
    max_concurrency: int | None,
    on_end: Callable[[], object],
) -> Load:
    """Send request `i` by `send(i)` at `times_s[i]`, at most `max_concurrency` at a time, and wait for all answers.

    `send` fills `outcomes[i]`, and raises nothing. A cancellation ends the load early and is not raised here, so that
    the caller can report what is known (`was_cut`); the caller must then raise it again.
    """
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    watch, ended = Watch(), list[Outcome]()

    async def one(i: int) -> None:
        outcomes[i].ready_s = time.perf_counter()
        watch.send_lags_s.append(max(0.0, outcomes[i].ready_s - outcomes[i].planned_s))
        async with places:
            await send(i)
        ended.append(outcomes[i])
        on_end()

    async with watch.watching():
        began_s, was_cut = time.perf_counter(), False
        try:
            async with asyncio.TaskGroup() as group:
                for i, at_s in enumerate(times_s):
                    outcomes[i].planned_s = began_s + at_s
                    # Let a request that is due run before the next one is made: else a burst would wait for its last.
                    await asyncio.sleep(max(0.0, outcomes[i].planned_s - time.perf_counter()))
                    group.create_task(one(i))
        except asyncio.CancelledError:
            was_cut = True
        duration_s = time.perf_counter() - began_s
    return Load(ended if was_cut else list(outcomes), duration_s, watch, was_cut)
