"""Steps of all ranks of an instance by number, so that a message about a step refers to each rank's own event of it."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

KEPT_STEPS = 4
"""Number of events that are kept. A rank has at most two steps under way, and those before them have been computed."""


class LaunchedStep(NamedTuple):
    """Step of all ranks that has not been computed yet."""

    number: int
    """Number of the step since the instance began, counted from 1. It is the same on every rank."""
    computed: Any
    """CUDA event of rank 0; see `Runner.computed`. Each rank has an event of its own for the step of this number."""


class LaunchedSteps:
    """Events of the steps that this rank has launched, by number. Used by its engine's thread and by the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._events: deque[Any] = deque(maxlen=KEPT_STEPS)
        self._waiting: list[tuple[int, Callable[[], object]]] = []

    def add(self, computed: Any) -> None:
        """Note that the next step is launched. `computed`: see `Runner.computed`."""
        with self._lock:
            self._number += 1
            self._events.append(computed)
            due = [call for number, call in self._waiting if number <= self._number]
            self._waiting = [each for each in self._waiting if each[0] > self._number]
        for call in due:
            call()

    def event(self, number: int) -> Any:
        """Return the event of a launched step, or None if it has been computed."""
        with self._lock:
            age = self._number - number
            return self._events[-1 - age] if 0 <= age < len(self._events) else None

    def has(self, number: int, when_launched: Callable[[], object]) -> bool:
        """Return whether a step is launched. If not, `when_launched` is called when it is, in the thread that launches
        it."""
        with self._lock:
            if number > self._number:
                self._waiting.append((number, when_launched))
            return number <= self._number
